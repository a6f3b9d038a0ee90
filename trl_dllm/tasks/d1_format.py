"""d1's format rewards, which its tasks share: the numbers of the published functions, quirks included."""

import re

from .base import completion_text, d1_answer


_PAIR = re.compile(r"</reasoning>\s*<answer>")


def xmlcount(text: str) -> float:
    """
    At most 0.5: an eighth for each of four tag lines that occurs exactly once, less 0.001 a character behind the last.

    Unbounded below. The text behind a closing tag that is missing is the whole text.
    """
    total = 0.125 * ((text.count("<reasoning>\n") == 1) + (text.count("\n</reasoning>\n") == 1))
    # One addition or subtraction at a time and in d1's order, so that the floats are the same to the bit.
    if text.count("\n<answer>\n") == 1:
        total += 0.125
        total -= 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        total += 0.125
        total -= 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return total


def soft_format(text: str) -> float:
    """0.5 where the text starts with a reasoning and an answer section, neither of them with a line break in it."""
    # What `.` without DOTALL matches, in linear time: each section has to end in the line in which it starts.
    if not text.startswith("<reasoning>"):
        return 0.0
    first_line = text.split("\n", 1)[0]
    for pair in _PAIR.finditer(text, len("<reasoning>")):
        if pair.start() >= len(first_line):
            break
        if text.find("</answer>", pair.end(), _line_end(text, pair.end())) >= 0:
            return 0.5
        if pair.end() <= len(first_line):
            # Nothing closes in the rest of this line, so only a pair whose white space leaves the line is left.
            last = text.rfind("</reasoning>", 0, len(first_line))
            spanning = _PAIR.match(text, max(last, len("<reasoning>")))
            end = -1 if spanning is None or last < len("<reasoning>") else spanning.end()
            return 0.5 if end >= 0 and text.find("</answer>", end, _line_end(text, end)) >= 0 else 0.0
    return 0.0


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def strict_format(text: str) -> float:
    """0.5 where the text is d1's six lines and nothing else: each section one line, each tag a line of its own."""
    lines = text.split("\n", 8)
    tags = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    found = len(lines) >= 7 and [lines[0], lines[2], lines[3], lines[5]] == tags
    return 0.5 if found and lines[6:] in ([""], ["", ""]) else 0.0


def _texts(completions: list) -> list[str]:
    return [completion_text(completion) for completion in completions]


def d1_xmlcount_reward(completions: list, **kwargs) -> list[float]:
    """d1's count of tag lines, see `xmlcount`: at most 0.5."""
    return [xmlcount(text) for text in _texts(completions)]


def d1_soft_format_reward(completions: list, **kwargs) -> list[float]:
    """d1's soft format, 0.5 or 0. A line break inside a section gives 0: the pattern has no DOTALL."""
    return [soft_format(text) for text in _texts(completions)]


def d1_strict_format_reward(completions: list, **kwargs) -> list[float]:
    """d1's strict format, 0.5 or 0. Reasoning of two lines gives 0, and what earns it cannot earn `soft_format`."""
    return [strict_format(text) for text in _texts(completions)]


def d1_int_reward(completions: list, **kwargs) -> list[float]:
    """d1's integer reward, 0.5 where the extracted answer has digits only: none for a sign, a point or a comma."""
    return [0.5 if d1_answer(text).isdigit() else 0.0 for text in _texts(completions)]


def d1_correctness_reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """d1's correctness, 2.0 where the extracted answer is the gold string, character by character; tags not needed."""
    return [2.0 if d1_answer(text) == gold else 0.0 for text, gold in zip(_texts(completions), answer, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# MATH: the normalisation of the data set's own grader, on which d1's reward rests


def d1_last_box(text: str) -> str | None:
    """
    What stands in the last box of `text` as d1 reads it; None where it reads none.

    The last `\\boxed` (`\\fbox` without any) has to open with a brace at once, or be followed by a space, which makes
    everything up to the next dollar the answer.
    """
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$", 1)[0]
    name = "\\boxed" if "\\boxed" in text else "\\fbox"
    start = text.rfind(name)
    if start < 0:
        return None
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth <= 0:
            # An \fbox is found, but its name does not come off: d1 falls back on the whole text.
            opens = text.startswith("\\boxed{", start) and depth == 0
            return text[start + len("\\boxed{") : brace.start()] if opens else None
    return None


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

    None where the normalisation gives up (two units, `\\frac` or `\\sqrt` at the end).
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
    text = _brace_roots(text)
    if text is None:
        return None
    text = _brace_fractions(text.replace(" ", ""))
    return None if text is None else _fraction_of_slash("\\frac{1}{2}" if text == "0.5" else text)


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


def _fraction_of_slash(text: str) -> str:
    """Two integers with a slash between them as a `\\frac`; anything else as it is."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    try:
        above, below = int(sides[0]), int(sides[1])
    except ValueError:
        return text
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
