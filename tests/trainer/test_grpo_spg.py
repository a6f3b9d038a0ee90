"""SPG on real TRL: which bound a row counts, without a ratio (docs/methods.md §2.9, §4.3)."""

from dataclasses import replace

import pytest
import torch
from helpers_distributed import save_short
from helpers_grpo import OneGraphTrainer, UpdateTrainer, as_rollout, build, config, losses, update
from test_grpo_padre import TEMPERATURE, flat, gradient, make_trainer, micro_batch

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.likelihood import Elbo, SandwichedBounds, token_logps


NO_RATIO = {"ratio_denominator": "current", "beta": 0.0}
SPG = {"estimator": "spg", "estimator_kwargs": {"block_length": 4, "p_mask_clean": 0.2}, **NO_RATIO}
BOUNDS = SandwichedBounds(3, eubo_beta=2.0, mix_weight=0.4, block_length=2, p_mask_clean=0.3)


@pytest.mark.parametrize("loss_type", ["bnpo", "dr_grpo"])
def test_the_gradient_is_that_of_either_bound_times_the_advantage(tmp_path, loss_type):
    """-Σ_r A_r ℓ_r, over the tokens of the micro-batch (the released code) or rows and canvas (the paper, /L)."""
    trainer = make_trainer(tmp_path, BOUNDS, loss_type=loss_type, **NO_RATIO)
    inputs = micro_batch(trainer)
    loss, found = gradient(trainer, inputs)
    rollout, advantages, mask = as_rollout(trainer, inputs), inputs["advantages"], inputs["completion_mask"]
    rows = {
        sign: token_logps(trainer.model, replace(rollout, advantages=sign * torch.ones(4)), BOUNDS, TEMPERATURE)
        for sign in (1, -1)
    }
    total, parameters = 0.0, [p for p in trainer.model.parameters() if p.requires_grad]
    for row, advantage in enumerate(advantages.tolist()):
        assert advantage != 0
        total = total - advantage * rows[1 if advantage > 0 else -1].logps[row].sum()
    number = mask.sum().item() if loss_type == "bnpo" else mask.numel()
    total = total / number
    assert loss == pytest.approx(-(advantages[:, None] * mask).sum().item() / number, rel=1e-9), "all ratios are 1"
    expected = flat(parameters, torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True))
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()

    lower = -(advantages[:, None] * rows[1].logps).sum() / number
    other = flat(parameters, torch.autograd.grad(lower, parameters, allow_unused=True))
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max(), "the lower bound's is another one"


@pytest.mark.parametrize("loss_type", ["bnpo", "luspo"])
def test_one_view_at_a_time_has_the_gradient_of_one_graph(tmp_path, loss_type):
    """Also with a bonus for entropy, which is summed over the views."""
    found = []
    for trainer_class in (DiffusionGRPOTrainer, OneGraphTrainer):
        trainer = make_trainer(
            tmp_path, BOUNDS, trainer_class=trainer_class, loss_type=loss_type, entropy_coef=0.1, **NO_RATIO
        )
        found.append(gradient(trainer, micro_batch(trainer)))
    (loss, segmented), (one_loss, one_graph) = found
    assert loss == pytest.approx(one_loss, rel=1e-6) and one_graph.abs().max() > 1e-3
    assert (segmented - one_graph).abs().max() < 1e-6 * one_graph.abs().max()


def test_an_update_is_the_plain_one(tmp_path):
    """Packed, compacted, without rows of equal rewards: against every view on every column, on one graph."""
    checkpoint = save_short(tmp_path / "checkpoint")
    settings = {**SPG, "loss_type": "bnpo", "p_mask_prompt": 0.15}
    ours = update(tmp_path / "a", checkpoint, **settings)
    plain = update(tmp_path / "b", checkpoint, plain=True, **settings)
    assert 0 < ours.scored_rows < 2 * plain.scored_rows, "a pass without gradients comes first, less what is skipped"
    assert ours.micro_losses == pytest.approx(plain.micro_losses, rel=1e-6, abs=1e-12) and len(ours.micro_losses) == 4
    for found, expected in zip(ours.gradients, plain.gradients, strict=True):
        largest = max(value.abs().max() for value in expected.values())
        assert largest > 1e-4 and max((found[name] - expected[name]).abs().max() for name in found) < 1e-6 * largest


