"""Rewards that ask for the trajectory: a reward function with a parameter `unmask_step` is given it.

    def early_answers(completions, unmask_step, **kwargs): ...

`unmask_step` holds the decoding step that revealed each position of a completion's canvas, -1 for never: one list of L
a completion. A dataset column of that name goes before it, and functions that do not ask get what TRL gives them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


PARAMETER = "unmask_step"


def asks_for_trajectory(reward: Any) -> bool:
    """Whether a reward is a function with a parameter of that name (and no model, or a model's name)."""
    if isinstance(reward, str | nn.Module) or not callable(reward):
        return False
    try:
        return PARAMETER in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False


def give_trajectory(reward_funcs, trajectory: Callable[[], list[list[int]]]):
    """The rewards as TRL takes them, one or a list; those that ask are called with what `trajectory()` returns."""
    if isinstance(reward_funcs, list):
        return [give_trajectory(reward, trajectory) for reward in reward_funcs]
    return _asked(reward_funcs, trajectory) if asks_for_trajectory(reward_funcs) else reward_funcs


def _asked(reward, trajectory):
    def arguments(kwargs: dict) -> dict:
        return kwargs if PARAMETER in kwargs else {**kwargs, PARAMETER: trajectory()}

    def call(*args, **kwargs):
        return reward(*args, **arguments(kwargs))

    async def wait(*args, **kwargs):
        return await reward(*args, **arguments(kwargs))

    # TRL awaits what `inspect.iscoroutinefunction` knows as such.
    wrapped: Any = wait if inspect.iscoroutinefunction(reward) else call
    if not hasattr(reward, "__name__"):  # an object with __call__, or a partial: TRL logs a reward under its name
        wrapped.__name__ = getattr(getattr(reward, "func", None), "__name__", type(reward).__name__)
        return wrapped
    return functools.wraps(reward)(wrapped)
