"""MBPP: short Python functions from one sentence and three assertions, run in a sandbox."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from ..sandbox import CodeExecutionProvider, Trial, run_suites
from .base import Task, check_load_arguments, completion_text, without_end_tokens
from .data import choose, read_rows, to_dataset
from .programs import MAX_CODE, code_format_reward, extract_code, future_first, judged, with_execution


FILES = {"train": "mbpp/train.jsonl", "validation": "mbpp/validation.jsonl", "test": "mbpp/test.jsonl"}
HUB = {split: ("google-research-datasets/mbpp", "full", split) for split in FILES}

CHAT_PROMPT = (
    "{text}\n\nThese assertions have to hold:\n\n```python\n{tests}\n```\n\n"
    "You may reason first. Finish with the code alone, with the imports that it needs, in one ```python block."
)
TEXT_PROMPT = '"""\n{text}\n\n{tests}\n"""\n'


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    prompt_format: str = "chat",
    data_dir: str | None = None,
    allow_test_as_train: bool = False,
) -> Dataset:
    """
    Functions to write: 374 in "train", 90 in "validation", 500 in "test".

    Columns: `prompt`, `text` (the sentence), `test_list` (assertions), `test_setup` (source that they need first),
    and, if every row has a reference solution, `completion` (for SFT). From the Hub, or from `mbpp/train.jsonl` and
    so on in `data_dir` or TRL_DLLM_DATA. "train" is shuffled by `seed`.

    Raises `ValueError` for what does not exist; `allow_test_as_train` is explained at `data.read_rows`.
    """
    check_load_arguments(split, num_examples, prompt_format)
    rows = choose(read_rows("mbpp", split, FILES, HUB, data_dir, allow_test_as_train), split, num_examples, seed)
    columns = {
        "text": [row["text"] for row in rows],
        "test_list": [list(row["test_list"]) for row in rows],
        "test_setup": [row.get("test_setup_code") or "" for row in rows],
    }
    template = CHAT_PROMPT if prompt_format == "chat" else TEXT_PROMPT
    prompts = [
        template.format(text=text, tests="\n".join(tests))
        for text, tests in zip(columns["text"], columns["test_list"], strict=True)
    ]
    completions = None
    if all(row.get("code") for row in rows):
        completions = [row["code"].replace("\r\n", "\n") for row in rows]
        if prompt_format == "chat":
            completions = [f"```python\n{code.strip()}\n```" for code in completions]
    return to_dataset(prompts, completions, columns, prompt_format)


def build_trials(text: str, row: Mapping[str, Any]) -> list[Trial]:
    """One trial for each assertion, each with the whole of the completion's code; none for what is too long."""
    code = extract_code(text)
    if code is None:
        code = without_end_tokens(text)
    if len(code) > MAX_CODE:
        return []
    setup = row.get("test_setup") or ""
    program = f"{future_first(code)}\n\n{setup}\n\n"
    return [Trial(program, assertion, script=f"{program}{assertion}\n", setup=setup) for assertion in row["test_list"]]


def mbpp_reward(
    completions: list,
    test_list: list[list[str]],
    test_setup: list[str] | None = None,
    allow_code_execution: bool | None = None,
    provider: str | CodeExecutionProvider = "local",
    **kwargs,
) -> list[float]:
    """
    The fraction of the assertions that hold, each in a run of its own; one that never ends costs the others nothing.

    Runs generated programs: see `trl_dllm.sandbox`. Raises `PermissionError` unless `allow_code_execution` is true or
    TRL_DLLM_ALLOW_CODE_EXECUTION=1 is set, and `SandboxUnavailable` where the local provider has no sandbox. d1 has no
    such reward.
    """
    setups = [""] * len(completions) if test_setup is None else test_setup
    trials = [
        build_trials(completion_text(completion), {"test_list": tests, "test_setup": setup})
        for completion, tests, setup in zip(completions, test_list, setups, strict=True)
    ]
    return [suite.fraction for suite in run_suites(trials, allow_code_execution, provider)]


def make_reward(
    allow_code_execution: bool = True, provider: str | CodeExecutionProvider = "local"
) -> Callable[..., list[float]]:
    """`mbpp_reward` with execution allowed and the provider chosen, for a script's `reward_funcs`."""
    return with_execution("mbpp", mbpp_reward, allow_code_execution, provider)


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """
    `correct` (all assertions hold), `tests_passed` (their fraction), and how they were judged (see `programs.judged`);
    permissions and errors as the reward's.
    """
    (suite,) = run_suites([build_trials(text, row)], None, "local")
    return {"correct": suite.fraction == 1.0, "tests_passed": suite.fraction, **judged(suite)}


TASK = Task(name="mbpp", load=load, rewards={"tests": mbpp_reward, "code_format": code_format_reward}, score=score)
