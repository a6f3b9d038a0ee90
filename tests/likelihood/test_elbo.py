"""The evidence lower bound and its coupled form: docs/methods.md §7: identities 7, 8 and 11."""

import itertools
import math

import pytest
import torch
from cases import ELBO, MASK, SHIFT, many_rows, rollout_for_tests
from oracles import (
    canvas_of,
    chi_square_p,
    codes,
    enumerate_trajectories,
    hits,
    joint_table,
    masked_score,
    random_table,
    trajectories_rollout,
)

import trl_dllm.likelihood.elbo
from trl_dllm.likelihood import CoupledElbo, Elbo, token_logps


def test_elbo_equals_slow_oracle(models, family):
    """Each draw of l positions has weight R / l, draws are averaged; a row's total is spread over its n positions."""
    model, rollout = models(family), rollout_for_tests(seed=2)
    total = rollout.counted.sum(dim=1)
    for samples in (1, 3):
        expected = torch.zeros(rollout.counted.shape, dtype=torch.float64)
        for n in range(samples):
            chosen = hits(Elbo(samples), rollout, n)
            assert torch.equal(canvas_of(Elbo(samples), rollout, n) != MASK, rollout.revealed & ~chosen)
            for row in range(len(rollout)):
                members = chosen[row].nonzero().flatten().tolist()
                assert members and not (chosen[row] & ~rollout.counted[row]).any()
                for i, value in masked_score(model, rollout, row, members, SHIFT[family]).items():
                    expected[row, i] += (value * int(total[row]) / len(members) / samples).item()
        with torch.no_grad():
            scores = token_logps(model, rollout, Elbo(samples))
        for row in range(len(rollout)):
            share = expected[row].sum().item() / int(total[row])
            expected[row] = torch.tensor([share * counted for counted in rollout.counted[row].tolist()])
        torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=0)
        assert torch.equal(scores.scored, rollout.counted)


def test_identity_11_a_coupled_pair_scores_every_counted_position_once(models, family):
    """A pair's two sets are complementary; log-probs have weight 1 and the pairs are averaged."""
    model, rollout = models(family), rollout_for_tests(seed=3)
    for samples in (2, 4):
        expected = torch.zeros(rollout.counted.shape, dtype=torch.float64)
        for n in range(0, samples, 2):
            pair = [hits(CoupledElbo(samples), rollout, n + j) for j in range(2)]
            assert not (pair[0] & pair[1]).any() and torch.equal(pair[0] | pair[1], rollout.counted)
            for chosen, row in itertools.product(pair, range(len(rollout))):
                members = chosen[row].nonzero().flatten().tolist()
                for i, value in masked_score(model, rollout, row, members, SHIFT[family]).items():
                    expected[row, i] += value.item() / (samples // 2)
        with torch.no_grad():
            scores = token_logps(model, rollout, CoupledElbo(samples))
        torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=0)
        assert torch.equal(scores.scored, rollout.counted)
        same = Elbo(samples, coupled=True)
        assert torch.equal(token_logps(model, rollout, same).logps, token_logps(model, rollout, same).logps)


def test_elbo_draws_are_uniform_in_size_and_then_among_sets():
    rollout = many_rows(rows=8000)
    for estimator, views in ((Elbo(2), (0, 1)), (CoupledElbo(2), (0,))):
        for n in views:
            chosen = hits(estimator, rollout, n)
            size = chosen.sum(dim=1)
            assert chi_square_p(torch.bincount(size, minlength=5)[1:], [2000] * 4) > 1e-3
            for number in (1, 2, 3):
                _, count = torch.unique(codes(chosen[size == number]), return_counts=True)
                expected = math.comb(4, number)
                assert len(count) == expected
                assert chi_square_p(count, [count.sum().item() / expected] * expected) > 1e-3
    equal = sum(1 / math.comb(4, number) for number in range(1, 5)) / 16
    sets = [hits(Elbo(2), rollout, n, iteration) for n, iteration in ((0, 0), (1, 0), (0, 1))]
    for a, b in itertools.combinations(sets, 2):  # two draws of a row, and a draw of two iterations
        assert abs((codes(a) == codes(b)).double().mean().item() - equal) < 0.015, "draws are independent"
        assert abs((a.sum(dim=1) == b.sum(dim=1)).double().mean().item() - 1 / 4) < 0.02, "and so are their sizes"


def enumerated_rollout(monkeypatch, model, tokens):
    """A row for every (l, order) of the ELBO's draw, all equally likely, and the library made to draw them."""
    total = len(tokens)
    draws = [(number, order) for number in range(1, total + 1) for order in itertools.permutations(range(total))]
    rows = len(draws)
    rollout = trajectories_rollout(
        model,
        [],
        prompt_ids=torch.zeros(rows, 0, dtype=torch.int64),
        prompt_mask=torch.zeros(rows, 0, dtype=torch.bool),
        completion_ids=torch.tensor(tokens).expand(rows, -1),
        unmask_step=torch.zeros(rows, total, dtype=torch.int64),
        logps=torch.zeros(rows, total, dtype=torch.float64),
        counted=torch.ones(rows, total, dtype=torch.bool),
        view_seed=torch.arange(rows),
    )
    lengths = torch.tensor([(number - 0.5) / total for number, _ in draws], dtype=torch.float64)
    orders = torch.tensor([order for _, order in draws])
    monkeypatch.setattr(trl_dllm.likelihood.elbo, "uniform", lambda seeds, *_: lengths[seeds])
    monkeypatch.setattr(trl_dllm.likelihood.elbo, "random_ranks", lambda counted, seeds, *_: orders[seeds])
    return rollout


