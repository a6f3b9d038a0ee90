"""GSM8K: grade-school word problems whose answer is one number."""

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from datasets import Dataset

from .base import Task, check_load_arguments, completion_text, d1_last_tag, marked_answers, without_end_tokens
from .d1_format import (
    d1_correctness_reward,
    d1_int_reward,
    d1_soft_format_reward,
    d1_strict_format_reward,
    d1_xmlcount_reward,
)
from .data import choose, read_rows, to_dataset


FILES = {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
HUB = {"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}

CHAT_PROMPT = (
    "{question}\n\n"
    "Work it out step by step, then give the final number by itself. Use exactly this layout:\n"
    "<reasoning>\nyour steps\n</reasoning>\n<answer>\nthe number\n</answer>"
)

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    prompt_format: str = "chat",
    data_dir: str | None = None,
) -> Dataset:
    """
    Word problems: 7,473 in "train", 1,319 in "test".

    Columns: `prompt`, `question`, `answer` (the gold number as a string, as it stands behind "####"), `completion`
    (for SFT: the published solution, without its calculator marks). From the Hub, or from `gsm8k/train.jsonl` and
    `gsm8k/test.jsonl` in `data_dir` or TRL_DLLM_DATA. "train" is shuffled by `seed`, "test" stays in order.

    Raises `ValueError` for an unknown split or format ("validation" does not exist) and for too many examples.
    """
    check_load_arguments(split, num_examples, prompt_format)
    rows = choose(read_rows("gsm8k", split, FILES, HUB, data_dir), split, num_examples, seed)
    questions = [row["question"] for row in rows]
    solutions, golds = zip(*(row["answer"].split("####") for row in rows), strict=True)
    golds = [gold.strip() for gold in golds]
    steps = [_CALCULATOR.sub("", solution).strip() for solution in solutions]
    if prompt_format == "chat":
        prompts = [CHAT_PROMPT.format(question=question) for question in questions]
        completions = [
            f"<reasoning>\n{step}\n</reasoning>\n<answer>\n{gold}\n</answer>"
            for step, gold in zip(steps, golds, strict=True)
        ]
    else:
        prompts = [f"Question: {question}\nAnswer: " for question in questions]
        completions = [f"{step}\n#### {gold}" for step, gold in zip(steps, golds, strict=True)]
    return to_dataset(prompts, completions, {"question": questions, "answer": golds}, prompt_format)


# ---------------------------------------------------------------------------------------------------------------------
# Parsers

_FRACTION = re.compile(r"\\[dt]?frac\s{0,9}\{\s{0,9}(\d{1,40})\s{0,9}\}\s{0,9}\{\s{0,9}(\d{1,40})\s{0,9}\}")
# Digits with commas at thousands only; what is longer than 40 digits is no answer of any task.
_NUMBER = re.compile(
    r"(?<!\d)(?<!\d:)(?P<sign>[-−]\s?)?\\?\$?(?P<whole>\d{1,3}(?:(?:,|\{,\}|\\,|\\!)+\d{3})+(?!\d)|\d{1,40}(?!\d))"
    r"(?P<rest>\.\d{1,40})?(?:/(?P<below>\d{1,40}))?|(?<!\d)\.\d{1,40}",
    re.ASCII,
)
MAX_ANSWER = 1000  # characters of a marked answer that are read, from its end


def to_number(text: str | None) -> Fraction | None:
    """
    The last number in an answer, exactly; None without one.

    Takes a sign, a dollar, commas at thousands (also LaTeX's), decimals, a/b and `\\frac{a}{b}`. Never raises.
    """
    if text is None:
        return None
    text = _FRACTION.sub(r" \1/\2 ", text[-MAX_ANSWER:])
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007  the last one counts
        pass
    if match is None:
        return None
    if match["whole"] is None:
        return Fraction(match.group())
    value = Fraction(re.sub(r"\D", "", match["whole"]) + (match["rest"] or ""))
    if match["below"] is not None:
        below = int(match["below"])
        if below == 0:
            return None
        value /= below
    before = text[: match.start()].rstrip()[-1:]
    # A minus between two operands subtracts; only one that nothing stands before is a sign.
    negative = match["sign"] is not None and not (before.isalnum() or before in (")", "}"))
    return -value if negative else value


def parse_answer(text: str) -> Fraction | None:
    """The number in what `text` marks as its answer (see `marked_answers`), or that it consists of; never raises."""
    for answer in marked_answers(text):
        number = to_number(answer)
        if number is not None:
            return number
    text = without_end_tokens(text).strip()
    return to_number(text) if len(text) <= 50 and _NUMBER.fullmatch(text) else None


def _gold(value: Any) -> Fraction | None:
    if value is None:  # a stored output whose gold answer was lost
        return None
    return to_number(value) if isinstance(value, str) else Fraction(value)


def _same(found: Fraction | None, gold: Any) -> bool:
    gold = _gold(gold)
    return found is not None and gold is not None and abs(found - gold) < Fraction(1, 10**6)


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
            numbers = _D1_NUMBER.search(box)
            value = None if numbers is None else _d1_float(numbers.group())
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


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`correct` of one completion, and `answer`, the number that was read (a string, None without one)."""
    found = parse_answer(text)
    return {"correct": _same(found, row["answer"]), "answer": None if found is None else str(found)}


def d1_score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`score` by d1's parser, `d1_parse_answer`."""
    found, gold = d1_parse_answer(text), _gold(row["answer"])
    finite = found is not None and math.isfinite(found)
    return {
        "correct": bool(finite and gold is not None and found == float(gold)),
        "answer": None if found is None else str(found),
    }


def stored_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a stored output, whose gold answer is a number."""
    return {"question": record["question"], "answer": record["ground_truth"]}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def gsm8k_reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """
    2.0 for the right number, else 0.0.

    Differs from d1's correctness reward: numbers are compared and not strings, so "1,200", "$1200" and "1200.00" are
    one answer; a text without any marked answer earns nothing, unless it is a number and nothing else; and only the
    text up to an end token is read.
    """
    return [
        2.0 if _same(parse_answer(completion_text(completion)), gold) else 0.0
        for completion, gold in zip(completions, answer, strict=True)
    ]


_LAYOUT = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def format_reward(completions: list, **kwargs) -> list[float]:
    """
    0.5 where the four tags stand in the text once each, in order, the answer last; else 0.0.

    Differs from d1's format rewards: reasoning may have several lines, one function takes the place of two that
    excluded each other, and the penalty on text behind the answer has an end: it costs this 0.5 and no more.
    """
    rewards = []
    for completion in completions:
        text = without_end_tokens(completion_text(completion)).strip()
        once = all(text.count(tag) == 1 for tag in _LAYOUT)
        places = [text.find(tag) for tag in _LAYOUT]
        good = once and places == sorted(places) and places[0] == 0 and text.endswith("</answer>")
        rewards.append(0.5 if good else 0.0)
    return rewards


def number_reward(completions: list, **kwargs) -> list[float]:
    """
    0.5 where the answer in the tags is a number and nothing else, else 0.0.

    Differs from d1's integer reward: signs, decimals, a dollar and thousands' commas are numbers too, and text
    without tags earns nothing.
    """
    rewards = []
    for completion in completions:
        answer = d1_last_tag(completion_text(completion))
        rewards.append(0.5 if answer is not None and len(answer) <= 50 and _NUMBER.fullmatch(answer) else 0.0)
    return rewards


TASK = Task(
    name="gsm8k",
    load=load,
    rewards={
        "correctness": gsm8k_reward,
        "format": format_reward,
        "number": number_reward,
        "d1_xmlcount": d1_xmlcount_reward,
        "d1_soft_format": d1_soft_format_reward,
        "d1_strict_format": d1_strict_format_reward,
        "d1_int": d1_int_reward,
        "d1_correctness": d1_correctness_reward,
    },
    score=score,
    parsers={"d1": d1_score},
    stored_row=stored_row,
)
