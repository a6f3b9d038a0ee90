"""Top-k, top-p and min-p: what is drawn, and that every policy is scored among the same tokens."""

import math
from dataclasses import replace

import pytest
import torch
from cases import MASK, PROMPTS, VOCAB, sample, sample_any_order
from oracles import chi_square_p, full_logits, left_pad, token_distribution, unpadded
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.generation.order import named, truncate
from trl_dllm.likelihood import AnyOrder, Elbo, ExactTrajectory, PseudoLikelihood, StepMerge, token_logps
from trl_dllm.models import log_probs
from trl_dllm.noise import hash64
from trl_dllm.rollout import Rollout


SETTINGS = [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05}]


def transformers_keeps(logits, top_k=0, top_p=1.0, min_p=None):
    """What transformers' own warpers leave, in the order in which `generate` has them."""
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits).isfinite()


@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"top_k": 1}, {"top_k": 500}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str
)
def test_what_may_be_drawn_is_what_transformers_leaves(settings):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, VOCAB, generator=generator, dtype=torch.float64)
    logits[:, MASK] = -torch.inf
    keep = truncate(log_probs(logits, MASK), **settings)
    assert torch.equal(keep, transformers_keeps(logits, **settings) & (torch.arange(VOCAB) != MASK))
    assert keep.any(dim=1).all()


def test_the_names_of_tokens_are_filled_up():
    keep = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]]).bool()
    assert named(keep).tolist() == [[1, 3, -1], [3, -1, -1], [0, 1, 3]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_identity_2_exact_scores_among_the_support_are_the_samplers(models, family, settings):
    """docs/methods.md §7: the exact likelihood of a truncated draw is that of the distribution it was drawn from."""
    model = models(family)
    rollout = sample(model, diffusion_steps=8, temperature=0.9, **settings)
    rollout = replace(rollout, counted=rollout.revealed)
    assert rollout.support.shape[:2] == rollout.completion_ids.shape and (rollout.support >= 0).any(-1).all()
    with torch.no_grad():
        for estimator in (ExactTrajectory(), StepMerge(40)):
            scores = token_logps(model, rollout, estimator, batch_size=3)
            torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
        whole = token_logps(model, replace(rollout, support=None), ExactTrajectory())
    assert (scores.logps >= whole.logps - 1e-9).all() and (scores.logps - whole.logps).max() > 0.05
    assert (scores.entropies <= whole.entropies + 1e-9).all()


def test_the_support_is_the_one_of_the_canvas_that_was_seen(models):
    """By hand: the first step's positions, from the logits of the empty canvas."""
    model = models("llada")
    rollout = sample(model, diffusion_steps=4, temperature=0.7, top_k=4)
    for row in range(len(rollout)):
        prompt = unpadded(rollout, row)
        logits = full_logits(model, prompt + [MASK] * 12)
        for i in (rollout.unmask_step[row] == 0).nonzero().flatten().tolist():
            p = token_distribution(logits[len(prompt) + i].detach(), MASK, 0.7)
            best = sorted(range(VOCAB), key=lambda v: -p[v])[:4]
            assert sorted(rollout.support[row, i].tolist()) == sorted(best)
            token = int(rollout.completion_ids[row, i])
            expected = math.log(p[token] / sum(p[v] for v in best))
            assert rollout.logps[row, i].item() == pytest.approx(expected, abs=1e-6)


def test_any_order_draws_are_truncated_alike(models):
    model = models("llada", torch.float32)
    cached, uncached = (sample_any_order(model, cache, temperature=0.9, top_k=3) for cache in ("exact", None))
    assert torch.equal(cached.completion_ids, uncached.completion_ids)
    rollout = replace(cached, counted=cached.revealed)
    with torch.no_grad():
        scores = token_logps(model, rollout, AnyOrder())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
    assert int((rollout.support >= 0).sum(-1).max()) == 3


def test_draws_follow_the_truncated_distribution(models):
    model, rows = models("llada", torch.float32), 4000
    ids, mask = left_pad([[17, 60, 9]] * rows)
    config = DiffusionGenerationConfig(1, diffusion_steps=1, temperature=0.8, top_k=4, stop_at_eos=False)
    rollout = generate(model, ids, mask, config, seeds=hash64(5, torch.arange(rows)), batch_size=1000)
    p = token_distribution(full_logits(model, [17, 60, 9, MASK])[3].detach(), MASK, 0.8)
    best = sorted(range(VOCAB), key=lambda v: -p[v])[:4]
    assert set(rollout.completion_ids.flatten().tolist()) <= set(best)
    observed = [int((rollout.completion_ids == v).sum()) for v in best]
    total = sum(p[v].item() for v in best)
    assert chi_square_p(observed, [rows * p[v].item() / total for v in best]) > 1e-4


def test_a_greedy_draw_has_no_support_and_is_the_greedy_one(models):
    greedy, truncated = (sample(models("llada"), temperature=0.0, **s) for s in ({}, {"top_k": 2}))
    assert truncated.support is None and torch.equal(greedy.completion_ids, truncated.completion_ids)


def test_rows_of_a_batch_are_drawn_as_alone(models):
    together = sample(models("llada"), temperature=0.9, top_p=0.8)
    for row in range(len(PROMPTS)):
        alone = sample(models("llada"), temperature=0.9, top_p=0.8, batch_size=1)
        assert torch.equal(alone.completion_ids, together.completion_ids)
        assert {*alone.support[row].flatten().tolist()} == {*together.support[row].flatten().tolist()}


def test_a_rollout_checks_its_support(models):
    rollout = sample(models("llada"), temperature=0.9, top_k=2)
    parts = Rollout.cat([rollout[:1], replace(rollout[1:], support=rollout.support[1:, :, :1])])
    assert parts.support.shape == rollout.support.shape and int(parts.support[1:, :, 1].max()) == -1
    with pytest.raises(ValueError, match=r"Rollout.support has shape \(4, 3, 2\)"):
        replace(rollout, support=rollout.support[:, :3])
    with pytest.raises(ValueError, match="leaves out a token that was drawn"):
        replace(rollout, support=torch.full_like(rollout.support, MASK)).validate()


@pytest.mark.parametrize("estimator", [PseudoLikelihood(), Elbo(2)], ids=lambda e: type(e).__name__)
def test_estimators_of_other_canvases_are_refused(models, estimator):
    rollout = sample(models("llada"), temperature=0.9, top_k=2)
    with pytest.raises(ValueError, match="scores other distributions than the sampler drew from"):
        token_logps(models("llada"), rollout, estimator)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_k": 2.0}, "top_k=2.0 must be a whole number"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p=nan must be a finite number"),
        ({"min_p": 1.5}, r"min_p=1.5 must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        DiffusionGenerationConfig(8, **settings)
