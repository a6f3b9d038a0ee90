"""What reaches the loss: each row's own trajectory, the inner iteration, and the old and reference log-probs."""

import pytest
import torch
from helpers_grpo import CountingTrainer, as_rollout, build, chat_prompts, lora, losses, text_prompts, tiny
from peft import get_peft_model
from trl import GRPOTrainer

from trl_dllm.likelihood import token_logps
from trl_dllm.noise import row_seeds
from trl_dllm.trainer import grpo_trainer


# gradient accumulation, steps per generation, inner iterations
CYCLES = [(2, 2, 2), (1, 2, 2), (4, 2, 3), (2, 4, 2)]


def fingerprints(prompt_ids, prompt_mask, canvas):
    """(prompt tokens, canvas) of each row, without padding."""
    return [
        (tuple(ids[keep].tolist()), tuple(tokens.tolist()))
        for ids, keep, tokens in zip(prompt_ids, prompt_mask.bool(), canvas, strict=True)
    ]


class SpyTrainer(CountingTrainer):
    """Keeps what TRL's own loss was given: log-probs of the policy, and sliced old and reference log-probs."""

    def __init__(self, *args, **kwargs):
        self.seen = []  # one entry a micro-batch
        self.checks = []
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logps = outputs[0].detach()
        return outputs

    def _compute_loss(self, model, inputs):
        self._evaluations = []
        loss = super()._compute_loss(model, inputs)
        entry = self._evaluations[-1]  # the last evaluation of a segmented step has all log-probs
        entry["stacked"] = {
            name: inputs[name] for name in ("old_per_token_logps", "ref_per_token_logps") if name in inputs
        }
        entry["iteration"] = self.true_iteration if self.model.training else 0
        entry["inputs"] = inputs
        self.seen.append(entry)
        return loss


@pytest.fixture
def spy(monkeypatch):
    """TRL's `_compute_loss` reports to the `SpyTrainer` what it was called with."""
    stock = GRPOTrainer._compute_loss

    def reporting(self, model, inputs):
        loss = stock(self, model, inputs)
        if hasattr(self, "_evaluations"):
            names = ("old_per_token_logps", "ref_per_token_logps", "completion_mask")
            self._evaluations.append({"logps": self._last_logps, **{name: inputs.get(name) for name in names}})
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", reporting)


# -------------------------------------------------------------------------------------------- identity 10, in the loop


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("cycle", [(2, 2, 3), *CYCLES], ids=str)
def test_an_unmoved_policy_has_ratio_one_and_no_kl_in_every_inner_iteration(tmp_path, spy, cycle, peft):
    """Learning rate 0 and half of the prompt masked: exact zeros need the same draws for all three policies."""
    accumulation, per_generation, iterations = cycle
    micro_steps = 2 * per_generation * iterations  # two generation cycles
    trainer = build(
        tmp_path,
        SpyTrainer,
        peft=peft,
        learning_rate=0.0,
        p_mask_prompt=0.5,
        beta=0.04,
        num_segments=3,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        max_steps=micro_steps // accumulation,
    )
    trainer.train()
    assert len(trainer.seen) == micro_steps
    assert [entry["iteration"] for entry in trainer.seen] == [
        step // per_generation % iterations for step in range(micro_steps)
    ]
    stale = []
    for entry in trainer.seen:
        counted = entry["completion_mask"].bool()
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if entry[name] is None:  # TRL takes the policy's own
                assert name[:3] == "old" and entry["iteration"] == 0
                assert torch.equal(entry["stacked"][name][:, 0][counted], entry["logps"][counted])
                continue
            assert entry[name].shape == counted.shape
            assert (entry["logps"] - entry[name])[counted].abs().max() == 0.0, f"{name} differ in {entry['iteration']}"
            assert entry["stacked"][name].shape == (len(counted), iterations, counted.shape[1])
        if entry["iteration"]:
            stale.append((entry["logps"] - entry["stacked"]["old_per_token_logps"][:, 0])[counted].abs().max())
    assert min(stale) > 1e-4, "the first iteration's draws would have done as well: nothing was tested"
    assert losses(trainer, "kl") == [0.0] * trainer.args.max_steps


