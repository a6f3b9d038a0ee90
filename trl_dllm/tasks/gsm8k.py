"""GSM8K: grade-school word problems whose answer is one number."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from datasets import Dataset

from .base import Task, check_load_arguments, completion_text, marked_answers, without_end_tokens
from .d1_format import d1_last_tag, d1_soft_format_reward, d1_strict_format_reward, d1_xmlcount_reward
from .d1_gsm8k import d1_correctness_reward, d1_int_reward, d1_score
from .data import choose, read_rows, to_dataset
from .number import NUMBER, gold_number, to_number


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
    parts = [row["answer"].split("####") for row in rows]
    solutions, golds = [solution for solution, _ in parts], [gold.strip() for _, gold in parts]
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


def parse_answer(text: str) -> Fraction | None:
    """The number in what `text` marks as its answer (see `marked_answers`), or that it consists of; never raises."""
    for answer in marked_answers(text):
        number = to_number(answer)
        if number is not None:
            return number
    text = without_end_tokens(text).strip()
    return to_number(text) if len(text) <= 50 and NUMBER.fullmatch(text) else None


def _same(found: Fraction | None, gold: Any) -> bool:
    gold = gold_number(gold)
    return found is not None and gold is not None and abs(found - gold) < Fraction(1, 10**6)


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`correct` of one completion, and `answer`, the number that was read (a string, None without one)."""
    found = parse_answer(text)
    return {"correct": _same(found, row["answer"]), "answer": None if found is None else str(found)}


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
        rewards.append(0.5 if answer is not None and len(answer) <= 50 and NUMBER.fullmatch(answer) else 0.0)
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
