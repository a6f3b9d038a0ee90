"""Reward functions that are watched: what they return is one number a completion, or an error that says so."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def checked_rewards(reward_funcs: Any, weights: Sequence[float] | None) -> list:
    """A trainer's `reward_funcs` as a list, in which functions check what they return; reward models stay.

    Raises:
        ValueError: no reward function, or another number of weights.
    """
    rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not rewards or None in rewards:
        raise ValueError(f"reward_funcs={reward_funcs!r}: GRPO needs at least one reward function or reward model.")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(f"reward_weights={weights!r} must have one number for each of {len(rewards)} reward_funcs.")
    return [reward if isinstance(reward, str | nn.Module) else _checked(reward) for reward in rewards]


def _checked(reward: Callable[..., Any]) -> Callable[..., Any]:
    inner: Any = reward
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)  # as TRL calls it in its logs

    def checked(*args, **kwargs):
        return check_rewards(name, reward(*args, **kwargs))

    async def checked_async(*args, **kwargs):
        return check_rewards(name, await reward(*args, **kwargs))

    asynchronous = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)
    function = functools.wraps(reward)(checked_async if asynchronous else checked)
    function.__name__ = name
    return function


def check_rewards(name: str, rewards: Any) -> list:
    """What the reward function called `name` returned, as a list.

    Raises:
        ValueError: anything but one number a completion. None and NaN are TRL's words for "does not apply".
    """
    right = "Return a list with one finite number, or None, for each completion."
    if isinstance(rewards, str | Mapping) or not hasattr(rewards, "__iter__"):
        raise ValueError(f"reward function {name!r} returned {rewards!r}. {right}")
    rewards = list(rewards)
    for row, value in enumerate(rewards):
        if not _is_number(value):
            raise ValueError(f"reward function {name!r} returned {value!r} for row {row} of its batch. {right}")
    return rewards


def _is_number(value: Any) -> bool:
    """Whether a reward is a number, of Python, numpy or torch, or None; a string or a list of one is none."""
    if value is None:
        return True
    if isinstance(value, str | bytes) or getattr(value, "ndim", None):
        return False
    try:
        return not math.isinf(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
