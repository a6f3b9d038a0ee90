"""d1's rewards and evaluation parser for MATH: on strings, in the normal form of the data set's own grader."""

from collections.abc import Mapping
from typing import Any

from .base import completion_text
from .d1_format import completion_texts, d1_boxed, d1_first_tag


def d1_math_format(text: str) -> float:
    """
    0.75 where there is an `<answer>`, else 0.25.

    The box is worth another quarter at most, but what is looked for is a backspace and "oxed": "\\b" in a string of
    Python that is not raw. A text that has those characters earns 1.0 or 0.5.
    """
    parts = text.split("<answer>", 2)
    tagged = len(parts) > 1
    inside = parts[1].split("</answer>", 1)[0] if tagged else text
    return 0.5 * ((1.0 if tagged else 0.0) + (1.0 if "\x08oxed" in inside else 0.5))


# Replaced one after the other.
_REPLACED = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_REPLACED_LATER = (("\\%", ""), ("\\%", ""), (" .", " 0."), ("{.", "{0."))
MAX_NORMALISED = 10_000  # characters; d1 has no limit, but answers of that length are never equal to a gold one


def d1_normal_form(text: str) -> str | None:
    """
    An answer in the normal form that d1 compares: no spaces, units, degrees, dollars and percent, "\\frac{a}{b}".

    None where the normalisation gives up (two units, `\\frac` or `\\sqrt` at the end, a slash between no integers).
    """
    if len(text) > MAX_NORMALISED:
        return None
    for old, new in _REPLACED:
        text = text.replace(old, new)
    if "\\text{ " in text:  # a unit on the right
        parts = text.split("\\text{ ")
        if len(parts) != 2:
            return None
        text = parts[0]
    for old, new in _REPLACED_LATER:
        text = text.replace(old, new)
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "x = 3"
        text = sides[1]
    with_roots = _brace_roots(text)
    with_fractions = None if with_roots is None else _brace_fractions(with_roots.replace(" ", ""))
    if with_fractions is None:
        return None
    return _fraction_of_slash("\\frac{1}{2}" if with_fractions == "0.5" else with_fractions)


def _brace_roots(text: str) -> str | None:
    first, *rest = text.split("\\sqrt")
    if any(not part for part in rest):
        return None
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _brace_fractions(text: str) -> str | None:
    """`\\frac12` and the like with braces; the text as it was where a fraction is too short for that."""
    first, *rest = text.split("\\frac")
    result = first
    for part in rest:
        result += "\\frac"
        if not part:
            return None
        if part[0] == "{":
            result += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result += f"{{{part[0]}}}{part[1:]}"
        else:
            result += f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return result


def _fraction_of_slash(text: str) -> str | None:
    """Two integers with a slash between them as a `\\frac`; None for anything else with one slash."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    try:
        above, below = int(sides[0]), int(sides[1])
    except ValueError:
        return None
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def d1_math_correctness_reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """
    d1's correctness, 2.0 where the last box (or, without one, the whole text) is the gold answer after normalisation.

    `answer` may be a solution with a box, as in d1's data, or the bare answer.
    """
    golds, texts = ([_boxed_or_all(text) for text in column] for column in (answer, completion_texts(completions)))
    return [2.0 if d1_equivalent(text, gold) else 0.0 for text, gold in zip(texts, golds, strict=True)]


def d1_boxed_and_answer_tags_reward(completions: list, **kwargs) -> list[float]:
    """d1's format reward: 0.75 with an `<answer>`, 0.25 without, box or no box (see `d1_format.d1_math_format`)."""
    return [d1_math_format(completion_text(completion)) for completion in completions]


def d1_equivalent(answer: str, gold: str) -> bool:
    """Are the two the same after d1's normalisation, or as they are where that fails? Never raises."""
    first, second = d1_normal_form(answer), d1_normal_form(gold)
    if first is None or second is None:
        return answer == gold
    return first == second


def _boxed_or_all(text: str) -> str:
    box = d1_boxed(text)
    return text if box is None else box


def d1_score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """
    `score` by d1's parser: the last box, compared as `d1_equivalent` does it.

    Without any box it is the whole text, tags and all (see `d1_boxed`); the first `<answer>…</answer>` counts only
    where the box never closes or is empty.
    """
    found = d1_boxed(text)
    if not found:
        tag = d1_first_tag(text)
        found = found if tag is None else tag
    return {"correct": found is not None and d1_equivalent(found, row["answer"]), "answer": found and found[:1000]}
