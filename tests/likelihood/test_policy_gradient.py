"""docs/methods.md §7: identity 9. The plain-sum loss has the expected reward's gradient (d2, Theorem 3.1)."""

import itertools
import math

import pytest
import torch
from oracles import enumerate_trajectories, probabilities, random_table, trajectories_rollout

from trl_dllm.likelihood import ExactTrajectory, MeanField, StepMerge, token_logps
from trl_dllm.rollout import count_until_eos


VALUE_INDEPENDENT = ["random", "left_to_right", "margin", "entropy"]

EOS = 0


def reward(tokens) -> float:
    """Of the completion up to its first EOS, as reward functions see it."""
    cut = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
    return 0.3 * len(cut) ** 2 + sum((i + 1) * t * 0.7 for i, t in enumerate(cut)) % 2.1


def dr_grpo_as_plain_sum(logps, advantages, mask, probability):
    """TRL's dr_grpo before its division by a constant: −Σ_i p_i A_i Σ_l ratio_il, old policy = current policy."""
    ratio = (logps - logps.detach()).exp()
    return -(probability * advantages * (ratio * mask).sum(dim=1)).sum()


def gradients(model, remasking, schedule, advantages_of, mask_of, temperature=0.7, weight_of=None):
    """(library's expected gradient, enumerated gradient of the expected reward), flat."""
    trajectories = enumerate_trajectories(model, remasking, schedule, temperature=temperature)
    rewards = torch.tensor([reward(list(t.tokens)) for t in trajectories], dtype=torch.float64)
    probability = torch.stack([t.order_prob * t.log_prob.exp() for t in trajectories])
    (true,) = torch.autograd.grad((probability * rewards).sum(), model.table)
    rollout = trajectories_rollout(model, trajectories, temperature=temperature)
    p = probability.detach()
    mask = mask_of(rollout).double()
    if weight_of is not None:
        mask = mask * weight_of(mask)[:, None]
    scores = token_logps(model, rollout, ExactTrajectory())
    loss = dr_grpo_as_plain_sum(scores.logps, advantages_of(rewards, p), mask, p)
    (got,) = torch.autograd.grad(-loss, model.table)
    return got.flatten(), true.flatten()


def raw(rewards, p):
    return rewards


def leave_one_out(rewards, p):
    """G = 2: A_1 = r_1 − r_2, its expectation over an independent second completion, pair by pair."""
    return ((rewards[:, None] - rewards[None, :]) * p[None, :]).sum(dim=1)


def leave_one_out_of_three(rewards, p):
    pair = p[:, None] * p[None, :]
    others = (rewards[:, None] + rewards[None, :]) / 2
    return torch.stack([((r - others) * pair).sum() for r in rewards])


def group_mean(rewards, p, group):
    """A_1 = r_1 − mean of the group, over all (G−1)-tuples of the others."""
    total = torch.zeros_like(rewards)
    for others in itertools.product(range(len(p)), repeat=group - 1):
        chance = math.prod(p[j].item() for j in others)
        total += chance * (rewards - (rewards + sum(rewards[j] for j in others)) / group)
    return total


def canvas_mask(rollout):
    return torch.ones_like(rollout.counted)


def eos_mask(rollout):
    return count_until_eos(rollout.completion_ids, rollout.unmask_step, (EOS,))


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("schedule", [[1, 1, 1], [2, 1], [3]], ids=str)
@pytest.mark.parametrize("remasking", VALUE_INDEPENDENT)
def test_identity_9_expected_gradient_is_that_of_the_expected_reward(remasking, schedule):
    """Theorem 3.1: whole canvas, raw rewards, plain sum, any tokens a step, every value-independent order."""
    got, want = gradients(random_table(3, 4, seed=2), remasking, schedule, raw, canvas_mask)
    assert want.norm() > 0.1
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("advantages", [leave_one_out, leave_one_out_of_three])
def test_identity_9_leave_one_out(advantages):
    got, want = gradients(random_table(3, 3, seed=2), "random", [2, 1], advantages, canvas_mask)
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("group", [2, 3])
def test_identity_9_group_mean_gives_exactly_g_minus_1_over_g(group):
    got, want = gradients(
        random_table(3, 3, seed=2), "left_to_right", [2, 1], lambda r, p: group_mean(r, p, group), canvas_mask
    )
    assert relative_error(got, want * (group - 1) / group) < 1e-10


def test_identity_9_with_the_eos_cut_holds_only_left_to_right():
    """Tokens behind the EOS earn nothing left to right; in another order they were context of what came later."""
    model = random_table(3, 4, seed=2)
    for schedule in ([1, 1, 1], [2, 1]):
        got, want = gradients(model, "left_to_right", schedule, raw, eos_mask)
        assert relative_error(got, want) < 1e-10
    for remasking, seed in (("random", 2), ("margin", 7), ("entropy", 7)):
        got, want = gradients(random_table(3, 4, seed), remasking, [1, 1, 1], raw, eos_mask)
        assert relative_error(got, want) > 0.02, remasking


def test_identity_9_is_broken_by_one_over_length():
    """A factor 1/length of each completion is no plain sum, left to right either."""
    got, want = gradients(
        random_table(3, 4, seed=2), "left_to_right", [1, 1, 1], raw, eos_mask, weight_of=lambda m: 1 / m.sum(dim=1)
    )
    scale = (got @ want) / (got @ got)
    assert relative_error(scale * got, want) > 0.02


def test_identity_9_is_broken_by_another_scoring_temperature_or_fewer_cuts():
    """A token is scored under the distribution that it was drawn from."""
    model = random_table(3, 4, seed=2)
    trajectories = enumerate_trajectories(model, "random", [1, 1, 1], temperature=0.7)
    p = probabilities(trajectories)
    rewards = torch.tensor([reward(list(t.tokens)) for t in trajectories], dtype=torch.float64)
    rollout = trajectories_rollout(model, trajectories, temperature=0.7)
    mask = canvas_mask(rollout).double()

    def gradient(estimator, temperature):
        scores = token_logps(model, rollout, estimator, temperature=temperature)
        (out,) = torch.autograd.grad(-dr_grpo_as_plain_sum(scores.logps, rewards, mask, p), model.table)
        return out.flatten()

    want = gradient(ExactTrajectory(), None)
    assert relative_error(gradient(StepMerge(3), 0.7), want) < 1e-10
    assert relative_error(gradient(ExactTrajectory(), 1.0), want) > 0.02
    assert relative_error(gradient(MeanField(), 0.7), want) > 0.02
