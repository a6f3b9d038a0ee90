"""d1's rewards and evaluation parser for GSM8K, quirks included."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .d1_format import completion_texts, d1_answer
from .number import gold_number


def d1_int_reward(completions: list, **kwargs) -> list[float]:
    """d1's integer reward, 0.5 where the extracted answer has digits only: none for a sign, a point or a comma."""
    return [0.5 if d1_answer(text).isdigit() else 0.0 for text in completion_texts(completions)]


def d1_correctness_reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """d1's correctness, 2.0 where the extracted answer is the gold string, character by character; tags not needed."""
    return [
        2.0 if d1_answer(text) == gold else 0.0
        for text, gold in zip(completion_texts(completions), answer, strict=True)
    ]


_D1_NUMBER = re.compile(r"-?\d+\.?\d*")


def _d1_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _d1_boxes(text: str) -> Iterator[str]:
    """Each `\\boxed{…}` of one line to its first closing brace, stripped; a search by hand, as it has to be linear."""
    start = text.find("\\boxed{")
    while start >= 0:
        start += len("\\boxed{")
        close = text.find("}", start)
        if close < 0:
            return
        line_end = text.find("\n", start, close)
        if line_end < 0:
            yield text[start:close].strip()
        start = text.find("\\boxed{", close if line_end < 0 else line_end)


def d1_parse_answer(text: str) -> float | None:
    """
    The number that d1's evaluation reads, quirks included.

    The first `\\boxed{…}` (to the next closing brace, within a line) with a number in it decides: the whole of it as a
    float, or else the first run of digits in it, so "1,200" is 1. Only then the first `<answer>…</answer>`: the whole
    as a float, or else the last run of digits in it. Never raises.
    """
    for box in _d1_boxes(text):
        if not box.strip("."):
            continue
        value = _d1_float(box)
        if value is None:
            number = _D1_NUMBER.search(box)
            value = None if number is None else _d1_float(number.group())
        if value is not None:
            return value
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    if start < 0 or end < 0:
        return None
    inside = text[start + len("<answer>") : end].strip()
    value = _d1_float(inside) if inside else None
    if value is None and inside:
        numbers = _D1_NUMBER.findall(inside)
        value = _d1_float(numbers[-1]) if numbers else None
    return value


def d1_score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`score` by d1's parser, `d1_parse_answer`."""
    found, gold = d1_parse_answer(text), gold_number(row["answer"])
    finite = found is not None and math.isfinite(found)
    return {
        "correct": bool(finite and gold is not None and found == float(gold)),
        "answer": None if found is None else str(found),
    }
