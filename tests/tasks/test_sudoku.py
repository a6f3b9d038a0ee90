import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dllm.tasks import TASKS, get_task, sudoku
from trl_dllm.tasks.base import last_answer
from trl_dllm.tasks.sudoku import (
    SPLIT_SIZES,
    layout,
    load,
    parse_board,
    score,
    solutions,
    split_solutions,
    sudoku_cells_reward,
    sudoku_solved_reward,
)


PUZZLE = "1030341221434321"
SOLUTION = "1234341221434321"
PIECES = [
    "<answer>",
    "</answer>",
    "<answer",
    "1",
    "2",
    "3",
    "4",
    "0",
    "9",
    " ",
    "\n",
    "²",
    "٣",
    "\ud800",
    "x" * 50,
    SOLUTION,
    PUZZLE,
]
messy_text = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


def solve(puzzle):
    """All solutions by backtracking, with the rules written out once more."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    row, column = divmod(cell, 4)
    found = []
    for digit in "1234":
        clash = any(
            puzzle[4 * r + c] == digit
            for r in range(4)
            for c in range(4)
            if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
        )
        if not clash:
            found += solve(puzzle[:cell] + digit + puzzle[cell + 1 :])
    return found


def chat(text):
    return [{"role": "assistant", "content": text}]


def cells(completion, puzzle=PUZZLE, solution=SOLUTION):
    return sudoku_cells_reward([completion], puzzle=[puzzle], solution=[solution], prompts=["x"], trainer_state=None)[
        0
    ]


def solved(completion, solution=SOLUTION):
    return sudoku_solved_reward([completion], puzzle=[PUZZLE], solution=[solution], prompts=["x"])[0]


# Registry


def test_registry():
    assert get_task("sudoku") is TASKS["sudoku"]
    assert all(name == task.name for name, task in TASKS.items())
    assert next(iter(get_task("sudoku").rewards.values())) is sudoku_cells_reward
    with pytest.raises(ValueError, match=r"'sudoko'.*mean 'sudoku'"):
        get_task("sudoko")
    with pytest.raises(ValueError, match="mean 'countdown'"):
        get_task("Countdown3")


# Data


def test_solutions_are_all_grids():
    assert solutions() == tuple(sorted(solve("0" * 16)))
    assert len(solutions()) == 288


def test_splits_partition_the_solutions():
    parts = {split: set(split_solutions(split)) for split in SPLIT_SIZES}
    assert {split: len(part) for split, part in parts.items()} == {"train": 200, "validation": 24, "test": 64}
    assert set().union(*parts.values()) == set(solutions())
    # Pinned: moving a grid between splits would make numbers from before and after incomparable.
    assert split_solutions("validation")[:2] == ("1243431221343421", "1324423134122143")


@pytest.mark.parametrize("split", SPLIT_SIZES)
@pytest.mark.parametrize("min_blanks, max_blanks", [(6, 10), (12, 12), (1, 3)])
def test_puzzles_are_unique_and_of_the_split(split, min_blanks, max_blanks):
    data = load(split, 30, seed=3, min_blanks=min_blanks, max_blanks=max_blanks)
    assert data.column_names == ["prompt", "puzzle", "solution", "completion"]
    assert len(set(data["puzzle"])) == len(data) == 30
    for row in data:
        assert solve(row["puzzle"]) == [row["solution"]]
        assert min_blanks <= row["puzzle"].count("0") <= max_blanks
        assert row["solution"] in split_solutions(split)


def test_every_unique_puzzle_is_reached():
    # One blank is always unique: 24 grids x 16 cells, and not one more.
    data = load("validation", 384, min_blanks=1, max_blanks=1)
    assert len(set(data["puzzle"])) == 384
    with pytest.raises(ValueError, match="only 384 puzzles"):
        load("validation", 385, min_blanks=1, max_blanks=1)
    # Four givens, against the backtracking solver: every mask of one grid that pins it down.
    grid = split_solutions("validation")[0]
    masks = [mask for mask in range(1 << 16) if mask.bit_count() == 4]
    puzzles = ["".join(d if mask >> i & 1 else "0" for i, d in enumerate(grid)) for mask in masks]
    others = [other for other in solve("0" * 16) if other != grid]
    expected = {
        p for p in puzzles if not any(all(d in ("0", o) for d, o in zip(p, other, strict=True)) for other in others)
    }
    with pytest.raises(ValueError) as error:
        load("validation", 10**6, min_blanks=12, max_blanks=12)
    total = int(str(error.value).split("only ")[1].split()[0])
    data = load("validation", total, min_blanks=12, max_blanks=12)
    assert {row["puzzle"] for row in data if row["solution"] == grid} == expected


def test_seeds():
    first = load("train", 100, seed=1)
    assert first.to_list() == load("train", 100, seed=1).to_list()
    assert first["puzzle"][:40] == load("train", 40, seed=1)["puzzle"][:]
    assert len(set(first["puzzle"]) & set(load("train", 100, seed=2)["puzzle"])) < 5


def test_blank_counts_are_even():
    counts = [puzzle.count("0") for puzzle in load("train", 1000)["puzzle"]]
    assert all(130 < counts.count(blanks) < 270 for blanks in range(6, 11))


def test_loading_is_fast():
    start = time.perf_counter()
    load("train", 3000)
    assert time.perf_counter() - start < 2


def test_formats():
    text = load("test", 5, seed=7)
    conversation = load("test", 5, seed=7, prompt_format="chat", data_dir="unused")
    assert text["puzzle"][:] == conversation["puzzle"][:]
    for plain, talk in zip(text, conversation, strict=True):
        assert (plain["prompt"], plain["completion"]) == (plain["puzzle"] + "=", plain["solution"])
        (message,) = talk["prompt"]
        assert message["role"] == "user"
        assert plain["puzzle"] in message["content"] and "<answer>" in message["content"]
        for completion in (plain["completion"], talk["completion"]):
            assert cells(completion, plain["puzzle"], plain["solution"]) == solved(completion, plain["solution"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "dev"}, "split must be"),
        ({"prompt_format": "html"}, "prompt_format must be"),
        ({"num_examples": 0}, "num_examples"),
        ({"min_blanks": 0}, "min_blanks"),
        ({"min_blanks": 11}, "max_blanks=10"),
        ({"max_blanks": 13}, "max_blanks=13"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"split": "train", "num_examples": 2, **arguments})


# Rewards


@pytest.mark.parametrize(
    "text, share, whole",
    [
        (SOLUTION, 1.0, 1.0),
        ("1234 3412\n2143|4321", 1.0, 1.0),
        (f"I put 2 and 4: <answer>{SOLUTION}</answer>", 1.0, 1.0),
        (f"<answer>{PUZZLE}</answer> no, <answer>\n{SOLUTION}\n</answer> done 1", 1.0, 1.0),
        (f"<answer>{SOLUTION}</answer> no, <answer>{PUZZLE}</answer>", 0.0, 0.0),
        (f"<answer>{SOLUTION}</answer><answer>11", 1.0, 1.0),  # the second one is not closed
        ("1233" + SOLUTION[4:], 0.5, 0.0),
        ("4234" + SOLUTION[4:], 1.0, 0.0),  # an altered given
        (SOLUTION + "1", 1.0, 0.0),
        ("12", 0.5, 0.0),
        ("<answer></answer>" + SOLUTION, 0.0, 0.0),
        ("", 0.0, 0.0),
        ("no digits", 0.0, 0.0),
    ],
)
def test_rewards(text, share, whole):
    for completion in (text, chat(text)):
        assert cells(completion) == share
        assert solved(completion) == whole
    row = {"puzzle": PUZZLE, "solution": SOLUTION}
    assert score(text, row) == {"correct": bool(whole), "cells_correct": round(2 * share), "cells_total": 2}


def test_givens_never_count():
    # Only givens right, every blank wrong: nothing; a completion that repeats the puzzle earns nothing either.
    assert cells("1133341221434321") == 0.0
    assert cells(PUZZLE) == 0.0


def test_a_puzzle_without_blanks_earns_nothing_for_cells():
    assert cells(SOLUTION, puzzle=SOLUTION) == cells("", puzzle=SOLUTION) == 0.0
    row = {"puzzle": SOLUTION, "solution": SOLUTION}
    assert score(SOLUTION, row) == {"correct": True, "cells_correct": 0, "cells_total": 0}


def test_rewards_of_a_batch_stay_in_order():
    texts = [SOLUTION, PUZZLE, "12"]
    columns = {"puzzle": [PUZZLE] * 3, "solution": [SOLUTION] * 3}
    assert sudoku_cells_reward(completions=texts, **columns) == [1.0, 0.0, 0.5]
    assert sudoku_solved_reward(completions=[chat(text) for text in texts], **columns) == [1.0, 0.0, 0.0]


def test_message_contents():
    assert solved([]) == 0.0
    assert solved([{"role": "assistant", "content": None}]) == 0.0
    assert solved([{"role": "assistant", "content": [{"type": "text", "text": SOLUTION}]}]) == 1.0


@settings(max_examples=150, deadline=None)
@given(messy_text)
def test_parsers_take_any_text(text):
    board = parse_board(text)
    assert len(board) <= 17 and set(board) <= set("0123456789")
    answer = last_answer(text)
    assert answer is None or (f"<answer>{answer}</answer>" in text and "<answer>" not in answer)
    share = cells(text)
    assert share in (0.0, 0.5, 1.0) and cells(chat(text)) == share
    assert solved(text) == (board == SOLUTION) == score(text, {"puzzle": PUZZLE, "solution": SOLUTION})["correct"]
    assert sum(place is not None for place in layout(text, {"puzzle": PUZZLE}).places) == min(16, len(board))


ROW = {"puzzle": PUZZLE, "solution": SOLUTION}


@pytest.mark.parametrize(
    "text",
    [SOLUTION, f"I think <answer>{SOLUTION}</answer> of 4x4", SOLUTION[:5], " ".join(SOLUTION) + "1", ""],
    ids=["text", "chat", "short", "spaced and long", "none"],
)
def test_the_board_of_a_completion(text):
    grid = layout(text, ROW)
    assert (grid.columns, grid.box) == (4, (2, 2)) and grid.expected == tuple(SOLUTION)
    assert grid.given == tuple(None if digit == "0" else digit for digit in PUZZLE)
    shown = "".join("" if place is None else text[place] for place in grid.places)
    assert len(grid.places) == 16 and shown == parse_board(text)[:16]


def test_the_board_of_a_stored_trajectory_is_its_prompts():
    """A line has no columns but perhaps the prompt's text."""
    for prompt in (f"{PUZZLE}=", f"7 x {SOLUTION}\n{PUZZLE}"):
        grid = layout(SOLUTION, {"prompt": prompt, "step_maps": [1]})
        assert grid.given == layout(SOLUTION, ROW).given and set(grid.expected) == {None}
    assert layout(SOLUTION, {"prompt": [{"role": "user", "content": f"Grid: {PUZZLE}"}]}).given[0] == "1"
    assert layout(SOLUTION, {**ROW, "solution": "12"}).expected == (None,) * 16
    for row in ({}, {"prompt": "no puzzle"}, {"prompt": "9" * 16}, {"puzzle": 5}, {"puzzle": "٣" * 16}):
        assert layout(SOLUTION, row) is None


