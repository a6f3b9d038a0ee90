"""4x4 Sudoku: generated from a seed, or the published test puzzles of d1 and SPG.

Only 288 solved grids exist, so a split by puzzle would put every test solution into the training set. The split here
is by solution: 200 grids are for training, 24 for validation and 64 for testing, whatever the seed. (Grids of two
splits may still be each other's relabelling.) d1's 500 test puzzles are no such test: their 229 solutions occur in any
sizeable training set. SPG's 256 have 88 solutions that SPG does not train on, but this training split has 61 of them.
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from .base import Grid, Task, check_load_arguments, completion_text, last_answer_span
from .d1_sudoku import d1_score, d1_sudoku_reward
from .data import choose, read_rows, to_dataset


SPLIT_SIZES = {"train": 200, "validation": 24, "test": 64}
SOURCES = {"d1": "sudoku/d1_test.csv", "spg": "sudoku/spg_test.csv"}
DEFAULT_EXAMPLES = {"train": 10_000, "validation": 256, "test": 256}
MAX_BLANKS = 12  # no 4x4 puzzle with fewer than four givens has only one solution

CHAT_PROMPT = (
    "Complete this 4x4 Sudoku. It is written as 16 digits, row after row from the top left, and a 0 stands for an "
    "empty cell. In the finished grid each row, each column and each of the four 2x2 corner boxes has the digits 1 to "
    "4 once, and the given digits are unchanged.\n\n"
    "Grid: {puzzle}\n\n"
    "You may work it out step by step first. Finish with all 16 digits of the completed grid, in the same order and "
    "without spaces, between <answer> and </answer>."
)


@functools.cache
def solutions() -> tuple[str, ...]:
    """All 288 solved grids as 16 digits in row order, sorted."""
    rows = list(itertools.permutations("1234"))
    grids: list[tuple] = [()]
    for row_index in range(4):
        grids = [
            (*above, row) for above in grids for row in rows if _fits(above, row, second_in_box=row_index % 2 == 1)
        ]
    return tuple(sorted("".join(itertools.chain(*grid)) for grid in grids))


def _fits(above: tuple, row: tuple, second_in_box: bool) -> bool:
    if any(other[column] == row[column] for other in above for column in range(4)):
        return False
    # If the left box is right, so is the right one: each row has all four digits.
    return not second_in_box or not set(above[-1][:2]) & set(row[:2])


@functools.cache
def split_solutions(split: str) -> tuple[str, ...]:
    """The solved grids that belong to a split; a fixed order by hash decides, which no seed changes."""
    ordered = sorted(solutions(), key=lambda grid: hashlib.sha256(grid.encode()).digest())
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            return tuple(ordered[start : start + size])
        start += size
    raise ValueError(f"split must be one of {tuple(SPLIT_SIZES)}, got {split!r}.")


@functools.cache
def _unique_masks(split: str) -> np.ndarray:
    """(65536, grids of the split) bool: do the cells in bit set `m` determine the grid?"""
    cells = np.array([[int(digit) for digit in grid] for grid in solutions()])  # (288, 16)
    mine = np.array([[int(digit) for digit in grid] for grid in split_solutions(split)])  # (G, 16)
    agree = (mine[:, None] == cells[None]) @ (
        1 << np.arange(16)
    )  # (G, 288): the cells that two grids share, as a bit set
    grid, other = np.nonzero(agree != 0xFFFF)
    ambiguous = np.zeros((1 << 16, len(mine)), dtype=bool)
    ambiguous[agree[grid, other], grid] = True
    # Fewer givens than ambiguous ones are ambiguous as well: pass the mark down to every subset, one cell at a time.
    for cell in range(16):
        pairs = ambiguous.reshape(-1, 2, 1 << cell, len(mine))
        pairs[:, 0] |= pairs[:, 1]
    return ~ambiguous


@dataclass(eq=False)
class _Pool:
    """The puzzles with one number of blanks: masks, flat indices of the unique ones, a partial shuffle of those."""

    masks: np.ndarray
    candidates: np.ndarray
    drawn: int = 0
    moved: dict[int, int] = field(default_factory=dict)


def _draw_puzzles(split: str, seed: int, min_blanks: int, max_blanks: int) -> Iterator[tuple[str, str]]:
    """Every (puzzle, solution) of the split once, in random order, the number of blanks drawn evenly."""
    rng = random.Random(f"sudoku/{split}/{seed}")
    grids = split_solutions(split)
    unique = _unique_masks(split)
    blanks_of_mask = np.array([16 - mask.bit_count() for mask in range(1 << 16)])
    pools = []
    for blanks in range(min_blanks, max_blanks + 1):
        masks = np.flatnonzero(blanks_of_mask == blanks)
        candidates = np.flatnonzero(unique[masks]).astype(np.int32)
        if len(candidates):
            pools.append(_Pool(masks, candidates))
    while pools:
        pool = rng.choice(pools)
        # Fisher-Yates that stores only the entries it moved: no puzzle comes twice, and a longer run starts the same.
        first, moved = pool.drawn, pool.moved
        chosen = rng.randrange(first, len(pool.candidates))
        index = moved.get(chosen, chosen)
        moved[chosen] = moved.get(first, first)
        pool.drawn += 1
        if pool.drawn == len(pool.candidates):
            pools.remove(pool)
        row, column = divmod(int(pool.candidates[index]), len(grids))
        mask, solution = int(pool.masks[row]), grids[column]
        yield "".join(digit if mask >> cell & 1 else "0" for cell, digit in enumerate(solution)), solution


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    min_blanks: int = 6,
    max_blanks: int = 10,
    answer_noise: float = 0.0,
    prompt_format: str = "text",
    data_dir: str | None = None,
    source: str = "generated",
) -> Dataset:
    """
    Different puzzles with one solution each, the solutions from `split` only.

    Columns: `prompt`, `puzzle` (16 digits in row order, 0 where blank), `solution` (16 digits), `completion` (for
    SFT). With `prompt_format="text"` the prompt is the puzzle and "=", the completion the 16 digits of the solution
    and nothing else; `answer_noise` is the probability with which a filled-in digit of the completion is replaced by a
    wrong one (demonstrations that RL can surpass; never in `solution`). With "chat" both are messages, and the answer
    stands in `<answer>` tags. A smaller `num_examples` gives the first rows of a larger one; None is 10,000 for
    training and 256 else. `data_dir` is not used: nothing is read from disk.

    With `source="d1"` or "spg" the puzzles are the published test puzzles (`sudoku/d1_test.csv`, `sudoku/spg_test.csv`
    in `data_dir` or TRL_DLLM_DATA), whatever their blanks, and None means all of them; there is only a "test" split.

    Raises `ValueError` for an unknown split, format or source, for blanks outside 1..12, and for more examples than
    there are puzzles.
    """
    check_load_arguments(split, num_examples, prompt_format)
    if not 1 <= min_blanks <= max_blanks <= MAX_BLANKS:
        raise ValueError(f"need 1 <= min_blanks <= max_blanks <= {MAX_BLANKS}, got {min_blanks=} and {max_blanks=}.")
    if source in SOURCES:
        rows = read_rows(f"sudoku (source={source!r})", split, {"test": SOURCES[source]}, {}, data_dir)
        drawn = [(row["Puzzle"], row["Solution"]) for row in choose(rows, split, num_examples, seed)]
        num_examples = len(drawn)
    elif source == "generated":
        num_examples = num_examples or DEFAULT_EXAMPLES[split]
        drawn = list(itertools.islice(_draw_puzzles(split, seed, min_blanks, max_blanks), num_examples))
    else:
        raise ValueError(f"source must be one of {('generated', *SOURCES)}, got {source!r}.")
    if len(drawn) < num_examples:
        raise ValueError(
            f"num_examples={num_examples}, but only {len(drawn)} puzzles of split {split!r} have {min_blanks} to "
            f"{max_blanks} blanks."
        )
    puzzles, solved = (list(column) for column in zip(*drawn, strict=True))
    answers = [_with_mistakes(puzzle, solution, answer_noise, seed) for puzzle, solution in drawn]
    chat = prompt_format == "chat"
    prompts = [CHAT_PROMPT.format(puzzle=puzzle) if chat else f"{puzzle}=" for puzzle in puzzles]
    completions = [f"<answer>{answer}</answer>" for answer in answers] if chat else answers
    return to_dataset(prompts, completions, {"puzzle": puzzles, "solution": solved}, prompt_format)


def _with_mistakes(puzzle: str, solution: str, noise: float, seed: int) -> str:
    """The solution with each filled-in digit replaced by another one with probability `noise`."""
    if not 0 <= noise <= 1:
        raise ValueError(f"answer_noise={noise} is a probability; it must be in [0, 1].")
    draw = random.Random(f"{seed}:{puzzle}:mistakes")
    return "".join(
        draw.choice("1234".replace(digit, "")) if given == "0" and draw.random() < noise else digit
        for given, digit in zip(puzzle, solution, strict=True)
    )


def parse_board(text: str) -> str:
    """
    The digits of the answer: those in the last `<answer>…</answer>`, or in all of `text` without one.

    At most 17 are returned, so that a board that is too long can be told from one of 16. Never raises.
    """
    return "".join(text[place] for place in itertools.islice(_digits(text), 17))


def _digits(text: str) -> Iterator[int]:
    """Where the digits of the answer stand in `text`."""
    start, end = last_answer_span(text) or (0, len(text))
    return (match.start() for match in re.compile("[0-9]").finditer(text, start, end))


def count_cells(board: str, puzzle: str, solution: str) -> tuple[int, int]:
    """(blanks filled in rightly, blanks): givens never count, and neither do cells beyond the end of `board`."""
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    return sum(board[cell : cell + 1] == solution[cell] for cell in blanks), len(blanks)


def sudoku_cells_reward(completions: list, puzzle: list[str], solution: list[str], **kwargs) -> list[float]:
    """The fraction of the blanks filled in rightly, 0 to 1; altered givens neither earn nor cost anything."""
    rewards = []
    for completion, given, solved in zip(completions, puzzle, solution, strict=True):
        right, blanks = count_cells(parse_board(completion_text(completion)), given, solved)
        rewards.append(right / blanks if blanks else 0.0)
    return rewards


def sudoku_solved_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1.0 where the answer is the solution, 16 digits and no more, else 0.0."""
    return [
        float(parse_board(completion_text(completion)) == solved)
        for completion, solved in zip(completions, solution, strict=True)
    ]


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`correct` (the whole board is right), `cells_correct` and `cells_total` (blanks) of one completion."""
    board = parse_board(text)
    right, blanks = count_cells(board, row["puzzle"], row["solution"])
    return {"correct": board == row["solution"], "cells_correct": right, "cells_total": blanks}


def layout(text: str, row: Mapping[str, Any]) -> Grid | None:
    """The board that a completion fills in; None if neither the row nor its prompt has a puzzle."""
    puzzle = row.get("puzzle") or _last_puzzle(completion_text(row.get("prompt") or ""))
    if not isinstance(puzzle, str) or not re.fullmatch("[0-4]{16}", puzzle):
        return None
    places = list(itertools.islice(_digits(text), 16))
    solution = row.get("solution")
    expected = solution if isinstance(solution, str) and len(solution) == 16 else [None] * 16
    return Grid(
        columns=4,
        places=(*places, *[None] * (16 - len(places))),
        given=tuple(digit if digit != "0" else None for digit in puzzle),
        expected=tuple(expected),
        box=(2, 2),
    )


def _last_puzzle(text: str) -> str | None:
    """The last run of 16 digits."""
    puzzles = re.findall(r"(?<!\d)\d{16}(?!\d)", text)
    return puzzles[-1] if puzzles else None


def stored_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a stored output: the puzzle is the last run of 16 digits in `question`."""
    puzzle = _last_puzzle(record["question"])
    if puzzle is None:
        raise ValueError(f"no puzzle of 16 digits in the stored question {record['question'][:80]!r}.")
    return {"puzzle": puzzle, "solution": record["ground_truth"]}


TASK = Task(
    name="sudoku",
    load=load,
    rewards={"cells": sudoku_cells_reward, "solved": sudoku_solved_reward, "d1_sudoku": d1_sudoku_reward},
    score=score,
    parsers={"d1": d1_score},
    stored_row=stored_row,
    layout=layout,
)
