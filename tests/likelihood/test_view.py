"""What every estimator promises of its views, and the perturbed prompt that they share."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CANVAS, ELBO, MASK, PKL, PKL_UNSHIFTED, SHIFT, TRAJECTORY, VOCAB, rollout_for_tests, sample
from oracles import hits, random_rollout, slow_step_merge, unpadded

import trl_dllm.generation.denoising
import trl_dllm.likelihood.elbo
import trl_dllm.likelihood.spg
import trl_dllm.likelihood.view
import trl_dllm.noise
from trl_dllm.likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    CoupledElbo,
    Elbo,
    ExactTrajectory,
    Plan,
    PseudoLikelihood,
    SampledTrajectory,
    StepMerge,
    TrajectoryPseudoLikelihood,
    perturb_prompt,
    token_logps,
)
from trl_dllm.noise import hash64


ALL = {**TRAJECTORY, **PKL, **PKL_UNSHIFTED, **ELBO}


# --------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("name", ALL)
def test_scored_is_the_union_of_the_views_targets(name):
    """And views that a row does not have score nothing; a bound has a share for what no draw masked as well."""
    estimator = ALL[name]
    for seed, iteration in ((5, 0), (6, 3)):
        rollout = rollout_for_tests(seed=seed)
        number = estimator.num_views(rollout)
        count = torch.zeros_like(rollout.completion_ids)
        for n in range(number + 2 * CANVAS + 2):
            found = hits(estimator, rollout, n, iteration)
            assert not (n >= number and found.any() and number > 1), f"view {n} of {number} scores something"
            if n < number:
                count += found
                assert not (found & ~rollout.revealed).any()
        scored = estimator.scored(rollout, rollout.view_seed, iteration)
        if not estimator.per_token:
            assert torch.equal(scored, rollout.counted) and not ((count > 0) & ~scored).any()
            continue
        assert torch.equal(count > 0, scored)
        assert count.max() == (2 if name == "coupled_elbo" else 1), "`disjoint`"


def test_rows_without_counted_positions_score_nothing(models):
    rollout = rollout_for_tests()
    rollout = replace(rollout, counted=rollout.counted & (torch.arange(5) != 1)[:, None])
    for name, estimator in {**PKL, **PKL_UNSHIFTED, **ELBO}.items():
        if name.startswith("pkl_t") or name == "pkl_u all":
            continue
        with torch.no_grad():
            scores = token_logps(models("llada"), rollout, estimator)
        assert scores.logps[1].eq(0).all() and not scores.scored[1].any(), name
        assert scores.logps.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_a_batch_that_counts_nothing_has_a_view_all_the_same(models, name):
    """Other processes may count something, and all run as many views."""
    rollout = rollout_for_tests()
    rollout = replace(rollout, counted=torch.zeros_like(rollout.counted))
    assert ALL[name].num_views(rollout) >= 1
    with torch.no_grad():
        scores = token_logps(models("llada"), rollout, ALL[name])
    assert scores.logps.eq(0).all() and not scores.scored.any()


@pytest.mark.parametrize(
    "estimator, disjoint",
    [
        (StepMerge(3), True),
        (SampledTrajectory(3), True),
        (AnyOrder(), True),
        (PseudoLikelihood(3), True),
        (BlockPseudoLikelihood(2, 3), True),
        (Elbo(1), False),
        (CoupledElbo(2), True),
        (CoupledElbo(4), False),
    ],
)
def test_disjoint_estimators_make_no_number_of_two_views(estimator, disjoint):
    """Neither a position's own, nor, where numbers are those of the row, its sum."""
    rollout = rollout_for_tests()
    count = sum(hits(estimator, rollout, n).long() for n in range(estimator.num_views(rollout)))
    assert estimator.disjoint == disjoint == (estimator.per_token and int(count.max()) == 1)


