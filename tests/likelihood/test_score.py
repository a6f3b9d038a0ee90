"""Running views: precision, backends, temperature, batches (docs/methods.md §7: identity 7), and what is refused."""

from dataclasses import replace

import pytest
import torch
from cases import CANVAS, MASK, SHIFT, VOCAB, assert_same_scores, rollout_for_tests, whole_canvas
from oracles import assemble, full_logits, random_rollout, sharp_model, slow_step_merge, token_distribution, unpadded

from trl_dllm.likelihood import (
    AnyOrder,
    Elbo,
    ExactTrajectory,
    MeanField,
    PseudoLikelihood,
    StepMerge,
    TokenScores,
    counted_view,
    score_view,
    token_logps,
)
from trl_dllm.likelihood.view import IGNORE
from trl_dllm.models import MaskedDiffusionSpec, hidden_rows
from trl_dllm.rollout import Rollout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_other_precisions(models, family, dtype):
    """Log-probs are float32 for a bfloat16 model, and near the float64 ones."""
    rollout = rollout_for_tests(dtype=torch.float32)
    with torch.no_grad():
        scores = token_logps(models(family, dtype), rollout, StepMerge(3))
        logps, _ = slow_step_merge(models(family), rollout, 3, SHIFT[family])
    assert scores.logps.dtype == torch.float32 and scores.entropies.dtype == torch.float32
    torch.testing.assert_close(scores.logps.double(), logps, atol=1e-4 if dtype == torch.float32 else 0.8, rtol=0)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_scores_on_each_backend(models, family, attn):
    rollout = rollout_for_tests(dtype=torch.float32)
    with torch.no_grad():
        scores = token_logps(models(family, torch.float32, attn), rollout, StepMerge(3))
        logps, _ = slow_step_merge(models(family), rollout, 3, SHIFT[family])
    torch.testing.assert_close(scores.logps.double(), logps, atol=1e-4, rtol=0)


def test_temperature_none_is_the_rollouts_own_and_zero_is_one(models):
    model = models("llada")
    with torch.no_grad():
        for own, given, effective in (
            (0.6, None, 0.6),
            (0.6, 1.3, 1.3),
            (0.0, None, 1.0),
            (0.6, 0.0, 1.0),
            (0.6, 1.0, 1.0),
        ):
            rollout = rollout_for_tests(temperature=own)
            scores = token_logps(model, rollout, StepMerge(2), temperature=given)
            logps, _ = slow_step_merge(model, rollout, 2, shift=0, temperature=effective)
            torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0, msg=f"{own} {given}")


def test_random_views_are_of_the_given_seeds_and_iteration(models):
    """`scored` too; without seeds they are the rollout's own."""
    model, rollout, estimator = models("llada"), rollout_for_tests(), PseudoLikelihood(3)
    other = replace(rollout, view_seed=rollout.view_seed + 1)
    with torch.no_grad():
        own, given, later = (
            token_logps(model, rollout, estimator, **settings)
            for settings in ({}, {"seeds": other.view_seed}, {"iteration": 2})
        )
        assert_same_scores(given, token_logps(model, other, estimator))
    assert torch.equal(own.scored, estimator.scored(rollout, rollout.view_seed, 0))
    assert torch.equal(later.scored, estimator.scored(rollout, rollout.view_seed, 2))
    for scores in (own, given, later):
        assert torch.equal(scores.logps != 0, scores.scored)
    assert not torch.equal(own.scored, given.scored) and not torch.equal(own.scored, later.scored)


# ---------------------------------------------------------------------------------------------- views and their scores


def slow_kl(model, reference, view, rollout, shift, temperature):
    """KL(model ‖ reference) over the vocabulary, weighted, one target at a time: (B, L) with a graph."""
    kls, width = {}, rollout.prompt_ids.shape[1]
    for row, column in (view.targets != IGNORE).nonzero().tolist():
        prompt = unpadded(rollout, row)
        ids = prompt + view.input_ids[row, width:].tolist()
        p, q = (
            token_distribution(full_logits(m, ids)[len(prompt) + column - width - shift], MASK, temperature)
            for m in (model, reference)
        )
        kl = sum(p[v] * (p[v] / q[v].detach()).log() for v in range(VOCAB) if v != MASK)
        kls[row, int(view.index[row, column])] = kl * view.weight[row, column]
    return assemble(rollout, kls)