@pytest.mark.parametrize("piece", ["(", "<answer>", "</answer>", "<answer></answer>", "1", " ", "<"])
def test_long_texts_take_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    cells(text), solved(text), layout(text, {"puzzle": PUZZLE})
    assert time.perf_counter() - start < 0.5


def test_noisy_demonstrations_change_only_filled_in_cells_of_the_completion():
    clean, noisy = (load("train", 400, seed=3, answer_noise=noise) for noise in (0.0, 0.2))
    assert clean["puzzle"] == noisy["puzzle"] and clean["solution"] == noisy["solution"] == clean["completion"]
    blanks = wrong = 0
    for puzzle, solution, completion in zip(noisy["puzzle"], noisy["solution"], noisy["completion"], strict=True):
        assert all(c == s for g, s, c in zip(puzzle, solution, completion, strict=True) if g != "0")
        blanks += puzzle.count("0")
        wrong += sum(c != s for s, c in zip(solution, completion, strict=True))
    assert 0.17 < wrong / blanks < 0.23
    with pytest.raises(ValueError, match="answer_noise"):
        load("train", 1, answer_noise=1.5)


def test_published_puzzles(data_dir):
    for source, size in (("d1", 500), ("spg", 256)):
        data = load("test", source=source, data_dir=str(data_dir))
        assert len(data) == size
        for row in data:
            assert row["solution"] in solutions() and row["puzzle"].count("0") > 0
            assert all(given in ("0", digit) for given, digit in zip(row["puzzle"], row["solution"], strict=True))
        with pytest.raises(ValueError, match="train"):
            load("train", 4, source=source, data_dir=str(data_dir))
    with pytest.raises(ValueError, match="source must be"):
        load("test", 4, source="d2")


def test_stored_row():
    row = sudoku.stored_row({"question": f"Solve this: {PUZZLE}\n", "ground_truth": SOLUTION})
    assert row == {"puzzle": PUZZLE, "solution": SOLUTION}
    with pytest.raises(ValueError, match="no puzzle"):
        sudoku.stored_row({"question": "123", "ground_truth": SOLUTION})
