"""Benchmarks as TRL wants them: a dataset, reward functions and a score for evaluation, one file a task.

A new task is a new module with a module-level `TASK` and its name in the tuple below.
"""

import difflib

from . import countdown, gsm8k, humaneval, math500, mbpp, reviews, sudoku
from .base import Task


__all__ = ["TASKS", "Task", "get_task"]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (countdown, gsm8k, humaneval, math500, mbpp, reviews, sudoku)
}


def get_task(name: str) -> Task:
    """
    The task called `name`.

    Raises `ValueError`, naming the nearest known task, where there is none of that name.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown task {name!r}: did you mean {nearest!r}? Known tasks: {', '.join(sorted(TASKS))}.")