@pytest.mark.parametrize("estimator", [StepMerge(2), Elbo(2)], ids=["step_merge", "elbo"])
def test_kl_from_a_reference_equals_a_slow_oracle(family, estimator):
    """Over the whole vocabulary, at the scores' temperature, weighted like them; gradients reach the model alone."""
    model, reference = sharp_model(family), sharp_model(family, seed=5)
    rollout, shift = rollout_for_tests(num_steps=(9, 3, 2), prompt_lengths=(4, 1, 6)), SHIFT[family]
    view = counted_view(estimator, rollout, 1, rollout.view_seed, 0)

    def run(inputs, rows):
        with torch.no_grad():
            return hidden_rows(reference, inputs, rows), reference.get_output_embeddings().forward

    settings = {"canvas_length": CANVAS, "spec": MaskedDiffusionSpec.from_model(model), "temperature": 0.7}
    scores = score_view(model, view, **settings, reference=run)
    expected = slow_kl(model, reference, view, rollout, shift, 0.7)
    assert expected.max() > 0.1 and (expected > 0).sum() == (view.targets != IGNORE).sum()
    torch.testing.assert_close(scores.kls, expected, atol=1e-6, rtol=0)
    assert_same_scores(scores, score_view(model, view, **settings))
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(model.parameters())
    got = torch.autograd.grad(
        (weight * scores.kls + scores.entropies).sum(), parameters
    )  # which have none of their own
    want = torch.autograd.grad((weight * expected).sum(), parameters)
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), name
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_position_that_a_view_scores_twice_is_summed(models):
    """With the weights of its targets; their weights count for the entropies too."""
    model, rollout = models("llada"), rollout_for_tests()
    view = MeanField().view(rollout, 0, rollout.view_seed, 0)
    spec, width = MaskedDiffusionSpec.from_model(model), rollout.prompt_ids.shape[1]
    assert rollout.revealed[0, :2].all()
    index, weight = view.index.clone(), view.weight.clone()
    index[0, width], weight[0, width], weight[0, width + 1] = 1, 0.25, 2.0
    with torch.no_grad():
        plain = score_view(model, view, CANVAS, spec)
        scores = score_view(model, replace(view, index=index, weight=weight), CANVAS, spec)
    for got, one in ((scores.logps, plain.logps), (scores.entropies, plain.entropies)):
        assert got[0, 1].item() == pytest.approx(0.25 * one[0, 0].item() + 2 * one[0, 1].item())
        assert got[0, 0] == 0
        assert torch.equal(got[1:], one[1:])
    assert not scores.scored[0, 0] and torch.equal(scores.scored[1:], plain.scored[1:])


