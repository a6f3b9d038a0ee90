"""AGRPO on real TRL: identity 6 of docs/methods.md §7 for steps of a trajectory."""

import itertools

import pytest
import torch
from helpers_grpo import OneGraphTrainer, as_rollout
from test_grpo_padre import CANVAS, KL, SEPARABLE, gradient, make_trainer, micro_batch, with_old_and_ref

import trl_dllm.likelihood.trajectory
import trl_dllm.trainer.loss
from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.likelihood import ExactTrajectory, SampledTrajectory


# Rows of 4, 2, 3 and 1 counted tokens in 3, 2, 2 and 1 steps, which reveal 1 or 2 of them; -1 was never revealed.
STEPS = torch.tensor([[3, 1, 1, 0], [1, 0, 1, -1], [2, 2, 0, 1], [0, 1, 2, 2]])


def batch(trainer):
    return {**micro_batch(trainer), "unmask_step": STEPS}


def every_draw(monkeypatch):
    """Yield once for each order of the steps, with the library made to draw it."""

    def ranks(order):
        return lambda keep, *_: (
            order.expand(keep.shape).masked_fill(~keep, 99).argsort(dim=1, stable=True).argsort(dim=1)
        )

    for order in itertools.permutations(range(CANVAS)):
        monkeypatch.setattr(trl_dllm.likelihood.trajectory, "random_ranks", ranks(torch.tensor(order)))
        yield


def mean_and_exact(monkeypatch, folder, estimator, **settings):
    """(relative error of the mean loss, of the mean gradient) of all draws, against the exact trajectory's."""
    trainer = make_trainer(folder, estimator, **settings)
    whole = with_old_and_ref(trainer, batch(trainer), ExactTrajectory())
    found = []
    for _ in every_draw(monkeypatch):
        rollout = as_rollout(trainer, whole)
        left_out = ~estimator.scored(rollout, rollout.view_seed, 0)[:, None]  # where no policy has a number
        others = {
            name: whole[name].masked_fill(left_out, 0)
            for name in ("old_per_token_logps", "ref_per_token_logps")
            if name in whole
        }
        found.append(gradient(trainer, {**whole, **others}))
    mean_loss = sum(loss for loss, _ in found) / len(found)
    gradients = torch.stack([g for _, g in found])
    trainer.estimator = ExactTrajectory()
    loss, expected = gradient(trainer, whole)
    scale = expected.abs().max().item()
    assert scale > 1e-6 and gradients.std(dim=0).max() > 1e-2 * scale, "the draws must differ"
    return abs(mean_loss - loss) / abs(loss), (gradients.mean(dim=0) - expected).abs().max().item() / scale


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", SEPARABLE)
def test_identity_6_the_mean_gradient_of_all_draws_of_steps_is_the_exact_trajectorys(
    monkeypatch, tmp_path, loss_type, kl
):
    settings = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    loss_error, error = mean_and_exact(
        monkeypatch, tmp_path, SampledTrajectory(2), loss_type=loss_type, **settings, **KL[kl]
    )
    assert error < 1e-5 and loss_error < 1e-5, (loss_error, error)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_identity_6_of_a_single_step(monkeypatch, tmp_path, loss_type):
    _, error = mean_and_exact(monkeypatch, tmp_path, SampledTrajectory(1), loss_type=loss_type)
    assert error < 1e-5


class ByTokens(SampledTrajectory):
    def sampling_weights(self, rollout, seeds, iteration):
        return None


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_identity_6_fails_if_steps_are_weighted_by_their_tokens(monkeypatch, tmp_path, loss_type):
    """The control: n / k is biased where steps reveal unequal numbers of tokens."""
    _, error = mean_and_exact(monkeypatch, tmp_path, ByTokens(1), loss_type=loss_type)
    assert error > 1e-2


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_identity_6_fails_if_the_rest_is_not_made_up_for(monkeypatch, tmp_path, loss_type):
    """The control: T / K alone changes the normalisers of these losses."""
    monkeypatch.setattr(
        trl_dllm.trainer.loss, "sub_sample_weights", lambda mask, scored, weights: mask * scored * weights
    )
    _, error = mean_and_exact(monkeypatch, tmp_path, SampledTrajectory(1), loss_type=loss_type)
    assert error > 1e-2


def test_one_step_at_a_time_has_the_gradient_of_one_graph(tmp_path):
    found = []
    for trainer_class in (DiffusionGRPOTrainer, OneGraphTrainer):
        trainer = make_trainer(tmp_path, SampledTrajectory(2), trainer_class=trainer_class, loss_type="grpo")
        found.append(gradient(trainer, with_old_and_ref(trainer, batch(trainer), SampledTrajectory(2))))
    (loss, segmented), (one_loss, one_graph) = found
    assert loss == pytest.approx(one_loss, rel=1e-6) and one_graph.abs().max() > 1e-6
    assert (segmented - one_graph).abs().max() < 1e-6 * one_graph.abs().max()
