"""The processes of a launch: doing something once for all of them, and saying it once."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


T = TypeVar("T")


def process_state() -> PartialState:
    """This process among those of its launch.

    On a CPU accelerate joins the processes of a launch only if it is told that there is no GPU.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def on_main_process(compute: Callable[[], T]) -> T:
    """What `compute` returns, called on the first process alone. What it raises is raised on every process."""
    box: list = [None, None]
    if process_state().is_main_process:
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def say(text: str) -> None:
    """Print a line, on the first process alone."""
    process_state().print(text, flush=True)