def test_scores_of_several_views_add_up():
    """Every table; KLs only where all views have them."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, 3, 2, 4, generator=generator)
    scored = torch.rand(3, 2, 4, generator=generator) < 0.4
    parts = [TokenScores(*tables[:2], chosen, tables[2]) for tables, chosen in zip(numbers, scored, strict=True)]
    total = TokenScores.sum(parts)
    for got, want in zip(total.tables, numbers.sum(dim=0), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(total.scored, scored.any(dim=0)) and not torch.equal(total.scored, scored[0])
    doubled = total.map(lambda table: 2 * table)
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled.tables, total.tables, strict=True))
    assert torch.equal(doubled.scored, total.scored)
    without = replace(parts[0], kls=None)
    assert (parts[1] + without).kls is None and without.map(torch.exp).kls is None and len(without.tables) == 2


# ---------------------------------------------------------------------------------------------------------- identity 7


def test_identity_7_tokens_under_the_padding_are_never_read(models, family):
    model, rollout = models(family), rollout_for_tests(width=9)
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    other = Rollout(**{**fields, "prompt_ids": rollout.prompt_ids.masked_fill(~rollout.prompt_mask, 88)})
    with torch.no_grad():
        a, b = (token_logps(model, r, StepMerge(3), p_mask_prompt=0.3) for r in (rollout, other))
    assert_same_scores(a, b)


def test_identity_7_gradients_do_not_depend_on_the_micro_batch(family):
    model, rollout = sharp_model(family), rollout_for_tests(num_steps=(9, 3, 1), prompt_lengths=(4, 1, 6))
    parameters = list(model.parameters())
    whole, parts = (
        torch.autograd.grad(token_logps(model, rollout, StepMerge(2), batch_size=size).logps.sum(), parameters)
        for size in (None, 2)
    )
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max())


# ---------------------------------------------------------------------------------------------------- errors and edges


def test_rollout_and_model_must_agree_on_the_mask(models):
    rollout = random_rollout(50, VOCAB, 0)
    with pytest.raises(ValueError, match=r"mask_token_id=50 in the rollout, 3 in the model.*pass the spec"):
        token_logps(models("llada"), rollout, MeanField())
    with torch.no_grad():
        scores = token_logps(models("llada"), rollout, StepMerge(2), spec=MaskedDiffusionSpec(50))
        logps, _ = slow_step_merge(models("llada"), rollout, 2, shift=0)
    torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)


def test_empty_prompts(models):
    """P = 0 works unshifted, and is refused for Dream."""
    rollout = rollout_for_tests(prompt_lengths=(0,) * 5)
    assert rollout.prompt_ids.shape == (5, 0)
    with torch.no_grad():
        scores = token_logps(models("llada"), rollout, StepMerge(3), p_mask_prompt=0.5)
        logps, _ = slow_step_merge(models("llada"), rollout, 3, shift=0)
    torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)
    for lengths in ((0,) * 5, (3, 1, 0, 2, 2)):
        with pytest.raises(ValueError, match=r"logits_shift=1.*prompt of at least one token"):
            token_logps(models("dream"), rollout_for_tests(prompt_lengths=lengths), MeanField())


def test_a_row_without_any_token(models):
    """T = 0: nothing was revealed, nothing is scored, nothing is NaN, and gradients are finite."""
    rollout = rollout_for_tests()
    rollout.completion_ids[2], rollout.unmask_step[2], rollout.counted[2] = MASK, -1, False
    for estimator in (MeanField(), StepMerge(4), ExactTrajectory()):
        scores = token_logps(models("llada"), rollout.validate(), estimator)
        assert scores.logps.isfinite().all() and scores.logps[2].eq(0).all() and not scores.scored[2].any()
    alone = token_logps(models("llada"), rollout[slice(2, 3)], ExactTrajectory())
    assert alone.logps.eq(0).all() and alone.logps.requires_grad


def test_what_nobody_counts_is_no_target_of_any_view(models):
    """`token_logps`, the trainer and the report share one rule; the canvas itself is the whole one."""
    rollout = rollout_for_tests()
    whole = whole_canvas(rollout)
    assert not torch.equal(rollout.counted, rollout.revealed)
    for estimator in (StepMerge(3), ExactTrajectory(), AnyOrder()):
        for n in range(estimator.num_views(rollout)):
            view = counted_view(estimator, rollout, n, rollout.view_seed, 0)
            assert rollout.counted.gather(1, view.index)[view.targets != IGNORE].all()
            assert torch.equal(view.input_ids, estimator.view(rollout, n, rollout.view_seed, 0).input_ids)
        with torch.no_grad():
            scores, all_scores = (token_logps(models("llada"), r, estimator) for r in (rollout, whole))
        expected = all_scores.logps.masked_fill(~rollout.counted, 0)
        torch.testing.assert_close(scores.logps, expected, atol=1e-12, rtol=0)
        assert all_scores.logps[rollout.revealed & ~rollout.counted].ne(0).all()
