"""The loss sees the whole canvas and counts the tokens it is told to; rewards see completions cut at the first EOS."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from helpers_grpo import (
    CheckedTrainer,
    as_rollout,
    build,
    chat_prompts,
    losses,
    moved,
    reward,
    text_of,
    text_prompts,
    tiny,
    weights,
    with_head_bias,
)
from trl import GRPOTrainer

from trl_dllm.likelihood import token_logps
from trl_dllm.trainer import grpo_trainer
from trl_dllm.trainer.old_and_reference import policy_logps


EOS, CANVAS = 1, 8


def eos_model(bias: float):
    """A model that favours EOS by `bias` nats everywhere."""
    model, tokenizer = tiny()
    return {"model": with_head_bias(model, **{f"t{EOS}": bias}), "tokenizer": tokenizer}


@pytest.fixture
def generated(monkeypatch):
    """What `_generate_and_score_completions` returned, and the rollouts it was made from."""
    found = {"outputs": [], "rollouts": []}
    draw = grpo_trainer.generate
    score = grpo_trainer.DiffusionGRPOTrainer._generate_and_score_completions

    def drawing(*args, **kwargs):
        found["rollouts"].append(draw(*args, **kwargs))
        return found["rollouts"][-1]

    def scoring(self, inputs):
        found["outputs"].append(score(self, inputs))
        return found["outputs"][-1]

    monkeypatch.setattr(grpo_trainer, "generate", drawing)
    monkeypatch.setattr(grpo_trainer.DiffusionGRPOTrainer, "_generate_and_score_completions", scoring)
    return found


def cut_at_eos(canvas, steps) -> list[int]:
    """The revealed tokens of one row up to its first EOS."""
    tokens = []
    for token, step in zip(canvas.tolist(), steps.tolist(), strict=True):
        if step >= 0:
            tokens.append(token)
            if token == EOS:
                break
    return tokens


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_every_width_is_the_canvas_even_if_all_completions_stop_early(tmp_path, generated, peft):
    """All rows are finished after the first block: TRL's own tensors would be four columns wide at most."""
    trainer = build(
        tmp_path,
        CheckedTrainer,
        **eos_model(6.0),
        peft=peft,
        beta=0.04 if peft else 0.0,
        num_iterations=2,
        max_steps=2,
        data=chat_prompts(),
        p_mask_prompt=0.2,
    )
    trainer.train()
    (outputs,), (rollout,) = generated["outputs"], generated["rollouts"]
    assert (rollout.unmask_step[:, 4:] == -1).all() and outputs["completion_mask"].sum(dim=1).max() <= 4
    names = ["completion_ids", "completion_mask", "unmask_step", "counted", "rollout_logps"]
    assert all(outputs[name].shape == (8, CANVAS) for name in names)
    for batch in trainer._buffered_inputs:
        assert batch["old_per_token_logps"].shape == (4, 2, CANVAS)
        assert not peft or batch["ref_per_token_logps"].shape == (4, 2, CANVAS)
    assert (outputs["completion_ids"][:, 4:] == trainer.spec.mask_token_id).all()
    assert max(trainer.gradient_errors) < 1e-6


