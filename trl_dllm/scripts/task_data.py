"""The arguments of a task's `load`, checked before anything is loaded."""

import inspect
import json
from argparse import ArgumentTypeError
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from trl_dllm.fields import check_kind
from trl_dllm.tasks import Task


# Arguments of `load` that have a place of their own.
_ELSEWHERE = {
    "split": "split",
    "num_examples": "num_train_examples, num_eval_examples or num_examples",
    "seed": "puzzle_seed or seed",
    "data_dir": "data_dir",
}


def json_mapping(text: str) -> dict[str, Any]:
    """A mapping that was given as JSON, as a type for argparse."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON, such as '{{\"min_blanks\": 6}}': {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} must be a mapping, such as '{{\"min_blanks\": 6}}'")
    return value


def check_data_dir(folder: str | None) -> None:
    """Raise ValueError for a folder that is not there, also for a task whose data are generated."""
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"data_dir={folder!r} is not a folder. Name the one with the task's data.")


def check_task_kwargs(task: Task, kwargs: Mapping[str, Any], field: str = "task_kwargs") -> None:
    """Raise ValueError for what a task's `load` does not take, takes from another field, or takes as another type.

    `field` is the setting that holds `kwargs`.
    """
    hints = get_type_hints(task.load)
    known = [name for name in inspect.signature(task.load).parameters if name not in _ELSEWHERE]
    for name, value in kwargs.items():
        if name in _ELSEWHERE:
            raise ValueError(f"{field}: {name}={value!r} has a field of its own: {_ELSEWHERE[name]}.")
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}."
            raise ValueError(f"{field}: task={task.name!r} has no argument {name!r}; {hint}")
        check_kind(f"{field}: {name}", value, hints[name])