@pytest.mark.parametrize("make", [random_table, joint_table], ids=["any conditionals", "of one joint"])
def test_identity_8_the_expected_elbo_is_below_the_log_marginal(monkeypatch, make):
    """One token a step, one block, a random order: the mean over all draws is the bound, E_order log p(values|order),
    and below log E_order p(values|order). The coupled form is no bound."""
    model = make(3, 3, seed=7)
    by_canvas = {}
    for t in enumerate_trajectories(model, "random", [1, 1, 1]):
        by_canvas.setdefault(t.tokens, []).append((t.order_prob, t.log_prob.item()))
    assert sum(p * math.exp(log_p) for ts in by_canvas.values() for p, log_p in ts) == pytest.approx(1, abs=1e-10)
    gaps, coupled_gaps = [], []
    for tokens, found in by_canvas.items():
        marginal = math.log(sum(p * math.exp(log_p) for p, log_p in found))
        bound = sum(p * log_p for p, log_p in found)
        rollout = enumerated_rollout(monkeypatch, model, tokens)
        with torch.no_grad():
            elbo = token_logps(model, rollout, Elbo(1)).logps.sum(dim=1).mean().item()
            coupled = token_logps(model, rollout, CoupledElbo(2)).logps.sum(dim=1).mean().item()
            for samples in (1, 2, 4):  # the starts 1/6, 1/2 and 5/6 meet each number of positions equally often
                spread = token_logps(model, rollout, Elbo(samples, stratified=True)).logps.sum(dim=1).mean().item()
                assert spread == pytest.approx(bound, abs=1e-9)
        assert elbo == pytest.approx(bound, abs=1e-9)
        assert elbo <= marginal + 1e-9
        gaps.append(marginal - elbo)
        coupled_gaps.append(elbo - coupled)
    assert max(gaps) > 1e-2 if make is random_table else max(map(abs, gaps)) < 1e-9
    assert max(map(abs, coupled_gaps)) > 1e-2


@pytest.mark.parametrize("p_mask_prompt", [0.0, 0.4])
@pytest.mark.parametrize("name", ELBO)
def test_identity_7_scores_do_not_depend_on_the_batch(models, family, name, p_mask_prompt):
    """Left padding, batch order, batch size and micro-batching."""
    estimator = ELBO[name]
    model, rollout = models(family), rollout_for_tests(seed=9)
    settings = {"p_mask_prompt": p_mask_prompt, "iteration": 2}
    with torch.no_grad():
        scores = token_logps(model, rollout, estimator, **settings)
        variants = [
            token_logps(model, rollout_for_tests(seed=9, width=12), estimator, **settings),
            token_logps(model, rollout, estimator, batch_size=2, **settings),
        ]
        for other in variants:
            torch.testing.assert_close(other.logps, scores.logps, atol=1e-5, rtol=0)
            assert torch.equal(other.scored, scores.scored)
        order = torch.tensor([3, 0, 4, 1, 2])
        shuffled = token_logps(model, rollout[order], estimator, **settings)
        torch.testing.assert_close(shuffled.logps, scores.logps[order], atol=1e-5, rtol=0)
        for row in range(5):
            alone = token_logps(model, rollout[slice(row, row + 1)], estimator, **settings)
            torch.testing.assert_close(alone.logps[0], scores.logps[row], atol=1e-5, rtol=0)
            assert torch.equal(alone.scored[0], scores.scored[row])


def test_impossible_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        Elbo(0)
    with pytest.raises(ValueError, match="num_samples=3 must be even"):
        CoupledElbo(3)


def test_stratified_draws_mask_numbers_spread_over_the_row():
    """Eight counted positions and four draws: one of 1 or 2, one of 3 or 4, …, each as often as the other."""
    rollout = many_rows(rows=2000, counted=(1,) * 8)
    sizes = torch.stack([hits(Elbo(4, stratified=True), rollout, n).sum(dim=1) for n in range(4)])
    assert torch.equal((sizes - 1) // 2, torch.arange(4)[:, None].expand(-1, 2000))
    for size in sizes:
        assert abs((size % 2).double().mean().item() - 0.5) < 0.05
    _, count = torch.unique(codes(hits(Elbo(4, stratified=True), rollout, 0)), return_counts=True)
    assert len(count) == 8 + 28, "the positions are drawn as before"


def test_stratified_draws_have_less_variance_where_the_number_of_masks_matters():
    """A token's log-prob is -l / R where l of R are masked, so that a draw's bound is -l: of variance 5.25 for R = 8,
    a quarter of it for four independent draws, and 1/4 for four that are two apart and share their start."""
    rollout, variances = many_rows(rows=8000, counted=(1,) * 8), []
    for estimator in (Elbo(4), Elbo(4, stratified=True)):
        bound = 0
        for n in range(4):
            view = estimator.view(rollout, n, rollout.view_seed, 0)
            masked = (view.targets != -100).sum(dim=1, keepdim=True)
            bound = bound - (view.weight * (view.targets != -100) * masked / 8).sum(dim=1)
        assert bound.mean().item() == pytest.approx(-4.5, abs=0.05)
        variances.append(bound.var().item())
    assert variances == pytest.approx([5.25 / 4, 0.25], rel=0.06)
