"""NaN and infinity end a run with the step, the rows and what to do, and reach no weight."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers_grpo import build, lora, losses, reward, text_prompts, tiny, weights
from test_sft_trainer import dataset
from test_sft_trainer import trainer as build_sft

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.trainer import grpo_trainer, sft_trainer
from trl_dllm.trainer.finite import check_gradient


class BrokenTrainer(DiffusionGRPOTrainer):
    """From micro-step `broken_at` on, `spoil` changes what is scored of the first row for the loss."""

    broken_at = 0

    def _compute_loss(self, model, inputs):
        self._for_the_loss = self._step >= self.broken_at
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._for_the_loss = False

    def _score_view(self, model, plan, *args, **kwargs):
        scores = super()._score_view(model, plan, *args, **kwargs)
        first = torch.arange(len(plan.rollout))[:, None] == 0
        return scores.map(lambda table: self.spoil(table, first)) if self._for_the_loss else scores

    _for_the_loss, spoil = False, None


def stopped(trainer, message: str) -> None:
    """The run ends with this message, its weights where the last finite step left them."""
    seen = []
    step = trainer.training_step

    def stepping(*args, **kwargs):
        seen.append(weights(trainer))
        return step(*args, **kwargs)

    trainer.training_step = stepping
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert seen and all(torch.equal(value, weights(trainer)[name]) for name, value in seen[-1].items())
    assert all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "mean_field"},
        {"num_segments": 3},
        {"num_segments": 3, "importance_sampling_level": "sequence"},  # a first pass without gradients
        {"num_segments": 3, "loss_type": "grpo", "peft": True, "gradient_checkpointing": True},
        {"estimator": "pkl_u", "estimator_kwargs": {"block_size": 3}, "beta": 0.04, "kl_estimator": "full"},
    ],
    ids=["one view", "views", "two passes", "lora", "full KL"],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_log_probs_that_are_not_finite_end_the_run(tmp_path, settings, value):
    """In the second micro-batch of the second step: in the weights, the log said `loss: 0.0` and the run went on."""
    model, tokenizer = tiny()
    trainer = build(tmp_path, BrokenTrainer, model=model, tokenizer=tokenizer, max_steps=3, **settings)
    trainer.spoil = lambda table, row: table.masked_fill(row, value)
    trainer.broken_at = 3
    stopped(
        trainer, r"^Step 2: the loss is not finite, in row 0 \('.+'\): log_probs(, kl)?\. Go on from the last check"
    )
    assert len(losses(trainer)) == 1


@pytest.mark.parametrize("name", ["old_per_token_logps", "ref_per_token_logps"])
def test_the_message_says_which_policys_log_probs_they_are(tmp_path, monkeypatch, name):
    trainer = build(tmp_path, beta=0.04, num_iterations=2, steps_per_generation=4, max_steps=4)
    score = grpo_trainer.add_logps

    def scoring(trainer, batches):
        score(trainer, batches)
        batches[2][name][1] = torch.nan

    monkeypatch.setattr(grpo_trainer, "add_logps", scoring)
    stopped(trainer, rf"^Step 2: the loss is not finite, in row 1 \('.+'\): {name}\. Go on")


def test_an_infinite_reward_is_said_to_be_one(tmp_path):
    def broken(completions, **kwargs):
        return [math.inf, *reward(completions)[1:]]

    trainer = build(tmp_path, reward_funcs=broken, scale_rewards="none")
    with pytest.raises(ValueError, match=r"^reward function 'broken' returned inf for row 0 of its batch\."):
        trainer.train()


def test_a_loss_that_overflows_names_all_of_its_rows(tmp_path):
    """Every part of it is finite; exp(1000) is not."""
    trainer = build(tmp_path, BrokenTrainer, beta=0.04, estimator="mean_field")
    trainer.spoil = lambda table, row: table - 1000 * row
    stopped(
        trainer, r"^Step 1: the loss is not finite, in row 0 .*row 3 .*Each row's|All that it is made of is finite"
    )


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, max_grad_norm):
    """Where the norm is NaN, clipping makes every gradient NaN, silently."""
    trainer = build(tmp_path, max_steps=3, num_segments=2, max_grad_norm=max_grad_norm, per_device_train_batch_size=8)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step == 1 else 1))
    stopped(
        trainer, r"^Step 2: the gradient is not finite \(norm nan\), though the loss is, in row 0 \('.*and \d+ more"
    )
    assert len(losses(trainer)) == 1


def test_the_sampler_says_for_which_prompt_its_logits_are_not_finite(tmp_path):
    """A weight of one token is broken, and one prompt has that token. NaN was drawn as the last of the vocabulary."""
    model, tokenizer = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("r")["input_ids"][-1]] = torch.nan
    trainer = build(tmp_path, model=model, tokenizer=tokenizer, max_steps=9)
    row = r"row \d \('a rather longer prompt'\)"
    expected = rf"^Step \d: the model's logits are not finite while it decodes, in {row}(; {row}){{3}}\. Go on"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()


def test_evaluation_says_that_it_is_one(tmp_path):
    model, tokenizer = tiny()
    trainer = build(tmp_path, model=model, tokenizer=tokenizer, eval_dataset=text_prompts(1))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^Evaluation after step 0: the model's logits"):
        trainer.evaluate()


@pytest.mark.parametrize("scale, ends", [(65536.0, False), (2.0, False), (1.0, True)])
def test_a_step_that_the_loss_scaler_skips_is_none_to_end_a_run(tmp_path, scale, ends):
    """In float16 an overflow is how a scaler finds its scale; at a scale of 1 it is the gradient itself."""
    trainer = build(tmp_path)
    trainer.accelerator = SimpleNamespace(
        mixed_precision="fp16", scaler=SimpleNamespace(get_scale=lambda: scale), num_processes=1, process_index=0
    )
    if ends:
        with pytest.raises(FloatingPointError, match="the gradient is not finite"):
            check_gradient(trainer, torch.tensor(torch.inf))
    else:
        check_gradient(trainer, torch.tensor(torch.inf))


@pytest.mark.parametrize("peft_config", [None, lora(target_modules=["q_proj"])], ids=["full", "lora"])
def test_sft_ends_before_the_step_and_names_the_row(tmp_path, monkeypatch, peft_config):
    score = sft_trainer.score_view

    def scoring(model, view, *args):
        scores = score(model, view, *args)
        row = (view.input_ids == broken).any(dim=1, keepdim=True)
        return replace(scores, logps=scores.logps.masked_fill(row, torch.nan))

    run = build_sft(
        tmp_path,
        data=dataset(["p: ", "p: ", "? "] * 4, ["abc", "a longer answer", "yes"] * 4),
        peft_config=peft_config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    broken = run.processing_class("?")["input_ids"][-1]
    monkeypatch.setattr(sft_trainer, "score_view", scoring)
    stopped(run, r"^Step 1: the loss is not finite, in row \d \('\? yes.*'\): log_probs\. Go on from the last check")


def test_an_sft_gradient_that_is_not_finite_ends_the_run(tmp_path):
    run = build_sft(tmp_path, max_steps=3)
    parameter = next(p for p in run.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (math.nan if run.state.global_step == 1 else 1))
    stopped(run, r"^Step 2: the gradient is not finite \(norm nan\), though the loss is, in row 0 \('.*row \d")
