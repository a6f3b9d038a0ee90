"""Rewards that ask for the trajectory get it; everyone else's rows and arguments are TRL's."""

import functools
import inspect

import pytest
import torch
from datasets import Dataset
from helpers_grpo import PROMPTS, build, losses

from trl_dllm.trainer.rewards import asks_for_trajectory, give_trajectory


class Asking:
    def __call__(self, completions, unmask_step, **kwargs):
        return [float(sum(steps)) for steps in unmask_step]


def asking(completions, unmask_step, **kwargs):
    return [float(sum(steps)) for steps in unmask_step]


async def asking_async(completions, unmask_step=None, **kwargs):
    return [float(sum(steps)) for steps in unmask_step]


def exact(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
    """All that TRL gives, and no **kwargs for more."""
    return [float(len(ids)) for ids in completion_ids]


def test_who_asks():
    assert asks_for_trajectory(asking) and asks_for_trajectory(asking_async) and asks_for_trajectory(Asking())
    assert asks_for_trajectory(functools.partial(asking, scale=2))
    for other in (exact, "a/model", torch.nn.Linear(1, 1), lambda completions, **kwargs: [], 3, dict):
        assert not asks_for_trajectory(other)
    rewards = ["a/model", exact, asking, asking_async, Asking()]
    given = give_trajectory(rewards, lambda: [[1, 2]])
    assert given[:2] == rewards[:2] and [f.__name__ for f in given[2:]] == ["asking", "asking_async", "Asking"]
    assert inspect.iscoroutinefunction(given[3]) and not inspect.iscoroutinefunction(given[2])
    assert given[2](completions=["x"]) == [3.0]
    assert given[2](completions=["x"], unmask_step=[[5]]) == [5.0], "a column of the dataset goes before it"


@pytest.mark.parametrize("reward", [asking, asking_async, Asking()], ids=["function", "coroutine", "object"])
def test_in_a_run_the_steps_are_the_rollouts(tmp_path, reward):
    trainer = build(tmp_path, reward_funcs=[reward, exact], max_steps=2)
    seen = []
    score = trainer._calculate_rewards

    def watching(inputs, *args):
        assert all("unmask_step" not in row for row in inputs)
        seen.append((trainer._rollout.unmask_step.sum(dim=1).tolist(), score(inputs, *args)))
        return seen[-1][1]

    trainer._calculate_rewards = watching
    trainer.train()
    for steps, rewards in seen:
        assert rewards[:, 0].tolist() == steps
    name = getattr(reward, "__name__", "Asking")
    assert f"rewards/{name}/mean" in trainer.state.log_history[0] and len(losses(trainer)) == 2


def test_a_column_of_that_name_stays_the_users(tmp_path):
    data = Dataset.from_dict({"prompt": PROMPTS * 8, "answer": PROMPTS * 8, "unmask_step": ["mine"] * 4 * 8})
    calls = []

    def reward(completions, unmask_step, **kwargs):
        calls.extend(unmask_step)
        return [0.0] * len(completions)

    build(tmp_path, reward_funcs=reward, data=data).train()
    assert set(calls) == {"mine"}
