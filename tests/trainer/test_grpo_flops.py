"""The log's `flops` against torch's own counter, over sampling, old and reference log-probs, and updates."""

import pytest
from helpers_flops import flop_counter
from helpers_grpo import build, losses, tiny

from trl_dllm import DiffusionGRPOTrainer


class MeasuredTrainer(DiffusionGRPOTrainer):
    """Notes what torch has counted when a generation batch is drawn and scored, which is when the log is written."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counter, self.measured = flop_counter(), []

    def _prepare_inputs(self, generation_batch):
        fresh = self._step % self._cycle == 0
        inputs = super()._prepare_inputs(generation_batch)
        if fresh:
            self.measured.append(self.counter.get_total_flops())
        return inputs


SETTINGS = {
    "step_merge": {"num_segments": 3, "num_iterations": 2, "beta": 0.04, "p_mask_prompt": 0.15},
    "checkpointed": {"num_segments": 3, "num_iterations": 2, "gradient_checkpointing": True},
    "sequence level": {"num_segments": 3, "importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.04},
    "one view": {"estimator": "mean_field", "num_iterations": 2},
    "any_order": {"estimator": "any_order", "decoding": "any_order", "cache": "exact", "num_iterations": 2},
    "elbo": {"estimator": "elbo", "estimator_kwargs": {"num_samples": 2}, "num_iterations": 2, "beta": 0.04},
    "full KL": {
        "estimator": "pkl_u",
        "estimator_kwargs": {"block_size": 3},
        "kl_estimator": "full",
        "beta": 0.04,
        "num_iterations": 2,
    },
}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_logs_flops_are_those_of_torchs_counter(tmp_path, name, peft):
    """Two generation batches: the second entry of the log has the updates on the first one behind it."""
    model, tokenizer = tiny(num_layers=2)
    settings = SETTINGS[name]
    cycle = settings.get("num_iterations", 1)
    trainer = build(
        tmp_path,
        MeasuredTrainer,
        model=model,
        tokenizer=tokenizer,
        peft=peft,
        max_steps=cycle + 1,
        gradient_accumulation_steps=2,
        **settings,
    )
    with trainer.counter:
        trainer.train()
    logged = losses(trainer, "flops")
    assert len(logged) == len(trainer.measured) == 2
    assert logged == pytest.approx(trainer.measured, rel=0.005)
