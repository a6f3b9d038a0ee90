"""SPG's bounds: docs/methods.md §2.9."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import CANVAS, MASK, SHIFT, many_rows, rollout_for_tests
from oracles import (
    canvas_of,
    chi_square_p,
    codes,
    enumerate_trajectories,
    full_logits,
    hits,
    joint_table,
    random_table,
    token_distribution,
    trajectories_rollout,
    unpadded,
)

import trl_dllm.likelihood.spg
from trl_dllm.likelihood import Elbo, SandwichedBounds, token_logps


# Of `rollout_for_tests`, whose rows differ in everything.
SIGNS = torch.tensor([1.0, -1.0, -0.5, 0.0, -2.0])
UPPER = torch.tensor([False, True, True, False, True])


def slow_bounds(model, rollout, estimator, shift, iteration=0):
    """(lower, upper) of each row, one draw and one token at a time, with a graph."""
    lower, upper = [], []
    for row in range(len(rollout)):
        tokens, prompt = rollout.completion_ids[row].tolist(), unpadded(rollout, row)
        total = int(rollout.counted[row].sum())
        draws, below = {}, 0.0
        for n in range(estimator.num_samples):
            masked = hits(estimator, rollout, n, iteration)[row].nonzero().flatten().tolist()
            logits = full_logits(model, prompt + canvas_of(estimator, rollout, n, iteration)[row].tolist())
            for i in masked:
                p = token_distribution(logits[len(prompt) + i - shift], MASK)[tokens[i]]
                weight = total / len(masked)
                draws.setdefault(i, []).append((weight, p))
                below = below + weight * p.log() / estimator.num_samples
        above = 0.0
        for pairs in draws.values():
            mean = sum(w * p**estimator.eubo_beta for w, p in pairs) / sum(w for w, _ in pairs)
            above = above + mean.log() / estimator.eubo_beta
        lower.append(below)
        upper.append(above * total / len(draws))
    return torch.stack(lower), torch.stack(upper)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 2, "block_length": 4, "p_mask_clean": 0.3},
        {"num_samples": 3, "eubo_beta": 2.0, "mix_weight": 1.0, "block_length": 3},
        {"num_samples": 4, "eubo_beta": 1.0, "mix_weight": 0.3},
        {"num_samples": 1, "block_length": 2},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_value_and_gradient_equal_a_slow_oracle(models, family, settings):
    """The lower bound where the advantage is 0 or more, else the mix; a row's number is spread over its positions."""
    model, estimator = models(family), SandwichedBounds(**settings)
    rollout = rollout_for_tests(seed=2)
    total = rollout.counted.sum(dim=1)
    lower, upper = slow_bounds(model, rollout, estimator, SHIFT[family], iteration=1)
    want = torch.where(UPPER, estimator.mix_weight * upper + (1 - estimator.mix_weight) * lower, lower)
    scores = token_logps(model, replace(rollout, advantages=SIGNS), estimator, temperature=1.0, iteration=1)
    shares = (want / total)[:, None] * rollout.counted
    torch.testing.assert_close(scores.logps, shares, atol=1e-9, rtol=0)
    assert torch.equal(scores.scored, rollout.counted)
    if estimator.num_samples > 1:
        assert (upper - lower)[UPPER].abs().min() > 1e-2

    weight = torch.tensor([0.3, 1.1, -0.7, 0.9, 0.5], dtype=torch.float64)
    parameters = list(model.parameters())
    got = torch.autograd.grad((weight * scores.logps.sum(dim=1)).sum(), parameters)
    expected = torch.autograd.grad((weight * want).sum(), parameters)
    scale = max(g.abs().max() for g in expected)
    assert scale > 1e-3 and max((a - b).abs().max() for a, b in zip(got, expected, strict=True)) < 1e-9 * scale

    with torch.no_grad():  # not known, or (B, L) as where an engine's weights are in it
        unknown = token_logps(model, rollout, estimator, temperature=1.0, iteration=1)
        torch.testing.assert_close(unknown.logps.sum(dim=1), lower, atol=1e-9, rtol=0)
        table = SIGNS[:, None] * torch.rand(rollout.counted.shape)
        table[:, 0] = 0  # a weight that `token_mask` has taken
        weighted = replace(rollout, advantages=table)
        same = token_logps(model, weighted, estimator, temperature=1.0, iteration=1)
        torch.testing.assert_close(same.logps, scores.logps)