def test_draws_change_with_the_iteration_and_the_row_only():
    rollout = rollout_for_tests(seed=8)
    for estimator in (
        PseudoLikelihood(2),
        BlockPseudoLikelihood(3),
        SampledTrajectory(2),
        Elbo(2),
        CoupledElbo(2),
    ):
        seen = [torch.stack([hits(estimator, rollout, n, k) for n in range(2)]) for k in (0, 0, 1)]
        assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]), type(estimator).__name__
        other = replace(rollout, view_seed=rollout.view_seed + 1)
        assert not torch.equal(torch.stack([hits(estimator, other, n) for n in range(2)]), seen[0])


def test_costs_one_forward_a_view(models):
    """K positions of PKL are K forwards of P + L tokens; a single one for PKL-U and PKL-T, of P + 2L."""
    model, rollout = models("llada"), rollout_for_tests()[:1]  # all of its canvas is counted
    shapes, plain = [], model.forward
    model.forward = lambda *args, **kwargs: (shapes.append(tuple(kwargs["input_ids"].shape)), plain(*args, **kwargs))[
        1
    ]
    try:
        with torch.no_grad():
            for estimator, views, width in (
                (PseudoLikelihood(1), 1, 4 + CANVAS),
                (PseudoLikelihood(6), 6, 4 + CANVAS),
                (PseudoLikelihood(), CANVAS, 4 + CANVAS),
                (PseudoLikelihood(40), CANVAS, 4 + CANVAS),
                (BlockPseudoLikelihood(4), 1, 4 + CANVAS),
                (TrajectoryPseudoLikelihood(), 1, 4 + 2 * CANVAS - 1),  # nobody sees the token revealed last
                (Elbo(4), 4, 4 + CANVAS),
            ):
                shapes.clear()
                token_logps(model, rollout, estimator)
                assert shapes == [(1, width)] * views
    finally:
        del model.forward


# ------------------------------------------------------------------------------------------------- prompt perturbation


def prompts_seen(rollout, seeds=None, iteration=0, p_mask_prompt=0.5):
    """The prompt of each row of each forward, and the row it is of."""
    plan = Plan(ExactTrajectory(), rollout, iteration, 3, p_mask_prompt, seeds)
    width = rollout.prompt_ids.shape[1]
    return [
        (ids[:width], row) for n in range(len(plan)) for ids, row in zip(plan[n][0].input_ids, plan[n][1], strict=True)
    ]


def test_prompt_perturbation_is_one_draw_for_all_views():
    """Only prompt tokens change, alike in every view; the canvas is never perturbed."""
    rollout = rollout_for_tests(width=9)
    perturbed = perturb_prompt(rollout, 0.5, rollout.view_seed, 0).prompt_ids
    assert all(torch.equal(ids, perturbed[row]) for ids, row in prompts_seen(rollout))
    changed = perturbed != rollout.prompt_ids
    assert changed.any() and not (changed & ~rollout.prompt_mask).any()
    assert perturbed[changed].eq(MASK).all() and not changed[rollout.prompt_mask].all()
    for other in ({"iteration": 1}, {"seeds": rollout.view_seed + 1}):
        assert any(not torch.equal(ids, perturbed[row]) for ids, row in prompts_seen(rollout, **other))
    assert all(torch.equal(ids, rollout.prompt_ids[row]) for ids, row in prompts_seen(rollout, p_mask_prompt=0))


def test_prompt_perturbation_scores_equal_the_oracles_on_the_masked_prompt(models, family):
    model, rollout = models(family), rollout_for_tests()
    perturbed = perturb_prompt(rollout, 0.5, rollout.view_seed, 3)
    assert not torch.equal(perturbed.prompt_ids, rollout.prompt_ids)
    with torch.no_grad():
        scores = token_logps(model, rollout, StepMerge(2), p_mask_prompt=0.5, iteration=3)
        logps, _ = slow_step_merge(model, perturbed, 2, SHIFT[family])
    torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)


