"""GRPO on any-order decoding: the exact estimator, its baselines, and the sampler's log-probs as the old policy's."""

import pytest
import torch
from helpers_grpo import CheckedTrainer, build, losses, moved, tiny, train_with_either_old_logps, weights


SETTINGS = {"decoding": "any_order", "cache": "exact", "num_iterations": 2, "max_steps": 4, "beta": 0.04}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "estimator",
    [
        {"estimator": "any_order"},
        {"estimator": "pkl_t"},
        {"estimator": "mean_field"},
        {"estimator": "step_merge", "num_segments": 2},
    ],
    ids=lambda kwargs: kwargs["estimator"],
)
def test_gradients_are_those_of_trls_loss(tmp_path, estimator, peft):
    """Every micro-step of rollouts drawn any-order equals TRL's loss on one graph through all views."""
    model, tokenizer = tiny(num_layers=2)
    trainer = build(tmp_path, CheckedTrainer, model, tokenizer, peft, **SETTINGS, **estimator)
    before = weights(trainer)
    trainer.train()
    assert len(trainer.gradient_errors) == 8 and max(trainer.gradient_errors) < 1e-4
    assert max(trainer.loss_errors) < 1e-5 and max(trainer.largest) > 0
    assert moved(before, trainer)


def test_old_log_probs_of_the_sampler_train_as_recomputed_ones_do(tmp_path):
    """Equal to rounding; rows that come after the first update need not be scored first. The mismatch is logged."""
    settings = {**SETTINGS, "steps_per_generation": 4, "estimator": "any_order"}
    rollout, recompute = train_with_either_old_logps(tmp_path, lambda: tiny(num_layers=2), **settings)
    assert losses(rollout, "flops")[-1] < losses(recompute, "flops")[-1]
    assert 0 <= max(losses(rollout, "sampling/mismatch_max")) < 1e-4
    assert not losses(recompute, "sampling/mismatch_max")


def test_cached_and_uncached_sampling_train_the_same_model(tmp_path):
    runs = []
    for cache in ("exact", None):
        model, tokenizer = tiny(num_layers=2)
        trainer = build(
            tmp_path, model=model, tokenizer=tokenizer, estimator="any_order", **{**SETTINGS, "cache": cache}
        )
        trainer.train()
        runs.append(trainer)
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(value, weights(runs[1])[name], atol=1e-4, rtol=0, msg=name)
    assert losses(runs[0], "reward") == pytest.approx(losses(runs[1], "reward"), abs=1e-6)
