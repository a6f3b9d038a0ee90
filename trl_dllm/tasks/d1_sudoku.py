"""d1's reward and evaluation parser for Sudoku, quirks included."""

import re
from collections.abc import Mapping
from typing import Any

from .base import completion_text
from .d1_format import d1_last_tag


def _d1_cells(board: str, puzzle: str, solution: str) -> tuple[int, int]:
    """(blanks filled in rightly, blanks) of a board that is cut, or filled up with zeros, to 16 cells."""
    board = board[:16].ljust(16, "0")
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    return sum(board[cell] == solution[cell] for cell in blanks), len(blanks)


def d1_sudoku_reward(completions: list, puzzle: list[str], solution: list[str], **kwargs) -> list[float]:
    """
    d1's reward: the fraction of the blanks filled in rightly by the digits in the last closed `<answer>`.

    Text without tags earns nothing (the default reads its digits), zeros are added and digits dropped to make 16, and
    any Unicode digit takes a cell (the default reads 0 to 9 only).
    """
    rewards = []
    for completion, given, solved in zip(completions, puzzle, solution, strict=True):
        answer = d1_last_tag(completion_text(completion)) or ""
        board = "".join(character for character in answer if character.isdigit())
        right, blanks = _d1_cells(board, given, solved)
        rewards.append(right / blanks if board and blanks else 0.0)
    return rewards


_ANSWER_END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")
_FENCE = re.compile(r"```\s*([\d\s]+)```")
_SIXTEEN = re.compile(r"(?<!\w)\d{16}(?!\w)")


def d1_parse_board(text: str) -> str:
    """
    The board that d1's evaluation reads, at most 16 characters without white space; never raises.

    Digits alone in a ``` fence behind the first `<answer>`, else what follows it up to `</answer>` or an end token,
    else what follows the first `</answer>`, else 16 digits in a row anywhere. What is not a digit is kept and takes a
    cell.
    """
    start = text.find("<answer>")
    behind = text[start + len("<answer>") :] if start >= 0 else ""
    candidates = []
    fence = _first_fence(behind)
    if fence is not None:
        candidates.append(fence)
    if _ANSWER_END.search(behind):
        candidates.append(_ANSWER_END.split(behind, maxsplit=1)[0])
    if "</answer>" in text:
        candidates.append(re.split(r"<\|eot_id\|>|<\|endoftext\|>", text.split("</answer>", 1)[1], maxsplit=1)[0])
    run = _SIXTEEN.search(text)
    if run is not None:
        candidates.append(run.group())
    chosen = next((candidate for candidate in candidates if candidate.strip()), "")
    return "".join(chosen.split())[:16]


def _first_fence(text: str) -> str | None:
    """The first ``` fence with digits and white space only; between two fences each character is read once."""
    for start in re.finditer("```", text):
        end = text.find("```", start.end())
        if end < 0:
            return None
        match = _FENCE.fullmatch(text, start.start(), end + 3)
        if match is not None and match.group(1).strip():
            return match.group(1)
    return None


def d1_score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`score` by d1's parser; d1 reports cells (`cells_correct` of `cells_total`), `correct` is all of them."""
    right, blanks = _d1_cells(d1_parse_board(text), row["puzzle"], row["solution"])
    return {"correct": right == blanks, "cells_correct": right, "cells_total": blanks}