def test_prompt_perturbation_rate_and_independence():
    """15 % of the tokens, in every column and iteration; iterations are independent of each other."""
    rows, width = 400, 25
    rollout = random_rollout(
        MASK, VOCAB, 0, canvas=1, prompt_lengths=[width - row % 5 for row in range(rows)], num_steps=[1] * rows
    )
    hits = torch.stack(
        [perturb_prompt(rollout, 0.15, rollout.view_seed, n).prompt_ids != rollout.prompt_ids for n in range(4)]
    )
    assert not hits[:, ~rollout.prompt_mask].any()
    tokens = int(rollout.prompt_mask.sum())
    for n in range(4):
        assert abs(hits[n].sum().item() / tokens - 0.15) < 4 * math.sqrt(0.15 * 0.85 / tokens)
    by_column = hits.sum(dim=(0, 1)) / (4 * rollout.prompt_mask.sum(dim=0))
    assert by_column.min() > 0.08 and by_column.max() < 0.23
    both = (hits[0] & hits[1]).sum().item() / tokens
    assert abs(both - 0.15**2) < 4 * math.sqrt(0.0225 / tokens)
    assert perturb_prompt(rollout, 0.0, rollout.view_seed, 0) is rollout
    everything = perturb_prompt(rollout, 1.0, rollout.view_seed, 0).prompt_ids
    assert everything[rollout.prompt_mask].eq(MASK).all()


def test_prompt_perturbation_does_not_depend_on_padding():
    """Identity 7: keyed by the token's index without padding."""
    narrow, wide = rollout_for_tests(), rollout_for_tests(width=12)
    for iteration in range(5):
        a = perturb_prompt(narrow, 0.5, narrow.view_seed, iteration)
        b = perturb_prompt(wide, 0.5, wide.view_seed, iteration)
        assert [unpadded(a, row) for row in range(5)] == [unpadded(b, row) for row in range(5)]


def record_draws(monkeypatch, *modules) -> dict[str, set[float]]:
    """What each module draws from now on."""
    seen = {module.__name__: set() for module in modules}

    def recorder(module, plain):
        def recording(*keys):
            draws = plain(*keys)
            seen[module.__name__].update(draws.flatten().tolist())
            return draws

        return recording

    for module in modules:
        monkeypatch.setattr(module, "uniform", recorder(module, module.uniform))
    return seen


def test_prompt_perturbation_never_shares_draws_with_the_sampler(models, monkeypatch):
    """docs/methods.md §2.6, `Purpose`: iteration 2 of the prompt draws must not be step 4 of the token draws."""
    seen = record_draws(monkeypatch, trl_dllm.generation.denoising, trl_dllm.likelihood.view)
    rollout = sample(
        models("llada"), seeds=hash64(0, torch.arange(4)), block_length=12, diffusion_steps=12, remasking="random"
    )
    for iteration in range(8):
        perturb_prompt(rollout, 0.5, rollout.view_seed, iteration)
    sampler, prompt = seen["trl_dllm.generation.denoising"], seen["trl_dllm.likelihood.view"]
    assert len(sampler) > 500 and len(prompt) > 100
    assert not sampler & prompt


@pytest.mark.parametrize("name", ["pkl 3", "pkl_u", "elbo", "coupled_elbo", "spg"])
def test_prompt_perturbation_never_shares_draws_with_the_estimator(monkeypatch, name):
    """Or the prompt tokens that are masked would say which completion tokens are scored."""
    estimator, rollout = ALL[name], rollout_for_tests()
    modules = (trl_dllm.likelihood.view, trl_dllm.likelihood.elbo, trl_dllm.likelihood.spg)
    seen = record_draws(monkeypatch, trl_dllm.noise, *modules)
    for iteration in range(4):
        perturb_prompt(rollout, 0.5, rollout.view_seed, iteration)
        for n in range(estimator.num_views(rollout)):
            estimator.view(rollout, n, rollout.view_seed, iteration)
    prompt = seen.pop("trl_dllm.likelihood.view")
    views = set().union(*seen.values())  # of `random_ranks`, and the bounds' own
    assert len(prompt) > 70 and len(views) > 150
    assert not prompt & views