def test_accumulation_changes_no_gradient(tmp_path):
    """Eight rows a micro-step, and two micro-steps of four: the same rows, masks and bounds."""
    found = []
    for rows in (8, 4):
        trainer = build(
            tmp_path / str(rows), UpdateTrainer, **SPG, loss_type="dr_grpo", max_steps=2, num_iterations=2,
            optim="sgd", max_grad_norm=1e9, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.gradients)
    assert [len(gradients) for gradients in found] == [2, 2]
    for whole, parts in zip(*found, strict=True):
        largest = max(value.abs().max() for value in whole.values())
        assert largest > 1e-4 and max((whole[name] - parts[name]).abs().max() for name in whole) < 2e-5 * largest


def test_no_policy_but_the_current_one_is_scored_and_each_iteration_has_its_draw(tmp_path):
    scored, draws = [], []

    class Noting(DiffusionGRPOTrainer):
        def _plan(self, rollout, draw, batch):
            draws.append(draw)
            return super()._plan(rollout, draw, batch)

        def _score_view(self, model, plan, number, *args, **kwargs):
            scored.append((torch.is_grad_enabled(), len(plan[number][1])))
            return super()._score_view(model, plan, number, *args, **kwargs)

    trainer = build(tmp_path, Noting, **SPG, num_iterations=3, max_steps=3)
    trainer.train()
    assert draws == [0, 0, 1, 1, 2, 2], "two micro-batches an iteration"
    assert sum(n for grad, n in scored if grad) == sum(n for grad, n in scored if not grad)
    assert "old_per_token_logps" not in trainer._buffered_inputs[0]
    assert losses(trainer, "clip_ratio/region_mean") == [0.0] * 3
    assert len(set(losses(trainer, "grad_norm"))) == 3


def test_without_a_ratio_elbos_are_the_ablation(tmp_path):
    """`ratio_denominator: current` is of any estimator: SPG without an upper bound is the ELBO's policy gradient."""
    trainer = make_trainer(tmp_path, Elbo(2), loss_type="bnpo", **NO_RATIO)
    inputs = micro_batch(trainer)
    _, found = gradient(trainer, inputs)
    logps = token_logps(trainer.model, as_rollout(trainer, inputs), Elbo(2), TEMPERATURE).logps
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    total = -(inputs["advantages"][:, None] * logps).sum() / inputs["completion_mask"].sum()
    expected = flat(parameters, torch.autograd.grad(total, parameters, allow_unused=True))
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio_denominator": "old"}, "ratio_denominator='old' with estimator=.spg..*Set ratio_denominator='curr"),
        ({"ratio_denominator": "ref"}, "ratio_denominator='ref' with estimator=.spg."),
        ({"beta": 0.04}, "beta=0.04 with estimator=.spg..*no KL to take of them. Set beta=0.0"),
        ({"beta": 0.04, "kl_estimator": "full"}, "beta=0.04 with estimator=.spg."),
        ({"loss_type": "wd1"}, "ratio_denominator='current' with loss_type='wd1'"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 with ratio_denominator='current'"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 chooses tokens"),
        ({"top_k": 4}, "top_k=4 with SandwichedBounds"),
        ({"estimator_kwargs": {"mix_weight": 2.0}}, "mix_weight=2.0 must be in"),
        ({"estimator_kwargs": {"beta": 2.0}}, "'spg' has no argument 'beta'"),
    ],
)
def test_what_does_not_go_with_two_bounds_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{**SPG, **settings})
