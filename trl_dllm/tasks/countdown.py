"""The Countdown numbers game: reach the target with + - * /, using every number exactly once.

Problems are generated from a seed, or the published ones of d1's evaluation and of its training set are read.

A hash of the problem (the numbers in any order, and the target) says which split it belongs to, so the splits share no
problem, whatever the seeds and ranges.
"""

import hashlib
import random
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from datasets import Dataset

from .base import Task, check_load_arguments, completion_text, last_answer, last_boxed, without_end_tokens
from .d1_countdown import d1_countdown_reward, d1_score
from .data import choose, read_rows


# What an answer may be at most: far more than any real one needs, and little enough that parsing takes microseconds.
MAX_LENGTH = 256
MAX_DEPTH = 32

SOURCES = ("generated", "d1")
FILES = {"train": "countdown/train.jsonl", "test": "countdown/test.jsonl"}
HUB = {"train": ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train")}
HELD_OUT = 500  # rows that d1 keeps back at the end of its shuffled training set
DEFAULT_EXAMPLES = {"train": 10_000, "validation": 256, "test": 256}

MAX_MISSES = 50_000  # draws in a row without a new problem after which there are taken to be no more

CHAT_PROMPT = (
    "Numbers: {numbers}\nTarget: {target}\n\n"
    "Find an expression that equals the target. It may contain +, -, *, / and parentheses, and every one of the "
    "numbers has to occur in it exactly once.\n\n"
    "You may try things out first. Finish with the expression alone between <answer> and </answer>."
)


def split_of(numbers: list[int], target: int) -> str:
    """The split that a problem belongs to: train for 8 of 10, validation and test for one each."""
    problem = f"{','.join(map(str, sorted(numbers)))}:{target}"
    bucket = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def _draw_problem(rng: random.Random, num_numbers: int, max_number: int) -> tuple[list[int], int, str]:
    """Numbers, the value of a random expression of them, and the expression; all its parts are positive integers."""
    numbers = [rng.randint(1, max_number) for _ in range(num_numbers)]
    parts = [(number, str(number), 3) for number in numbers]  # value, text, how tightly the text binds
    while len(parts) > 1:
        left = parts.pop(rng.randrange(len(parts)))
        right = parts.pop(rng.randrange(len(parts)))
        large, small = (left, right) if left[0] >= right[0] else (right, left)
        operators = "+*"
        if large[0] > small[0]:
            operators += "-"
        if large[0] % small[0] == 0:
            operators += "/"
        operator = rng.choice(operators)
        if operator == "+":
            parts.append((left[0] + right[0], _join(left, "+", right), 1))
        elif operator == "*":
            parts.append((left[0] * right[0], _join(left, "*", right), 2))
        elif operator == "-":
            parts.append((large[0] - small[0], _join(large, "-", small), 1))
        else:
            parts.append((large[0] // small[0], _join(large, "/", small), 2))
    value, text, _ = parts[0]
    return numbers, value, text


def _join(left: tuple, operator: str, right: tuple) -> str:
    """The two texts around the operator, with no more parentheses than needed."""
    binds = 1 if operator in "+-" else 2
    left_text = f"({left[1]})" if left[2] < binds else left[1]
    right_text = f"({right[1]})" if right[2] < binds or (right[2] == binds and operator in "-/") else right[1]
    return f"{left_text}{operator}{right_text}"


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    num_numbers: int = 3,
    prompt_format: str = "text",
    max_number: int = 99,
    max_target: int = 99,
    data_dir: str | None = None,
    source: str = "generated",
    allow_test_as_train: bool = False,
) -> Dataset:
    """
    Different problems that have a solution: `num_numbers` numbers in 1..`max_number`, a target in 1..`max_target`.

    Columns: `prompt`, `numbers` (list of int), `target` (int), `completion` (for SFT: one right expression, of which
    there may be others). With `prompt_format="text"` the prompt is like "3,17,5:46=" and the completion like
    "3*17-5", in the characters 0-9 + - * / ( ) , : = only; with "chat" both are messages, and the expression stands
    in `<answer>` tags. A smaller `num_examples` gives the first rows of a larger one; None is 10,000 for training and
    256 else. `data_dir` is not used: nothing is read from disk.

    With `source="d1"` the problems are d1's instead, without a `completion`, and None means all of them: "test" is the
    256 of its evaluation (`countdown/test.jsonl` in `data_dir` or TRL_DLLM_DATA; they are not on the Hub), "train" its
    training set on the Hub with three numbers, but the last 500 of its shuffled rows, which are "validation".

    Raises `ValueError` for an unknown split, format or source, for impossible ranges, and where there are too few.
    """
    check_load_arguments(split, num_examples, prompt_format)
    if not 2 <= num_numbers <= 6:
        raise ValueError(f"num_numbers must be in 2..6, got {num_numbers}.")
    if max_number < 1 or max_target < 1:
        raise ValueError(f"max_number and max_target must be at least 1, got {max_number=} and {max_target=}.")
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}.")
    if source == "d1":
        return _load_d1(split, num_examples, seed, prompt_format, data_dir, allow_test_as_train)
    num_examples = num_examples or DEFAULT_EXAMPLES[split]
    rng = random.Random(f"countdown/{split}/{seed}")
    seen: set[tuple[int, ...]] = set()
    rows: dict[str, list] = {"prompt": [], "numbers": [], "target": [], "completion": []}
    misses = 0
    while len(seen) < num_examples:
        numbers, target, expression = _draw_problem(rng, num_numbers, max_number)
        problem = (*sorted(numbers), target)
        if target > max_target or problem in seen or split_of(numbers, target) != split:
            misses += 1
            if misses == MAX_MISSES:
                raise ValueError(
                    f"num_examples={num_examples}, but only {len(seen)} problems of split {split!r} were found "
                    f"with {num_numbers=}, {max_number=} and {max_target=}."
                )
            continue
        misses = 0
        seen.add(problem)
        message = {"role": "assistant", "content": f"<answer>{expression}</answer>"}
        rows["prompt"].append(_prompt(numbers, target, prompt_format))
        rows["numbers"].append(numbers)
        rows["target"].append(target)
        rows["completion"].append(expression if prompt_format == "text" else [message])
    return Dataset.from_dict(rows)


def _prompt(numbers: list[int], target: int, prompt_format: str) -> str | list[dict[str, str]]:
    if prompt_format == "text":
        return f"{','.join(map(str, numbers))}:{target}="
    content = CHAT_PROMPT.format(numbers=", ".join(map(str, numbers)), target=target)
    return [{"role": "user", "content": content}]


def _load_d1(
    split: str, num_examples: int | None, seed: int, prompt_format: str, data_dir: str | None, as_train: bool
) -> Dataset:
    held_out = split == "validation"
    rows = read_rows("countdown", "train" if held_out else split, FILES, HUB, data_dir, as_train)
    if "input" in rows[0]:  # d1's evaluation file: the numbers as a string, the target as "output"
        problems = [([int(number) for number in row["input"].split(",")], int(row["output"])) for row in rows]
    else:
        problems = [(list(row["nums"]), int(row["target"])) for row in rows if len(row["nums"]) == 3]
        random.Random("countdown/held out").shuffle(problems)
        problems = problems[-HELD_OUT:] if held_out else problems[:-HELD_OUT]
    problems = choose(problems, split, num_examples, seed)
    return Dataset.from_dict(
        {
            "prompt": [_prompt(numbers, target, prompt_format) for numbers, target in problems],
            "numbers": [numbers for numbers, _ in problems],
            "target": [target for _, target in problems],
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: parsed by hand, since an answer is untrusted text


class _Invalid(Exception):
    pass


_TOKEN = re.compile(r"\s*(0|[1-9][0-9]*|[-+*/()=])")
_SYMBOLS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})
_LATEX = re.compile(r"\\(times|cdot|div|left|right)(?![A-Za-z])")
_LATEX_SYMBOLS = {"times": "*", "cdot": "*", "div": "/", "left": "", "right": ""}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """
    The exact value of an expression and the numbers in it, in order; None where it is not one.

    Integers, + - * / (also × ÷ − · and LaTeX's \\times, \\cdot and \\div), signs and parentheses, and an "= value"
    after it, which has to be the right one.
    What has more than 256 characters or 32 nested parentheses is not an expression. Never raises.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    text = _LATEX.sub(lambda match: _LATEX_SYMBOLS[match.group(1)], text.translate(_SYMBOLS))
    tokens, end = [], 0
    while end < len(text):
        match = _TOKEN.match(text, end)
        if match is None:
            return None
        tokens.append(match.group(1))
        end = match.end()
    stack = ["", *reversed(tokens)]  # the next token last; the empty one, which nothing accepts, marks the end
    used: list[int] = []
    try:
        value = _sum(stack, used, depth=0)
    except (_Invalid, ZeroDivisionError):
        return None
    rest = stack[:0:-1]
    if rest and not (len(rest) == 2 and rest[0] == "=" and rest[1].isdigit() and int(rest[1]) == value):
        return None
    return value, used


def _sum(stack: list[str], used: list[int], depth: int) -> Fraction:
    value = _product(stack, used, depth)
    while stack[-1] in ("+", "-"):
        sign = 1 if stack.pop() == "+" else -1
        value += sign * _product(stack, used, depth)
    return value


def _product(stack: list[str], used: list[int], depth: int) -> Fraction:
    value = _operand(stack, used, depth)
    while stack[-1] in ("*", "/"):
        if stack.pop() == "*":
            value *= _operand(stack, used, depth)
        else:
            value /= _operand(stack, used, depth)
    return value


def _operand(stack: list[str], used: list[int], depth: int) -> Fraction:
    sign = 1
    while stack[-1] in ("+", "-"):
        sign = -sign if stack.pop() == "-" else sign
    token = stack.pop()
    if token == "(" and depth < MAX_DEPTH:
        value = _sum(stack, used, depth + 1)
        if stack.pop() != ")":
            raise _Invalid
        return sign * value
    if token.isdigit():
        used.append(int(token))
        return Fraction(sign * used[-1])
    raise _Invalid


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def parse_answer(text: str, need_tag: bool = False) -> str | None:
    """
    The answer in `text`: what stands in the last `<answer>…</answer>`, of which a `\\boxed{…}` is opened.

    Without tags it is the last box, or else all of `text`; None if that is blank or if `need_tag`. Never raises.
    """
    text = without_end_tokens(text)
    answer = last_answer(text)
    if answer is None and need_tag:
        return None
    inner = last_boxed(text if answer is None else answer)
    if inner is not None:
        return inner
    return text.strip() or None if answer is None else answer


def is_correct(answer: str | None, numbers: list[int], target: int) -> bool:
    """Does the expression use exactly `numbers`, each once, and equal `target`? Never raises."""
    result = None if answer is None else evaluate_expression(answer)
    return result is not None and result[0] == target and sorted(result[1]) == sorted(numbers)


def countdown_reward(completions: list, numbers: list[list[int]], target: list[int], **kwargs) -> list[float]:
    """
    1.0 for a right expression, 0.1 for another answer, 0.0 for none.

    In a conversation only what stands in `<answer>` tags is an answer; a plain string without tags is one itself,
    unless it is blank.
    """
    rewards = []
    for completion, given, value in zip(completions, numbers, target, strict=True):
        answer = parse_answer(completion_text(completion), need_tag=not isinstance(completion, str))
        rewards.append(1.0 if is_correct(answer, given, value) else 0.0 if answer is None else 0.1)
    return rewards


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`correct` of one completion; where the row's prompt is a conversation, an answer needs tags or a box."""
    answer = parse_answer(text, need_tag=True)
    if answer is None:
        answer = last_boxed(without_end_tokens(text))
    if answer is None and isinstance(row.get("prompt", ""), str):
        answer = parse_answer(text)
    return {"correct": is_correct(answer, row["numbers"], row["target"])}


def stored_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a stored output, whose `ground_truth` is [numbers, target]."""
    numbers, target = record["ground_truth"]
    return {"prompt": [{"role": "user", "content": record["question"]}], "numbers": numbers, "target": target}


TASK = Task(
    name="countdown",
    load=load,
    rewards={"countdown": countdown_reward, "d1_countdown": d1_countdown_reward},
    score=score,
    parsers={"d1": d1_score},
    stored_row=stored_row,
)
