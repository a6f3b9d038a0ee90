"""The Countdown numbers game, generated from a seed: reach the target with + - * /, using every number exactly once.

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

from .base import Task, check_load_arguments, completion_text, last_answer


# What an answer may be at most: far more than any real one needs, and little enough that parsing takes microseconds.
MAX_LENGTH = 256
MAX_DEPTH = 32

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
    num_examples: int,
    seed: int = 0,
    num_numbers: int = 3,
    prompt_format: str = "text",
    max_number: int = 99,
    max_target: int = 99,
    data_dir: str | None = None,
) -> Dataset:
    """
    Different problems that have a solution: `num_numbers` numbers in 1..`max_number`, a target in 1..`max_target`.

    Columns: `prompt`, `numbers` (list of int), `target` (int), `completion` (for SFT: one right expression, of which
    there may be others). With `prompt_format="text"` the prompt is like "3,17,5:46=" and the completion like
    "3*17-5", in the characters 0-9 + - * / ( ) , : = only; with "chat" both are messages, and the expression stands
    in `<answer>` tags. A smaller `num_examples` gives the first rows of a larger one. `data_dir` is not used: nothing
    is read from disk.

    Raises `ValueError` for an unknown split or format, for impossible ranges, and where too few problems exist.
    """
    check_load_arguments(split, num_examples, prompt_format)
    if not 2 <= num_numbers <= 6:
        raise ValueError(f"num_numbers must be in 2..6, got {num_numbers}.")
    if max_number < 1 or max_target < 1:
        raise ValueError(f"max_number and max_target must be at least 1, got {max_number=} and {max_target=}.")
    rng = random.Random(f"countdown/{split}/{seed}")
    seen = set()
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
        if prompt_format == "text":
            prompt = f"{','.join(map(str, numbers))}:{target}="
            completion = expression
        else:
            content = CHAT_PROMPT.format(numbers=", ".join(map(str, numbers)), target=target)
            prompt = [{"role": "user", "content": content}]
            completion = [{"role": "assistant", "content": f"<answer>{expression}</answer>"}]
        rows["prompt"].append(prompt)
        rows["numbers"].append(numbers)
        rows["target"].append(target)
        rows["completion"].append(completion)
    return Dataset.from_dict(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: parsed by hand, since an answer is untrusted text


class _Invalid(Exception):
    pass


_TOKEN = re.compile(r"\s*(0|[1-9][0-9]*|[-+*/()=])")
_SYMBOLS = str.maketrans({"×": "*", "÷": "/", "−": "-"})


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """
    The exact value of an expression and the numbers in it, in order; None where it is not one.

    Integers, + - * / (also × ÷ −), signs and parentheses, and an "= value" after it, which has to be the right one.
    What has more than 256 characters or 32 nested parentheses is not an expression. Never raises.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    text = text.translate(_SYMBOLS)
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
    The answer in `text`: what stands in the last `<answer>…</answer>`.

    Without one it is all of `text`, or None if that is blank or if `need_tag`. Never raises.
    """
    answer = last_answer(text)
    if answer is None and not need_tag:
        answer = text.strip() or None
    return answer


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
    """`correct` of one completion; where the row's prompt is a conversation, only `<answer>` tags hold an answer."""
    answer = parse_answer(text, need_tag=not isinstance(row.get("prompt", ""), str))
    return {"correct": is_correct(answer, row["numbers"], row["target"])}


TASK = Task(name="countdown", load=load, rewards={"countdown": countdown_reward}, score=score)
