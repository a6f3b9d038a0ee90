"""HumanEval: functions to complete from their docstring, checked by running their tests. See `trl_dllm.sandbox`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from ..sandbox import CodeExecutionProvider, Trial, run_suites
from .base import Task, check_load_arguments, completion_text, without_end_tokens
from .data import choose, read_rows, to_dataset
from .programs import MAX_CODE, code_format_reward, defines, extract_code, future_first, judged, with_execution


FILES = {"test": "humaneval/HumanEval.jsonl"}
HUB = {"test": ("openai/openai_humaneval", None, "test")}

CHAT_PROMPT = (
    "Complete this Python function.\n\n```python\n{code}\n```\n\n"
    "You may reason first. Finish with the whole function, with the imports that it needs, in one ```python block."
)

# Where a plain continuation of the prompt stops being the function.
_STOP = re.compile(r"\n(?:class |def |async def |@|#|if |print\(|```)|<answer>|</answer>")


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    prompt_format: str = "chat",
    data_dir: str | None = None,
    allow_test_as_train: bool = False,
) -> Dataset:
    """
    164 functions, all of them in "test".

    Columns: `prompt`, `code_prompt` (imports, signature and docstring), `test` (source that defines `check`),
    `entry_point`, `task_id`, `completion` (for SFT: the reference solution; the body alone with
    `prompt_format="text"`). From the Hub, or from `humaneval/HumanEval.jsonl(.gz)` in `data_dir` or TRL_DLLM_DATA.

    Raises `ValueError` for other splits; `allow_test_as_train` is explained at `data.read_rows`. To train on code,
    take the task "mbpp".
    """
    check_load_arguments(split, num_examples, prompt_format)
    rows = choose(read_rows("humaneval", split, FILES, HUB, data_dir, allow_test_as_train), split, num_examples, seed)
    columns = {name: [row[name] for row in rows] for name in ("task_id", "test", "entry_point")}
    columns["code_prompt"] = [row["prompt"] for row in rows]
    bodies = [row["canonical_solution"] for row in rows]
    if prompt_format == "chat":
        prompts = [CHAT_PROMPT.format(code=code.rstrip()) for code in columns["code_prompt"]]
        completions = [
            f"```python\n{(code + body).strip()}\n```"
            for code, body in zip(columns["code_prompt"], bodies, strict=True)
        ]
    else:
        prompts, completions = columns["code_prompt"], bodies
    return to_dataset(prompts, completions, columns, prompt_format)


# ---------------------------------------------------------------------------------------------------------------------
# From a completion to a trial


def build_trials(text: str, row: Mapping[str, Any]) -> list[Trial]:
    """
    The trial that says whether a completion is right: its function, the tests, and the call of `check`.

    Code that defines the function is put behind the prompt, whose imports and helpers the tests may use; other code
    continues the prompt as a body. No trial for what is too long.
    """
    code = extract_code(text)
    if code is None:
        code = without_end_tokens(text)
        if not defines(code, row["entry_point"]):
            code = _STOP.split(code, maxsplit=1)[0]
    if len(code) > MAX_CODE:
        return []
    # Behind the prompt, whose function thereby gets an empty body, a new definition takes the old one's place.
    setup = f"{row['code_prompt']}\n    pass\n"
    program = future_first(f"{setup}\n{code}" if defines(code, row["entry_point"]) else row["code_prompt"] + code)
    test = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return [Trial(program, test, script=f"{program}\n\n{test}", setup=setup, entry_point=row["entry_point"])]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def humaneval_reward(
    completions: list,
    code_prompt: list[str],
    test: list[str],
    entry_point: list[str],
    allow_code_execution: bool | None = None,
    provider: str | CodeExecutionProvider = "local",
    **kwargs,
) -> list[float]:
    """
    1.0 where the function passes its tests, else 0.0. Runs generated programs: see `trl_dllm.sandbox`.

    Raises `PermissionError` unless `allow_code_execution` is true or TRL_DLLM_ALLOW_CODE_EXECUTION=1 is set, and
    `SandboxUnavailable` where the local provider has no sandbox. d1 has no such reward.
    """
    trials = [
        build_trials(completion_text(completion), {"code_prompt": prompt, "test": check, "entry_point": name})
        for completion, prompt, check, name in zip(completions, code_prompt, test, entry_point, strict=True)
    ]
    return [suite.fraction for suite in run_suites(trials, allow_code_execution, provider)]


def make_reward(
    allow_code_execution: bool = True, provider: str | CodeExecutionProvider = "local"
) -> Callable[..., list[float]]:
    """`humaneval_reward` with execution allowed and the provider chosen, for a script's `reward_funcs`."""
    return with_execution("humaneval", humaneval_reward, allow_code_execution, provider)


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """
    `correct` of one completion, and how its test was judged (see `programs.judged`); permissions and errors as the
    reward's.
    """
    (suite,) = run_suites([build_trials(text, row)], None, "local")
    return {"correct": suite.passed == 1, **judged(suite)}


TASK = Task(
    name="humaneval",
    load=load,
    rewards={"tests": humaneval_reward, "code_format": code_format_reward},
    score=score,
)
