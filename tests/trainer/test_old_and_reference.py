"""What is computed of other policies, and what need not be: identities 10 and 13 of docs/methods.md §7, trained."""

from collections import Counter

import pytest
import torch
from helpers_grpo import build, losses, reward, text_of, weights

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.likelihood import Plan
from trl_dllm.trainer import grpo_trainer, loss
from trl_dllm.trainer.loss import LOSSES


class Counting(DiffusionGRPOTrainer):
    """Counts forwards and the rows in them, with and without a gradient."""

    def __init__(self, *args, **kwargs):
        self.count = Counter()
        super().__init__(*args, **kwargs)

    def _score_view(self, model, plan, number, *args, **kwargs):
        kind = "trained" if torch.is_grad_enabled() else "scored"
        self.count[kind] += 1
        self.count[f"{kind} rows"] += len(plan[number][1])
        return super()._score_view(model, plan, number, *args, **kwargs)


def run(folder, **settings):
    trainer = build(folder, Counting, **{"num_iterations": 2, "max_steps": 2, "beta": 0.0, **settings})
    trainer.train()
    return trainer


# ---------------------------------------------------------------------------------------------------------- old policy


@pytest.mark.parametrize("draws", [{}, {"p_mask_prompt": 0.4}, {"p_mask_prompt": 0.4, "redraw_views": False}])
def test_the_first_update_scores_the_old_policy(tmp_path, draws):
    """In the buffer the old log-probs of the first draw are those of the update; other draws take a pass each."""
    trainer = run(tmp_path, num_iterations=3, max_steps=3, learning_rate=0.0, **draws)
    passes = 2 if draws.get("redraw_views", True) and draws else 0
    per_pass = trainer.count["trained"] // 3
    assert trainer.count["scored"] == passes * per_pass
    for batch in trainer._buffered_inputs:
        kept = (batch["counted"] & ~batch["skipped"][:, None])[:, None].expand_as(batch["old_per_token_logps"])
        assert (batch["old_per_token_logps"][kept] < 0).all(), "a draw without log-probs"


def test_micro_batches_behind_the_first_update_are_scored_before_it(tmp_path):
    """Four micro-batches a generation, two a step: half of them."""
    trainer = run(tmp_path, steps_per_generation=4, max_steps=4, stop_at_eos=False, loss_tokens="canvas")
    assert trainer.count["scored rows"] == trainer.count["trained rows"] // 4


def test_a_buffer_that_does_not_begin_with_a_window_is_scored_whole(tmp_path):
    """Three micro-batches a generation, two a step: the second cycle begins inside a window."""
    settings = {"steps_per_generation": 3, "num_iterations": 1, "loss_tokens": "canvas", "stop_at_eos": False}
    trainer = run(tmp_path, max_steps=3, **settings)
    assert trainer._window_step == 2 and trainer._step == 6
    # Of the first generation batch one micro-batch comes behind a step; of the second, all may.
    assert trainer.count["scored rows"] == trainer.count["trained rows"] * 4 // 6


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_number_of_draws_is_taken_in_turn(tmp_path, number):
    drawn = []

    class Noting(Counting):
        def _plan(self, rollout, draw, batch):
            if torch.is_grad_enabled():
                drawn.append((self._inner_iteration, draw))
            return super()._plan(rollout, draw, batch)

    trainer = build(
        tmp_path,
        Noting,
        num_iterations=3,
        max_steps=3,
        p_mask_prompt=0.4,
        redraw_views=number,
        learning_rate=0.0,
        beta=0.04,
        use_bias_correction_kl=False,
    )
    trainer.train()
    assert set(drawn) == {(iteration, iteration % number) for iteration in range(3)}
    for batch in trainer._buffered_inputs:
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            assert batch[name].shape[1] == number
        assert torch.equal(batch["old_per_token_logps"], batch["ref_per_token_logps"]), "nothing has moved"
    assert losses(trainer, "kl") == [0.0] * 3


def test_draws_are_read_from_words_and_numbers(tmp_path):
    for given, value in (("true", True), ("False", False), ("2", 2), (True, True), (2, 2)):
        found = build(tmp_path, num_iterations=2, redraw_views=given).args.redraw_views
        assert found == value and type(found) is type(value)


# ----------------------------------------------------------------------------------------------- rows without gradient


def half(completions, prompts, **kwargs) -> list[float]:
    """Groups of one prompt are all alike: eight times 0.1, whose mean is not 0.1."""
    values = reward(completions)
    return [0.1 if text_of(prompt) == "ab" else value for prompt, value in zip(prompts, values, strict=True)]


