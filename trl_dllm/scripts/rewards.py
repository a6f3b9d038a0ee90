"""Finding the rewards that a recipe names."""

from collections.abc import Callable
from difflib import get_close_matches

from trl_dllm.fields import imported
from trl_dllm.scripts.task_data import find_task
from trl_dllm.trainer.classifier import ClassifierReward


Reward = str | ClassifierReward | Callable[..., list[float]]  # the name of a reward model, or a function

# Rewards of open-r1's recipes, whose names stand in many of them, and what is written here instead.
_OPEN_R1 = {
    "accuracy": "TRL's accuracy_reward, or the task's own",
    "format": "TRL's think_format_reward, or a format of the task's",
    "code": "the reward `tests` of the tasks humaneval and mbpp",
    **dict.fromkeys(
        ["reasoning_steps", "cosine", "repetition_penalty", "length", "tag_count", "soft_overlong_punishment"],
        "a function of your own by its path: my_module.my_reward",
    ),
}


def resolve_rewards(
    task: str | None, names: list[str] | None, reward_model: str | None, label: str | None = None
) -> list[Reward]:
    """Reward functions by name: the task's, TRL's, or a dotted import path; the task's default if none is named.

    A reward model is TRL's own, by its name; with a `label`, the log-probability that it gives that label.

    Raises:
        ValueError: no reward, or a name that is none; it says what to write.
    """
    if label is not None and reward_model is None:
        raise ValueError(
            f"reward_model_label={label!r} without a reward model: name the classifier with reward_model_name_or_path."
        )
    models: list[Reward] = [] if not reward_model else [reward_model]
    rewards = models if label is None else [ClassifierReward(str(reward_model), label)]
    own = find_task(task).rewards if task else {}
    if names is None and not rewards and own:
        return [next(iter(own.values()))]
    rewards += [own[name] if name in own else _foreign_reward(name, task, list(own)) for name in names or []]
    if not rewards:
        raise ValueError(
            f"reward_funcs={names!r} names no reward. Name one of {', '.join(own) or 'trl.rewards'}, or a function by "
            "its path: my_module.my_reward."
        )
    return rewards


def _foreign_reward(name: str, task: str | None, own: list[str]) -> Reward:
    """A reward that is not the task's: a function of trl.rewards, or of the module that its path names."""
    import trl.rewards

    if "." in name:
        found = imported("reward_funcs", name)
    else:
        found = getattr(trl.rewards, name, None) if name in dir(trl.rewards) else None
    makes_one = "." not in name and name.startswith("get_")  # of parameters
    if callable(found) and not makes_one:
        return found
    if name in _OPEN_R1:
        raise ValueError(f"reward_funcs: {name!r} is open-r1's name; write {_OPEN_R1[name]}.")
    near = get_close_matches(name, [*own, *(known for known in dir(trl.rewards) if known.endswith("_reward"))], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"reward_funcs: {name!r} is neither a reward of task {task!r} ({', '.join(own) or 'none'}), nor a "
        f"function of trl.rewards, nor the path of one, such as my_module.my_reward{hint}."
    )
