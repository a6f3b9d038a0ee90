"""What reward functions return is one number a completion; anything else ends the run and says whose it was."""

import asyncio
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from helpers_grpo import build

from trl_dllm.trainer.reward_checks import check_rewards, checked_rewards


def lengths(completions, scale=1.0, **kwargs):
    return [scale * len(completion) for completion in completions]


async def lengths_later(completions, **kwargs):
    return lengths(completions)


class Words:
    def __call__(self, completions, **kwargs):
        return ["many" for _ in completions]


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 0.5, True, None, math.nan],
        (0.0, 1.0),
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0]),
        [torch.tensor(1.0), np.float32(2), np.array(3.0)],
    ],
    ids=str,
)
def test_numbers_of_every_kind_pass(rewards):
    found = check_rewards("reward", rewards)
    assert isinstance(found, list) and len(found) == len(rewards)


@pytest.mark.parametrize(
    ("rewards", "named"),
    [
        ([0.5, "1.0"], r"'1\.0' for row 1"),
        ([[0.5], [1.0]], r"\[0\.5\] for row 0"),
        ([torch.tensor([0.5])], r"tensor\(\[0\.5.*\]\) for row 0"),
        ([math.inf], "inf for row 0"),
        ([{"score": 1}], "{'score': 1} for row 0"),
        ([10**400], r"1(0*) for row 0"),
        ("0.5", r"'0\.5'\."),
        ({"a": 1.0}, r"{'a': 1\.0}\."),
        (0.5, r"0\.5\."),
        (None, r"None\."),
    ],
    ids=str,
)
def test_anything_else_is_refused_by_function_row_and_value(rewards, named):
    with pytest.raises(ValueError, match=rf"^reward function 'mine' returned {named}.*Return a list"):
        check_rewards("mine", rewards)


def test_a_run_ends_at_the_first_reward_that_is_no_number(tmp_path):
    def nested(completions, **kwargs):
        return [[1.0] for _ in completions]

    with pytest.raises(ValueError, match=r"reward function 'nested' returned \[1\.0\] for row 0"):
        build(tmp_path, reward_funcs=nested).train()
    with pytest.raises(ValueError, match="reward function 'Words' returned 'many' for row 0"):
        build(tmp_path, reward_funcs=[lengths, Words()]).train()


def test_rewards_keep_their_names_their_arguments_and_their_kind():
    half = functools.partial(lengths, scale=0.5)
    checked = checked_rewards([lengths, lengths_later, half, Words(), "some/reward-model"], [1.0] * 5)
    assert [reward.__name__ for reward in checked[:4]] == ["lengths", "lengths_later", "lengths", "Words"]
    assert inspect.signature(checked[0]) == inspect.signature(lengths)
    assert checked[2](completions=["ab"]) == [1.0] and checked[4] == "some/reward-model"
    assert [inspect.iscoroutinefunction(reward) for reward in checked[:3]] == [False, True, False]
    assert asyncio.run(checked[1](completions=["ab"])) == [2.0]
    model = torch.nn.Linear(1, 1)
    assert checked_rewards(model, None) == [model]


@pytest.mark.parametrize("none", [None, [], [None]])
def test_no_reward_is_refused_before_weights_load(tmp_path, none):
    with pytest.raises(ValueError, match="GRPO needs at least one reward function"):
        build(tmp_path, reward_funcs=none)


def test_another_number_of_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reward_weights=\[1\.0, 2\.0\] must have one number for each of 1"):
        build(tmp_path, reward_funcs=lengths, reward_weights=[1.0, 2.0])