@pytest.mark.parametrize("stop_at_eos", [False, True])
@pytest.mark.parametrize("loss_tokens", ["eos", "canvas"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_loss_counts_tokens_up_to_eos_or_all_that_were_revealed(
    tmp_path, generated, loss_type, loss_tokens, stop_at_eos
):
    trainer = build(
        tmp_path,
        CheckedTrainer,
        **eos_model(2.0),
        loss_tokens=loss_tokens,
        stop_at_eos=stop_at_eos,
        loss_type=loss_type,
        num_segments=3,
        num_iterations=2,
        max_steps=2,
    )
    trainer.train()
    (outputs,), (rollout,) = generated["outputs"], generated["rollouts"]
    lengths = []
    for row in range(len(rollout)):
        expected = len(cut_at_eos(rollout.completion_ids[row], rollout.unmask_step[row]))
        if loss_tokens == "canvas":
            expected = int((rollout.unmask_step[row] >= 0).sum())
        mask = outputs["completion_mask"][row]
        assert mask.sum() == expected and mask[:expected].all()
        lengths.append(expected)
    assert outputs["num_items_in_batch"] == sum(lengths)
    assert loss_tokens == "canvas" or len(set(lengths)) > 1
    if loss_tokens == "canvas" and not stop_at_eos:
        assert set(lengths) == {CANVAS}
    assert max(trainer.gradient_errors) < 1e-6


@pytest.mark.parametrize("loss_tokens", ["eos", "canvas"])
def test_truncated_completions_are_masked_if_trl_is_told_so(tmp_path, generated, loss_tokens):
    trainer = build(
        tmp_path,
        CheckedTrainer,
        **eos_model(1.0),
        mask_truncated_completions=True,
        loss_type="dapo",
        num_iterations=2,
        max_steps=2,
        loss_tokens=loss_tokens,
    )
    trainer.train()
    (outputs,), (rollout,) = generated["outputs"], generated["rollouts"]
    ended = ((rollout.completion_ids == EOS) & (rollout.unmask_step >= 0)).any(dim=1)
    assert ended.any() and not ended.all()
    assert torch.equal(outputs["completion_mask"].any(dim=1), ended)
    assert outputs["num_items_in_batch"] == outputs["completion_mask"].sum()
    assert outputs["skipped"][~ended].all(), "nothing is run for them"
    assert max(trainer.gradient_errors) < 1e-6


@pytest.mark.parametrize("chat", [False, True], ids=["text", "conversational"])
def test_rewards_see_completions_cut_at_eos_their_steps_and_the_datasets_columns(tmp_path, generated, chat):
    calls = []

    def inspecting(prompts, completions, completion_ids, unmask_step, answer, trainer_state, log_metric, **kwargs):
        calls.append((prompts, completions, completion_ids, unmask_step, answer))
        log_metric("revealed", sum(sum(s >= 0 for s in steps) for steps in unmask_step) / len(unmask_step))
        return reward(completions)

    model = eos_model(2.0)
    tokenizer = model["tokenizer"]
    trainer = build(
        tmp_path,
        **model,
        reward_funcs=inspecting,
        data=chat_prompts() if chat else text_prompts(),
        loss_tokens="canvas",
        stop_at_eos=False,
        max_steps=2,
    )
    trainer.train()
    assert losses(trainer, "revealed") == [CANVAS, CANVAS]
    assert len(calls) == 2 == len(generated["rollouts"])
    assert any(len(ids) < CANVAS for call in calls for ids in call[2])
    for (prompts, completions, completion_ids, unmask_step, answer), rollout in zip(
        calls, generated["rollouts"], strict=True
    ):
        assert unmask_step == rollout.unmask_step.tolist()
        expected = [cut_at_eos(*row) for row in zip(rollout.completion_ids, rollout.unmask_step, strict=True)]
        assert completion_ids == expected
        assert [text_of(c) for c in completions] == tokenizer.batch_decode(expected, skip_special_tokens=True)
        assert answer == [(p[0]["content"] if chat else p)[::-1] for p in prompts]


def test_improbable_tokens_behind_the_eos_do_not_make_the_loss_infinite(tmp_path):
    """exp(reference - policy) overflows float32 at a difference of 89 nats; what is not counted must not reach it."""
    trainer = build(
        tmp_path,
        peft=True,
        beta=0.04,
        stop_at_eos=False,
        estimator="mean_field",
        score_temperature=0.01,
        max_steps=2,
        num_iterations=2,
        learning_rate=1e-6,
    )
    trainer.train()
    assert all(
        math.isfinite(value) for value in losses(trainer) + losses(trainer, "grad_norm") + losses(trainer, "kl")
    )
    assert all(p.isfinite().all() for p in weights(trainer).values())
    improbable = False
    for batch in trainer._buffered_inputs:
        rollout = replace(as_rollout(trainer, batch), counted=batch["unmask_step"] >= 0)
        with torch.no_grad():
            logps = token_logps(trainer.model, rollout, trainer.estimator, temperature=0.01).logps
            current = policy_logps(trainer, trainer.model, batch)[:, 0]
        uncounted = ~batch["counted"]
        improbable |= bool((logps[uncounted] < -100).any())
        tables = [current, *(batch[f"{policy}_per_token_logps"][:, 0] for policy in ("old", "ref"))]
        assert all(table[uncounted].eq(0).all() and table[~uncounted].lt(0).any() for table in tables)
    assert improbable, "nothing was tested"


def test_padding_that_trl_adds_changes_no_number(tmp_path):
    settings = {"num_iterations": 2, "max_steps": 2, "beta": 0.04, "num_segments": 3, "p_mask_prompt": 0.2}
    runs = []
    for multiple in (None, 16):
        trainer = build(tmp_path, CheckedTrainer, pad_to_multiple_of=multiple, **settings)
        trainer.train()
        assert max(trainer.gradient_errors) < 1e-6
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


@pytest.mark.parametrize("prompts", [[""], ["", "ab", "", "hello"]], ids=["all", "some"])
def test_empty_prompts_train(tmp_path, prompts):
    """d2 §5.1.1 has no prompts. TRL pads an empty list of tokens to a tensor of floats."""
    data = Dataset.from_dict({"prompt": prompts * (32 // len(prompts))})
    settings = {"num_iterations": 2, "max_steps": 2, "beta": 0.04, "num_segments": 3, "p_mask_prompt": 0.2}
    trainer = build(tmp_path, CheckedTrainer, data=data, **settings)
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer) and max(trainer.gradient_errors) < 1e-6
    assert losses(trainer, "kl")[0] == 0


def test_a_small_sampler_batch_draws_the_same_completions(tmp_path, generated):
    for size in (None, 3):
        build(tmp_path, sampler_batch_size=size, steps_per_generation=2).train()
    first, second = generated["rollouts"]
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.unmask_step, second.unmask_step)


def test_greedy_rollouts_train(tmp_path):
    """Temperature 0: the rewards of a group are equal, so nothing moves, and nothing divides by zero."""
    trainer = build(tmp_path, temperature=0.0, beta=0.04, num_iterations=2, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert losses(trainer, "frac_reward_zero_std") == [1.0]
    assert losses(trainer) == losses(trainer, "kl") == losses(trainer, "grad_norm") == [0.0, 0.0]
    assert not moved(before, trainer)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_evaluation_scores_whole_canvases_and_restores_nothing_of_training(tmp_path, monkeypatch, loss_type):
    """Evaluation losses are TRL's on the estimator's log-probs; the weights and training metrics stay as they were."""
    modes, values, expected = [], [], []
    stock = GRPOTrainer._compute_loss

    def reporting(self, scores, inputs):
        modes.append((self.model.training, torch.is_grad_enabled(), inputs["completion_ids"].shape[1]))
        values.append(stock(self, scores, inputs))
        logps = token_logps(self.model, as_rollout(self, inputs), self.estimator).logps
        torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)
        # The ratio is 1, so that a token's loss is minus its completion's advantage.
        mask, minus = inputs["completion_mask"], -inputs["advantages"]
        lengths = mask.sum(dim=1)
        expected.append((minus.mean() if loss_type == "grpo" else (minus * lengths).sum() / lengths.sum()).item())
        return values[-1]

    trainer = build(
        tmp_path,
        **eos_model(2.0),
        eval_dataset=text_prompts(1),
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        num_segments=3,
        loss_type=loss_type,
        num_iterations=2,
        max_steps=2,
        beta=0.0,
    )
    trainer.train()
    before = weights(trainer)
    training = copy.deepcopy(trainer._metrics["train"])
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", reporting)
    metrics = trainer.evaluate()
    assert values == pytest.approx(expected, abs=1e-6) and (loss_type == "grpo" or max(map(abs, expected)) > 0.01)
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert trainer._metrics["train"] == training
    assert {mode[0] for mode in modes} == {False} and {mode[2] for mode in modes} == {CANVAS}
    assert not moved(before, trainer)
    assert "eval_reward" in metrics and "eval_sampling/steps" in metrics and "eval_entropy" in metrics