@pytest.mark.parametrize("redraw", [False, True])
def test_one_draw_is_shared_by_the_inner_iterations_only_without_redraw_views(tmp_path, spy, redraw):
    trainer = build(
        tmp_path, SpyTrainer, learning_rate=0.0, p_mask_prompt=0.5, num_iterations=2, max_steps=2, redraw_views=redraw
    )
    trainer.train()
    first, second = (
        {
            seed: row
            for entry in trainer.seen[half]
            for seed, row in zip(entry["inputs"]["view_seed"].tolist(), entry["logps"], strict=True)
        }
        for half in (slice(0, 2), slice(2, 4))
    )
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[seed], second[seed]) for seed in first) == redraw
    assert trainer.seen[0]["stacked"]["old_per_token_logps"].shape[1] == (2 if redraw else 1)


def test_a_likelihood_without_randomness_is_scored_once_for_all_inner_iterations(tmp_path, spy):
    trainer = build(tmp_path, SpyTrainer, num_iterations=3, max_steps=3, beta=0.04)
    trainer.train()
    assert {value.shape[1] for entry in trainer.seen for value in entry["stacked"].values()} == {1}


# -------------------------------------------------------------------------------------- rows keep their own trajectory


@pytest.mark.parametrize("cycle", [*CYCLES, (4, 2, 1), (3, 6, 1)], ids=str)
def test_every_row_keeps_its_trajectory_through_shuffle_split_and_evaluation(tmp_path, spy, monkeypatch, cycle):
    accumulation, per_generation, iterations = cycle
    table, drawn, advantages = {}, [], {}
    draw = grpo_trainer.generate

    def recording(*args, **kwargs):
        rollout = draw(*args, **kwargs)
        keys = fingerprints(rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids)
        for row, key in enumerate(keys):
            table[key] = (rollout.unmask_step[row], rollout.view_seed[row], rollout.counted[row], rollout.logps[row])
        drawn.append(keys)
        return rollout

    monkeypatch.setattr(grpo_trainer, "generate", recording)

    class Trainer(SpyTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs = super()._generate_and_score_completions(inputs)
            keys = fingerprints(outputs["prompt_ids"], outputs["prompt_mask"], outputs["completion_ids"])
            advantages.update(zip(keys, outputs["advantages"], strict=True))
            return outputs

    micro_steps = 2 * per_generation * iterations
    trainer = build(
        tmp_path,
        Trainer,
        data=chat_prompts(),
        eval_dataset=text_prompts(1),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        p_mask_prompt=0.3,
        beta=0.04,
        num_segments=2,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        max_steps=micro_steps // accumulation,
    )
    trainer.train()

    assert len(table) == sum(map(len, drawn)), (
        "two rows drew the same canvas for the same prompt: the table is ambiguous"
    )
    seen = []
    for entry in trainer.seen:
        inputs = entry["inputs"]
        keys = fingerprints(inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_ids"])
        seen.append(keys)
        for row, key in enumerate(keys):
            step, seed, counted, logps = table[key]
            assert torch.equal(inputs["unmask_step"][row], step)
            assert inputs["view_seed"][row] == seed
            assert torch.equal(inputs["counted"][row], counted)
            assert torch.equal(inputs["completion_mask"][row].bool(), counted)
            assert torch.equal(inputs["rollout_logps"][row], logps)
            assert inputs["advantages"][row] == advantages[key]
    # Each pass over a generation batch sees each of its rows once, in training and in evaluation.
    rows = 4 * per_generation
    flat = [key for keys in seen for key in keys]
    trained = [keys for keys in drawn if len(keys) == rows]
    for keys in trained:
        assert all(flat.count(key) == iterations for key in keys)
    evaluated = [keys for keys in drawn if len(keys) == 4 and keys in seen]
    assert len(evaluated) >= 2 * trainer.args.max_steps
    assert {int(table[key][1]) for keys in trained for key in keys}.isdisjoint(
        int(table[key][1]) for keys in evaluated for key in keys
    ), "evaluation and training share a row seed"


def test_row_seeds_are_functions_of_seed_step_round_and_row(tmp_path, spy):
    """Two generation batches in one optimizer step are two rounds; a new step starts again at round 0."""
    trainer = build(
        tmp_path,
        SpyTrainer,
        seed=17,
        gradient_accumulation_steps=4,
        steps_per_generation=2,
        num_iterations=1,
        max_steps=2,
    )
    trainer.train()
    seeds = [entry["inputs"]["view_seed"] for entry in trainer.seen]  # four micro-batches a step, two a generation
    for step in range(2):
        for generation in range(2):
            start = 4 * step + 2 * generation
            found = torch.cat(seeds[start : start + 2]).sort().values
            assert torch.equal(found, row_seeds(17, 0, step, generation, torch.arange(8)).sort().values)


def test_evaluation_does_not_change_the_draws_of_training(tmp_path):
    """Else a run with evaluation would differ from one without, and from itself resumed at a checkpoint."""
    seeds = []
    for strategy in ("no", "steps"):
        trainer = build(
            tmp_path,
            eval_dataset=text_prompts(1),
            eval_strategy=strategy,
            eval_steps=1,
            max_steps=3,
            per_device_eval_batch_size=4,
            learning_rate=0.0,
        )
        trainer.train()
        seeds.append(torch.cat([batch["view_seed"] for batch in trainer._buffered_inputs]).sort().values)
    assert torch.equal(*seeds)


# ----------------------------------------------------------------------------------------- old and reference log-probs


class ScoringTrainer(SpyTrainer):
    """Recomputes old and reference log-probs with the public `token_logps` before the policy moves."""

    initial = None

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.state.global_step != self.generated_at:
            return loss
        rollout = as_rollout(self, inputs)
        for name, policy in (("old_per_token_logps", self.model), ("ref_per_token_logps", self.initial)):
            for k in range(inputs[name].shape[1]):
                with torch.no_grad():
                    scores = token_logps(
                        policy, rollout, self.estimator, iteration=k, p_mask_prompt=self.args.p_mask_prompt
                    )
                error = (inputs[name][:, k] - scores.logps)[rollout.counted].abs().max().item()
                self.checks.append((name, k, error))
                assert (inputs[name][:, k][~rollout.counted] == 0).all()
        return loss


@pytest.mark.parametrize("kind", ["full", "lora", "wrapped"])
def test_old_and_reference_log_probs_are_those_of_the_policy_at_generation_and_of_the_initial_model(
    tmp_path, spy, kind
):
    """After three cycles the two differ. A PeftModel that the user made has its initial adapter as the reference."""
    model, tokenizer = tiny()
    initial = tiny()[0]
    if kind == "wrapped":
        adapter = lora(init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(model, adapter)
        torch.manual_seed(0)
        initial = get_peft_model(initial, adapter)
    trainer = build(
        tmp_path,
        ScoringTrainer,
        model=model,
        tokenizer=tokenizer,
        peft=kind == "lora",
        beta=0.04,
        num_iterations=2,
        max_steps=6,
        num_segments=3,
        p_mask_prompt=0.3,
        learning_rate=0.05,
    )
    trainer.initial = initial
    trainer.train()
    assert len(trainer.checks) == 3 * 2 * 2 * 2
    assert max(error for _, _, error in trainer.checks) < 1e-5, trainer.checks
    moved = trainer.seen[-1]["stacked"]
    assert (moved["old_per_token_logps"] - moved["ref_per_token_logps"]).abs().max() > 1e-2
    assert losses(trainer, "kl")[-1] > 1e-4


def test_exact_trajectory_scores_equal_the_samplers_own_log_probs(tmp_path, spy):
    """Identity 2 (docs/methods.md §7): what is scored as old policy is what the sampler drew from, per token."""
    trainer = build(
        tmp_path,
        SpyTrainer,
        estimator="exact_trajectory",
        temperature=0.7,
        num_iterations=2,
        max_steps=2,
        loss_tokens="canvas",
    )
    trainer.train()
    for entry in trainer.seen:
        inputs = entry["inputs"]
        counted = inputs["counted"]
        assert counted.any(dim=1).all()
        gap = inputs["old_per_token_logps"][:, 0] - inputs["rollout_logps"]
        assert gap[counted].abs().max() < 1e-5


def test_score_temperature_is_used_for_all_three_policies(tmp_path, spy):
    runs = {}
    for temperature in (None, 1.0):
        trainer = build(
            tmp_path,
            SpyTrainer,
            temperature=0.5,
            score_temperature=temperature,
            learning_rate=0.0,
            beta=0.04,
            num_iterations=2,
            max_steps=2,
        )
        trainer.train()
        assert losses(trainer, "kl") == [0.0, 0.0]
        inputs = trainer.seen[0]["inputs"]
        expected = token_logps(
            trainer.model, as_rollout(trainer, inputs), trainer.estimator, temperature=temperature or 0.5
        ).logps
        counted = inputs["counted"]
        assert torch.allclose(inputs["old_per_token_logps"][:, 0][counted], expected[counted], atol=1e-5)
        runs[temperature] = trainer.seen[0]["logps"]
    assert not torch.allclose(*runs.values(), atol=1e-2)


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"], ids=["separable", "not separable"])
@pytest.mark.parametrize("loss_tokens", ["eos", "canvas"])
def test_the_samplers_log_probs_serve_as_the_old_policys(tmp_path, spy, loss_tokens, loss_type):
    """`old_logps: rollout` gives the run that scoring again gives, without a forward for it, and logs the mismatch."""
    runs = []
    for old_logps in ("recompute", "rollout"):
        trainer = build(
            tmp_path,
            SpyTrainer,
            estimator="exact_trajectory",
            old_logps=old_logps,
            loss_tokens=loss_tokens,
            loss_type=loss_type,
            num_iterations=2,
            steps_per_generation=4,  # two optimizer steps: the second half of the rows is scored before the first
            max_steps=8,
            beta=0.04,
            stop_at_eos=False,
        )
        scored = []
        score = trainer._score_view
        trainer._score_view = lambda *args, score=score, scored=scored, **kwargs: (
            scored.append(not torch.is_grad_enabled()) or score(*args, **kwargs)
        )
        trainer.train()
        for entry in trainer.seen:
            counted = entry["inputs"]["counted"]
            old = entry["old_per_token_logps"]
            assert old is None or (old[~counted] == 0).all()
        runs.append((losses(trainer), sum(scored)))
        assert ("sampling/mismatch_kl" in trainer.state.log_history[0]) == (old_logps == "rollout")
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    # Two cycles, two micro-batches, four steps, without what nobody counts.
    assert 12 <= runs[0][1] - runs[1][1] <= 16
    assert max(losses(trainer, "sampling/mismatch_kl")) < 1e-6 and max(losses(trainer, "sampling/mismatch_max")) < 1e-4


@pytest.mark.parametrize("estimator", ["any_order", "exact_trajectory"])
def test_any_order_decoding_is_scored_as_it_was_drawn(tmp_path, spy, estimator):
    """Identity 3 in the trainer: AnyOrder gives the any-order decoder's log-probs, a replay of canvases does not."""
    trainer = build(
        tmp_path,
        SpyTrainer,
        decoding="any_order",
        cache="exact",
        estimator=estimator,
        num_iterations=2,
        max_steps=2,
        beta=0.04,
    )
    trainer.train()
    gaps = []
    for entry in trainer.seen:
        inputs = entry["inputs"]
        gap = inputs["old_per_token_logps"][:, 0] - inputs["rollout_logps"]
        gaps.append(gap[inputs["counted"]].abs().max())
    assert max(gaps) < 1e-5 if estimator == "any_order" else max(gaps) > 1e-2
