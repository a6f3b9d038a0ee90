"""d1's format rewards and its ways to find an answer, which its tasks share: as published, quirks included."""

import re

from .base import completion_text


_BRACE = re.compile("[{}]")
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


def completion_texts(completions: list) -> list[str]:
    return [completion_text(completion) for completion in completions]


def d1_xmlcount_reward(completions: list, **kwargs) -> list[float]:
    """d1's count of tag lines, see `xmlcount`: at most 0.5."""
    return [xmlcount(text) for text in completion_texts(completions)]


def d1_soft_format_reward(completions: list, **kwargs) -> list[float]:
    """d1's soft format, 0.5 or 0. A line break inside a section gives 0: the pattern has no DOTALL."""
    return [soft_format(text) for text in completion_texts(completions)]


def d1_strict_format_reward(completions: list, **kwargs) -> list[float]:
    """d1's strict format, 0.5 or 0. Reasoning of two lines gives 0, and what earns it cannot earn `soft_format`."""
    return [strict_format(text) for text in completion_texts(completions)]


# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer


def d1_answer(text: str) -> str:
    """d1's extraction: from the last `<answer>` to the next `</answer>`, each of which may be missing; stripped."""
    return text.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0].strip()


def d1_last_tag(text: str) -> str | None:
    """The last `<answer>…</answer>` that a search from the left finds, stripped, as d1 reads it; None without one."""
    found, start = None, text.find("<answer>")
    while start >= 0:
        end = text.find("</answer>", start)
        if end < 0:
            break
        found = text[start + len("<answer>") : end]
        start = text.find("<answer>", end)
    return None if found is None else found.strip()


def d1_first_tag(text: str) -> str | None:
    """What stands between the first `<answer>` and the next `</answer>`, stripped; None without the two."""
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text[start + len("<answer>") : end].strip() if 0 <= start < end else None


def d1_boxed(text: str) -> str | None:
    """
    What d1 takes for the boxed answer of `text`; None where its functions raise, as the last box never closes.

    Without any `\\boxed` or `\\fbox` it is the whole text. The last `\\boxed` counts (`\\fbox` without any); one that
    a space follows holds everything up to the next dollar. What does not begin with "\\boxed{" is kept as it is, an
    `\\fbox{…}` with its name.
    """
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$", 1)[0]
    start = text.rfind("\\boxed" if "\\boxed" in text else "\\fbox")
    if start < 0:
        return text
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0 and brace.group() == "}":
            box = text[start : brace.end()]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else box
    return None