@pytest.mark.parametrize(("size", "p_mask_clean"), [(None, 0.4), (2, 0.0), (2, 0.4), (4, 0.0), (4, 0.4), (12, 0.0)])
def test_a_draw_shows_the_blocks_before_its_own_and_masks_those_behind(size, p_mask_clean):
    estimator, length = SandwichedBounds(3, block_length=size, p_mask_clean=p_mask_clean), size or CANVAS
    hit = clean = 0
    for seed, iteration in ((0, 0), (1, 3), (2, 0)):
        rollout = rollout_for_tests(seed=seed)
        for row in range(len(rollout)):
            counted, revealed = rollout.counted[row].tolist(), rollout.revealed[row].tolist()
            used = {i // length for i in range(CANVAS) if counted[i]}
            seen = []
            for n in range(3):
                shown = (canvas_of(estimator, rollout, n, iteration)[row] != MASK).tolist()
                scored = hits(estimator, rollout, n, iteration)[row].tolist()
                assert scored == [counted[i] and not shown[i] for i in range(CANVAS)], "what is masked is scored"
                fits = []
                for block in used:
                    before = [i for i in range(CANVAS) if i // length < block and revealed[i]]
                    inside = [i for i in range(CANVAS) if i // length == block]
                    behind = [i for i in range(CANVAS) if i // length > block]
                    kept = all(shown[i] for i in before if p_mask_clean == 0 or not counted[i])
                    some = any(counted[i] and not shown[i] for i in inside)
                    if kept and some and not any(shown[i] for i in behind):
                        fits.append(block)
                        assert not any(shown[i] for i in inside if not counted[i])
                assert fits
                if len(fits) == 1:
                    seen.append(fits[0])
                    before = [i for i in range(CANVAS) if i // length < fits[0] and counted[i]]
                    hit, clean = hit + sum(not shown[i] for i in before), clean + len(before)
            if p_mask_clean == 0 and len(used) >= 3 and len(seen) == 3:
                assert len(set(seen)) == 3, "draws of different blocks"
    assert clean > 10 or length >= CANVAS
    assert 0.2 * clean <= hit <= 0.6 * clean if p_mask_clean else hit == 0


def test_draws_are_uniform_in_blocks_and_in_sizes_and_then_among_sets():
    """Blocks of three, the second of which counts two positions; rows, draws and iterations differ."""
    rollout = many_rows(rows=8000, counted=(1, 1, 1, 0, 1, 1))
    estimator = SandwichedBounds(2, block_length=3)
    masks = [hits(estimator, rollout, n, iteration) for n, iteration in ((0, 0), (1, 0), (0, 1))]
    first = [mask[:, :3].any(dim=1) for mask in masks]  # a draw of the second block masks nothing of the first
    assert torch.equal(first[0], ~first[1]), "two draws, two blocks"
    assert abs((first[0] == first[2]).double().mean().item() - 0.5) < 0.03, "drawn anew in each iteration"
    for mask, of_first in zip(masks, first, strict=True):
        assert chi_square_p(torch.bincount(of_first.long()), [4000] * 2) > 1e-3
        for inside, positions in ((mask[of_first][:, :3], 3), (mask[~of_first][:, 4:], 2)):
            size = inside.sum(dim=1)
            assert chi_square_p(torch.bincount(size)[1:], [len(size) / positions] * positions) > 1e-3
            _, count = torch.unique(codes(inside[size == 1]), return_counts=True)
            assert len(count) == positions and chi_square_p(count, [count.sum() / positions] * positions) > 1e-3
        assert mask[of_first][:, 4:].all() and not mask[:, 3].any()


def test_more_draws_than_blocks_take_them_in_turn():
    """Two of three blocks have counted positions: of four draws two are of each."""
    rollout, estimator = many_rows(rows=50, counted=(1, 1, 1, 1, 0, 0)), SandwichedBounds(4, block_length=2)
    of_first = sum(hits(estimator, rollout, n)[:, :2].any(dim=1).long() for n in range(4))
    assert of_first.tolist() == [2] * 50


def test_clean_positions_are_masked_by_each_draw_for_itself():
    """Blocks of one position: the first is masked by both draws if neither is of it and both hit it (1/3 · 1/4), or if
    one is of it and the other hits it (2/3 · 1/2)."""
    rollout, estimator = many_rows(rows=6000, counted=(1, 1, 1)), SandwichedBounds(2, block_length=1, p_mask_clean=0.5)
    both = hits(estimator, rollout, 0)[:, 0] & hits(estimator, rollout, 1)[:, 0]
    assert both.double().mean().item() == pytest.approx(5 / 12, abs=0.02)


def random_numbers(estimator, rollout):
    """Log-probs (M, B, L) of a made-up model, weighted as the scorer does it, and the weights."""
    generator = torch.Generator().manual_seed(4)
    logps = -3 * torch.rand(estimator.num_samples, *rollout.counted.shape, generator=generator, dtype=torch.float64)
    weights = torch.zeros_like(logps)
    for n in range(estimator.num_samples):
        view = estimator.view(rollout, n, rollout.view_seed, 0)
        weights[n].scatter_add_(1, view.index, view.weight.to(weights.dtype) * (view.targets != -100))
    return logps, weights


def test_the_upper_bound_grows_with_beta_from_the_mean_of_the_same_draws():
    """Of each token, whatever the draws and weights: a power mean. The lower bound weighs tokens otherwise, so that of
    a row's two numbers nothing is promised unless all tokens have one weight; then the upper one is above it."""
    rollout = replace(rollout_for_tests(seed=1), advantages=-torch.ones(5))
    values = []
    for beta in (1e-7, 0.5, 1.0, 1.5, 4.0):
        estimator = SandwichedBounds(6, eubo_beta=beta, mix_weight=1.0, block_length=4)
        logps, weights = random_numbers(estimator, rollout)
        values.append(estimator.assemble(logps * weights, rollout, rollout.view_seed, 0).sum(dim=1))
    total, scored = weights.sum(dim=0), weights.sum(dim=0) > 0
    mean = ((weights * logps).sum(dim=0) / total.clamp(min=1e-9)).masked_fill(~scored, 0).sum(dim=1)
    mean = mean * rollout.counted.sum(dim=1) / scored.sum(dim=1)
    torch.testing.assert_close(values[0], mean, atol=1e-5, rtol=0)
    for smaller, larger in itertools.pairwise(values):
        assert (larger > smaller + 1e-6).all()


def every_draw(monkeypatch, model, tokens, **settings):
    """A row of those tokens and an estimator whose M draws are every (l, order) of one block, all equally likely."""
    total = len(tokens)
    draws = [(number, order) for number in range(1, total + 1) for order in itertools.permutations(range(total))]
    rollout = trajectories_rollout(
        model,
        [],
        prompt_ids=torch.zeros(1, 0, dtype=torch.int64),
        prompt_mask=torch.zeros(1, 0, dtype=torch.bool),
        completion_ids=torch.tensor([tokens]),
        unmask_step=torch.zeros(1, total, dtype=torch.int64),
        logps=torch.zeros(1, total, dtype=torch.float64),
        counted=torch.ones(1, total, dtype=torch.bool),
        view_seed=torch.arange(1),
    )

    def place(seeds, purpose, iteration, n, *_):
        return torch.tensor([(draws[n][0] - 0.5) / total], dtype=torch.float64)

    def ranks(keep, seeds, purpose, iteration, n, kind):
        return torch.tensor([draws[n][1]]) if kind else torch.zeros_like(keep, dtype=torch.int64)

    monkeypatch.setattr(trl_dllm.likelihood.spg, "uniform", place)
    monkeypatch.setattr(trl_dllm.likelihood.spg, "random_ranks", ranks)
    return rollout, SandwichedBounds(len(draws), **settings)


def by_orders(model, tokens):
    """For each order, all equally likely: log p of each token, in the order's place of it."""
    found = []
    for order in itertools.permutations(range(len(tokens))):
        canvas, logps = [model.config.mask_token_id] * len(tokens), [0.0] * len(tokens)
        for i in order:
            logps[i] = model.conditional(canvas, i)[tokens[i]].item()
            canvas[i] = tokens[i]
        found.append(logps)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("make", [random_table, joint_table], ids=["any conditionals", "of one joint"])
def test_what_the_expected_bounds_bound(monkeypatch, make, beta):
    """Of one token a step in a random order, over all draws: the lower bound is below log p, and the upper above the
    lower. It is above log p where the conditionals are of one joint distribution: the lower one is then log p. Where
    they are not, it need not be, since a mean of products has become a product of means: (1/β) log E Π π^β, Rényi's
    bound, is above log p always, and is what the upper bound replaces."""
    model = make(3, 3, seed=7)
    marginals = {}
    for t in enumerate_trajectories(model, "random", [1, 1, 1]):
        marginals[t.tokens] = marginals.get(t.tokens, 0) + t.order_prob * math.exp(t.log_prob.item())
    assert sum(marginals.values()) == pytest.approx(1, abs=1e-10)
    gaps, below = [], 0
    for tokens, p in marginals.items():
        orders = by_orders(model, tokens)
        rollout, estimator = every_draw(monkeypatch, model, tokens, eubo_beta=beta, mix_weight=1.0)
        with torch.no_grad():
            lower = token_logps(model, rollout, estimator).logps.sum().item()
            negative = replace(rollout, advantages=-torch.ones(1))
            upper = token_logps(model, negative, estimator).logps.sum().item()
        assert lower == pytest.approx(orders.sum(dim=1).mean().item(), abs=1e-9)
        assert upper == pytest.approx(((beta * orders).exp().mean(dim=0).log() / beta).sum().item(), abs=1e-9)
        renyi = (beta * orders.sum(dim=1)).exp().mean().log().item() / beta
        assert lower <= math.log(p) + 1e-9 and lower <= upper + 1e-9 and math.log(p) <= renyi + 1e-9
        below += upper < math.log(p) - 1e-3
        gaps.append((math.log(p) - lower, upper - math.log(p)))
    if make is joint_table:
        assert max(abs(gap) for gap, _ in gaps) < 1e-9 and min(gap for _, gap in gaps) > -1e-9 and below == 0
        assert max(gap for _, gap in gaps) > 1e-2
    else:
        assert max(gap for gap, _ in gaps) > 1e-2
        assert below == {1.0: 5, 2.0: 0}[beta], "of eight canvases, by up to 0.18 nats"


def test_one_block_of_unmixed_lower_bounds_is_the_elbo():
    """The same sets, sizes and weights as `Elbo`'s, of its expectation; drawn by other numbers."""
    rollout = many_rows(rows=6000, counted=(1, 1, 0, 1))
    for estimator in (Elbo(2), SandwichedBounds(2)):
        chosen = hits(estimator, rollout, 1)
        view = estimator.view(rollout, 1, rollout.view_seed, 0)
        weight = (view.weight * (view.targets != -100)).sum(dim=1)
        torch.testing.assert_close(weight, torch.full_like(weight, 3 / 2))
        _, count = torch.unique(codes(chosen), return_counts=True)
        assert chi_square_p(count, [2000 / math.comb(3, size) for size in (1, 1, 2, 1, 2, 2, 3)]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"eubo_beta": 0.0}, "eubo_beta=0.0 must be a number above 0"),
        ({"mix_weight": 1.5}, r"mix_weight=1.5 must be in \[0, 1\]"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"p_mask_clean": 1.0}, r"p_mask_clean=1.0 must be in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SandwichedBounds(**settings)
