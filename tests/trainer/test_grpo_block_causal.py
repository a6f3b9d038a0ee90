"""GRPO and SFT on a block-causal model: every estimator that applies, and the sampler's own log-probs (identity 12 of
docs/methods.md §7)."""

import pytest
import torch
from helpers_grpo import CheckedTrainer, build, losses, moved, tiny, train_with_either_old_logps, weights

from trl_dllm.blocks import Blocks


SETTINGS = {"cache": "exact", "num_iterations": 2, "max_steps": 4, "beta": 0.04, "max_completion_length": 8}


def sdar():
    return tiny("sdar", num_layers=2)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "estimator",
    [
        {"estimator": "exact_trajectory"},
        {"estimator": "step_merge", "num_segments": 2, "stop_at_eos": True},
        {"estimator": "mean_field", "p_mask_prompt": 0.3},
        {"estimator": "pkl_u", "estimator_kwargs": {"block_size": 3, "num_views": "partition"}, "redraw_views": False},
        {"estimator": "elbo", "redraw_views": False},
    ],
    ids=lambda kwargs: kwargs["estimator"],
)
def test_gradients_are_those_of_trls_loss(tmp_path, estimator, peft):
    """Every micro-step equals TRL's loss on one graph through all views; prompts leave 2, 3 and 1 over blocks of 4."""
    model, tokenizer = sdar()
    trainer = build(tmp_path, CheckedTrainer, model, tokenizer, peft, **SETTINGS, **estimator)
    before = weights(trainer)
    trainer.train()
    assert len(trainer.gradient_errors) == 8 and max(trainer.gradient_errors) < 1e-4
    assert max(trainer.loss_errors) < 1e-5 and max(trainer.largest) > 0
    assert moved(before, trainer)


def test_old_log_probs_of_the_sampler_train_as_recomputed_ones_do(tmp_path):
    settings = {**SETTINGS, "steps_per_generation": 4, "estimator": "exact_trajectory"}
    rollout, recompute = train_with_either_old_logps(tmp_path, lambda: sdar(), **settings)
    assert 0 <= max(losses(rollout, "sampling/mismatch_max")) < 1e-4
    # 16 rows of eight positions, four steps, and two views (as many as a block has steps) of old, reference, updates.
    unit = 2 * rollout._parameters * 8 * 16
    assert losses(recompute, "flops_paper")[0] == unit * (4 + 2 + 2 + 2 * 2 * 3)


@pytest.mark.parametrize("alignment", ["position", "canvas"])
def test_cached_and_uncached_sampling_train_the_same_model(tmp_path, alignment):
    runs = []
    for cache in ("exact", None):
        model, tokenizer = sdar()
        model.config.block_alignment = alignment
        settings = {**SETTINGS, "cache": cache, "estimator": "exact_trajectory"}
        trainer = build(tmp_path, model=model, tokenizer=tokenizer, **settings)
        trainer.train()
        assert trainer.sampling.facts(trainer.spec)["blocks"] == Blocks(4, alignment)
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(value, weights(runs[1])[name], atol=1e-4, rtol=0, msg=name)


def test_a_canvas_that_grows_trains(tmp_path):
    model, tokenizer = tiny(num_layers=2)
    settings = {**SETTINGS, "cache": None, "future_blocks": "absent"}
    trainer = build(
        tmp_path, CheckedTrainer, model, tokenizer, estimator="exact_trajectory", old_logps="rollout", **settings
    )
    trainer.train()
    assert max(trainer.gradient_errors) < 1e-4 and max(trainer.loss_errors) < 1e-5
    assert 0 <= max(losses(trainer, "sampling/mismatch_max")) < 1e-4
