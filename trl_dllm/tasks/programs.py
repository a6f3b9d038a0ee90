"""What HumanEval and MBPP share: the code in a completion, and rewards that run it."""

import ast
import re
from collections.abc import Callable

from ..sandbox import CodeExecutionProvider, Suite
from .base import completion_text, last_answer, without_end_tokens


MAX_CODE = 50_000  # characters of a program; longer ones fail without being run


def extract_code(text: str) -> str | None:
    """
    The code that `text` presents: its last ``` block, in the last `<answer>…</answer>` if there is one.

    Without a block it is what stands in the tags; None without both. A block that never closes goes to the end of the
    text. Never raises.
    """
    text = without_end_tokens(text)
    answer = last_answer(text)
    inside = text if answer is None else answer
    pieces = inside.split("```")
    if len(pieces) > 1:
        # Odd pieces are blocks; the first line of one names its language.
        block = pieces[-1] if len(pieces) % 2 == 0 and len(pieces) == 2 else pieces[2 * ((len(pieces) - 1) // 2) - 1]
        language, newline, code = block.partition("\n")
        return code if newline and len(language.split()) <= 1 else block
    return None if answer is None else answer.strip("\n")


def defines(code: str, name: str) -> bool:
    """Does `code` have a definition of the function or class `name` that is not indented? Never raises."""
    return re.search(rf"^(?:async\s+def|def|class)\s+{re.escape(name)}\b", code, re.MULTILINE) is not None


def future_first(code: str) -> str:
    """`from __future__` lines have to come first, wherever a model put them."""
    lines = re.findall(r"^from __future__ import [^\n]*\n", code, re.MULTILINE)
    return "".join(lines) + re.sub(r"^from __future__ import [^\n]*\n", "", code, flags=re.MULTILINE)


def parses(code: str) -> bool:
    """Is it Python? Never raises."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def code_format_reward(completions: list, **kwargs) -> list[float]:
    """1.0 for Python in a ``` block (or in `<answer>` tags), 0.5 for a block of something else, 0.0 without one."""
    codes = [extract_code(completion_text(completion)) for completion in completions]
    return [
        0.0 if code is None or not code.strip() else 1.0 if len(code) <= MAX_CODE and parses(code) else 0.5
        for code in codes
    ]


def judged(suite: Suite) -> dict[str, int]:
    """
    Columns of a score: how many tests were judged outside the program's process, which no program can fool, and how
    many inside, where a program that sets out to can pass whatever it does. See `trl_dllm.sandbox`.
    """
    return {"judged_outside": suite.outside, "judged_inside": suite.inside}


def with_execution(
    name: str, reward: Callable[..., list[float]], allow_code_execution: bool, provider: str | CodeExecutionProvider
) -> Callable[..., list[float]]:
    """`reward` with execution allowed or not and the provider chosen, called `name` in TRL's logs."""

    def chosen(completions: list, **columns) -> list[float]:
        options = {"allow_code_execution": allow_code_execution, "provider": provider}
        return reward(completions, **{**columns, **options})

    chosen.__name__ = name
    return chosen