def everything(trainer, rewards, mask):
    return torch.zeros(len(mask), dtype=torch.bool)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_identity_13_rows_without_a_gradient_change_nothing(tmp_path, monkeypatch, loss_type):
    """With Adam even a gradient of 1e-9 would be a whole step; with SGD the weights agree to rounding."""
    settings = {
        "loss_type": loss_type,
        "reward_funcs": half,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 4,
        "scale_rewards": "none",
        "importance_sampling_level": "sequence" if loss_type == "luspo" else "token",
    }
    skipping = run(tmp_path / "a", **settings)
    monkeypatch.setattr(grpo_trainer, "rows_without_gradient", everything)
    running = run(tmp_path / "b", **settings)
    assert losses(skipping) == pytest.approx(losses(running), rel=1e-5, abs=1e-7)
    assert losses(skipping, "grad_norm") == pytest.approx(losses(running, "grad_norm"), rel=1e-5)
    for name, value in weights(skipping).items():
        torch.testing.assert_close(value, weights(running)[name], atol=1e-6, rtol=1e-5)
    assert 0 < max(losses(skipping, "frac_rows_skipped")) <= 0.5
    assert skipping.count["trained rows"] < running.count["trained rows"]


def test_a_step_without_any_gradient_still_runs_a_forward_and_the_optimizer(tmp_path):
    trainer = run(tmp_path, reward_funcs=lambda completions, **kwargs: [0.1] * len(completions), weight_decay=0.1)
    assert losses(trainer, "frac_rows_skipped") == [1.0] and trainer.state.global_step == 2
    assert dict(trainer.count) == {"trained": 4, "trained rows": 4}, "one row in each of four micro-batches"
    assert losses(trainer, "grad_norm") == [0.0, 0.0] and losses(trainer, "entropy") == [0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.04},
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5, "num_segments": 1},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    ids=str,
)
def test_what_reads_other_things_than_the_advantage_skips_no_row(tmp_path, settings):
    trainer = run(tmp_path, reward_funcs=half, **settings)
    assert losses(trainer, "frac_rows_skipped") == [0.0] and not loss.skips_rows(trainer)


def test_the_entropy_is_that_of_the_rows_that_are_run(tmp_path):
    settings = {"reward_funcs": half, "num_iterations": 1, "max_steps": 1, "learning_rate": 0.0}
    trainer = run(tmp_path, **settings)
    batches = trainer._buffered_inputs
    skipped = torch.cat([batch["skipped"] for batch in batches])
    assert skipped.any() and not skipped.all()
    total, count = 0.0, 0
    for batch in batches:
        rollout = grpo_trainer.from_batch(batch, trainer.sampling.facts(trainer.spec))
        plan = Plan(trainer.estimator, rollout, 0, 4)
        with torch.no_grad():
            entropies = sum(
                DiffusionGRPOTrainer._score_view(trainer, trainer.model, plan, n).entropies for n in range(len(plan))
            )
        kept = batch["counted"] & ~batch["skipped"][:, None]
        total, count = total + entropies[kept].sum().item(), count + int(kept.sum())
    # The log has the mean of two micro-batches' means.
    assert losses(trainer, "entropy")[0] == pytest.approx(total / count, rel=0.2)
    assert losses(trainer, "entropy")[0] > 1


def test_rows_that_the_loss_leaves_out_are_not_run(tmp_path):
    """Truncated completions, where TRL is told to mask them; with a KL too."""
    trainer = run(tmp_path, mask_truncated_completions=True, beta=0.04)
    batches = trainer._buffered_inputs
    skipped = torch.cat([batch["skipped"] for batch in batches])
    assert torch.equal(skipped, torch.cat([~batch["completion_mask"].any(dim=1) for batch in batches]))
    assert skipped.any() and not skipped.all()
    for batch in batches:
        assert not batch["old_per_token_logps"][batch["skipped"]].any()


def test_rows_that_are_not_run_are_nothing_under_the_samplers_log_probs(tmp_path):
    """Their ratio is 1, and they are no part of the mismatch."""
    settings = {"estimator": "exact_trajectory", "old_logps": "rollout", "reward_funcs": half}
    trainer = run(tmp_path, **settings)
    assert max(losses(trainer, "frac_rows_skipped")) > 0
    assert 0 <= max(losses(trainer, "sampling/mismatch_max")) < 1e-4
    for batch in trainer._buffered_inputs:
        assert not batch["old_per_token_logps"][batch["skipped"]].any()


def test_a_second_call_of_train_draws_anew(tmp_path):
    """Its steps count from 0 again, and TRL's buffer is of a policy that has moved since."""
    trainer = run(tmp_path, steps_per_generation=4, gradient_accumulation_steps=1, max_steps=1, learning_rate=0.05)
    before = torch.cat([batch["view_seed"] for batch in trainer._buffered_inputs])
    drawn = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args: drawn.append(1) or generate(*args)
    trainer.train()
    assert drawn == [1] and trainer._step == 1 and len(before) == 16
