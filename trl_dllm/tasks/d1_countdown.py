"""d1's reward and evaluation parser for Countdown, quirks included."""

import ast
import re
import warnings
from collections.abc import Mapping
from typing import Any

from .base import completion_text
from .d1_format import d1_boxed, d1_first_tag, d1_last_tag


class _Invalid(Exception):
    pass


_D1_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_D1_BITS = 4096  # of an intermediate power; d1 runs until it has any power, however large
D1_MAX_LENGTH = 10_000  # what is longer is wrong, as everything is that Python's parser gives up on


def _d1_value(text: str) -> int | float | None:
    """
    The value that Python's `eval` gives an expression of digits, + - * / ( ) . and white space; None where it fails.

    So `2**3` and `7//2` are allowed, and `1.5` is a float. Computed from the syntax tree, never by `eval`.
    """
    if len(text) > D1_MAX_LENGTH or _D1_ALLOWED.fullmatch(text) is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "2(3)" parses, with one
            tree = ast.parse(text.lstrip(" \t"), mode="eval")
        return _python_value(tree.body)
    except (_Invalid, ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _python_value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise _Invalid
    left, right = _python_value(node.left), _python_value(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    if isinstance(node.op, ast.Div):
        return left / right
    if isinstance(node.op, ast.FloorDiv):
        return left // right
    if isinstance(node.op, ast.Pow):
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _D1_BITS:
            raise _Invalid
        power = left**right
        if isinstance(power, complex):
            raise _Invalid
        return power
    raise _Invalid


def _d1_same_numbers(text: str, numbers: list[int]) -> bool:
    try:
        return sorted(int(run) for run in re.findall(r"\d+", text)) == sorted(numbers)
    except ValueError:  # thousands of digits
        return False


def d1_countdown_reward(completions: list, numbers: list[list[int]], target: list[int], **kwargs) -> list[float]:
    """
    d1's reward: 1.0 for a right expression in the last `<answer>`, 0.1 for any other answer there, 0.0 without one.

    What Python evaluates to within 1e-5 of the target is right, so `**`, `//` and decimals count, and "= 24" behind
    the expression, LaTeX and × do not. The digits of "1.5" are the numbers 1 and 5. The default differs in all of
    these; it is exact, and takes an "=" with the right value. (Where d1 would compute a power of more than about 4,000
    bits, or read more than 10,000 characters, this gives 0.1.)
    """
    rewards = []
    for completion, given, value in zip(completions, numbers, target, strict=True):
        answer = d1_last_tag(completion_text(completion))
        if answer is None:
            rewards.append(0.0)
            continue
        found = _d1_value(answer) if _d1_same_numbers(answer, given) else None
        rewards.append(1.0 if found is not None and _near(found, value) else 0.1)
    return rewards


def _near(found: int | float, target: int) -> bool:
    try:
        return abs(found - target) < 1e-5
    except OverflowError:
        return False


def d1_parse_answer(text: str) -> str:
    """
    The expression that d1's evaluation reads; never raises.

    The last `\\boxed{…}`, without any box the whole text, tags and all (see `d1_boxed`); where the box never closes
    the first `<answer>…</answer>`, and without one the whole text. Then LaTeX's times, cdot and div become operators,
    and of the first equation with a number on its right only the left side is kept.
    """
    boxed = d1_boxed(text)
    if boxed is None:
        tag = d1_first_tag(text)
        boxed = text if tag is None else tag
    for name, symbol in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
        boxed = boxed.replace(name, symbol)
    sides = _d1_equation(boxed)
    return boxed if sides is None else sides


def _d1_equation(text: str) -> str | None:
    """The left side of the first "expression = number"; each "=" is looked at once, so this is linear."""
    for equals in re.finditer("=[0-9. ]", text):
        start = equals.start()
        while start > 0 and text[start - 1] in "0123456789+-*/() ":
            start -= 1
        if start < equals.start():
            return text[start : equals.start()].strip()
    return None


def d1_score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`score` by d1's parser: Python's value of `d1_parse_answer`, in floating point and within 1e-5."""
    answer = d1_parse_answer(text)
    found = _d1_value(answer.strip()) if _d1_same_numbers(answer, row["numbers"]) else None
    return {"correct": found is not None and _near(found, row["target"])}
