"""PADRE's pseudo-likelihoods: docs/methods.md §7: identities 1, 5 and 7.

Identities 3 and 4, of `TrajectoryPseudoLikelihood`, are in test_any_order.py; identity 6 is in
trainer/test_grpo_padre.py.
"""

from dataclasses import replace

import pytest
import torch
from cases import CANVAS, MASK, PKL, PKL_UNSHIFTED, SHIFT, many_rows, rollout_for_tests
from oracles import assemble, canvas_of, chi_square_p, codes, hits, masked_score, sharp_model, slow_views

from trl_dllm.likelihood import (
    BlockPseudoLikelihood,
    MeanField,
    PseudoLikelihood,
    StepMerge,
    TrajectoryPseudoLikelihood,
    perturb_prompt,
    token_logps,
)


# ---------------------------------------------------------------------------------------------- PKL and PKL-U's values


def test_pkl_equals_masking_one_token_at_a_time(models, family):
    """PADRE Eq. 16: every counted token given all others; what is behind the EOS or never revealed is context."""
    model, rollout = models(family), rollout_for_tests()
    expected = {}
    for row in range(len(rollout)):
        for i in rollout.counted[row].nonzero().flatten().tolist():
            expected[row, i] = masked_score(model, rollout, row, [i], SHIFT[family], temperature=0.7)[i]
    with torch.no_grad():
        scores = token_logps(model, rollout, PseudoLikelihood(), temperature=0.7)
    torch.testing.assert_close(scores.logps, assemble(rollout, expected).detach(), atol=1e-5, rtol=0)
    assert torch.equal(scores.scored, rollout.counted)


@pytest.mark.parametrize("name", PKL)
def test_pkl_and_pkl_u_equal_slow_oracle(models, family, name):
    """Each view masks exactly its set and scores it (PADRE Eq. 31)."""
    model, rollout, estimator = models(family), rollout_for_tests(seed=1), PKL[name]
    with torch.no_grad():
        scores = token_logps(model, rollout, estimator, temperature=0.8)
        expected = slow_views(model, rollout, estimator, SHIFT[family], temperature=0.8)
    torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=0)
    for n in range(estimator.num_views(rollout)):
        shown = canvas_of(estimator, rollout, n) != MASK
        assert torch.equal(shown, rollout.revealed & ~hits(estimator, rollout, n)), "masked is scored, shown is not"


def isolated_logits(model, ids):
    """One row in which no column that holds a mask is visible to another row; the mask written out by loops."""
    allowed = torch.tensor([[key != MASK or q == k for k, key in enumerate(ids)] for q in range(len(ids))])
    out = model(input_ids=torch.tensor([ids]), attention_mask=allowed[None, None], use_cache=False)
    return out.logits[0].double()


@pytest.mark.parametrize("name", ["pkl_u isolated", "pkl_u isolated partition"])
def test_isolated_masks_equal_a_dense_mask_by_loops(models, name):
    """PADRE §4.4's wording: no row attends to a masked position but itself, never-revealed ones included."""
    model, rollout, estimator = models("llada"), rollout_for_tests(seed=2), PKL_UNSHIFTED[name]
    with torch.no_grad():
        scores = token_logps(model, rollout, estimator)
        expected = slow_views(model, rollout, estimator, 0, logits=isolated_logits)
        plain = slow_views(model, rollout, estimator, 0)
    torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-2, "isolation should be another number"


def test_isolated_values_do_not_depend_on_how_many_masks_there_are(models):
    """With isolation a set's members do not see each other, so only what is shown counts."""
    model, rollout = models("llada", torch.float64, "eager"), rollout_for_tests(seed=3)
    with torch.no_grad():
        full = token_logps(model, rollout, BlockPseudoLikelihood(CANVAS, 1, "isolated")).logps
        none = torch.full_like(rollout.unmask_step, -1)
        for i in range(CANVAS):
            keep = torch.arange(CANVAS) == i
            alone = replace(
                rollout,
                completion_ids=rollout.completion_ids.masked_fill(~keep, MASK),
                unmask_step=torch.where(keep, rollout.unmask_step, none),
                counted=rollout.counted & keep,
            )
            one = token_logps(model, alone, BlockPseudoLikelihood(CANVAS, 1, "isolated")).logps
            torch.testing.assert_close(one[:, i], full[:, i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", [PseudoLikelihood(3), BlockPseudoLikelihood(4, 2)], ids=["pkl", "pkl_u"])
def test_gradients_equal_full_logits(family, estimator):
    model, rollout = sharp_model(family), rollout_for_tests(num_steps=(9, 3, 1, 5), prompt_lengths=(4, 1, 6, 2))
    weight = torch.randn(rollout.counted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(model.parameters())
    got = torch.autograd.grad((weight * token_logps(model, rollout, estimator).logps).sum(), parameters)
    want = torch.autograd.grad((weight * slow_views(model, rollout, estimator, SHIFT[family])).sum(), parameters)
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), name


# -------------------------------------------------------------------------------------------------- identities 1 and 5


def test_identity_1_pkl_u_of_the_whole_canvas_is_the_mean_field(models, family):
    """Equal view tensors, so equal bits: behind the EOS everything is masked as well."""
    rollout = rollout_for_tests(dtype=torch.float32)
    trio = [StepMerge(1), MeanField(), BlockPseudoLikelihood(CANVAS, 1)]
    views = [estimator.view(rollout, 0, rollout.view_seed, 0) for estimator in trio]
    for other in views[1:]:
        for name in ("input_ids", "position_ids", "targets", "index", "weight"):
            assert torch.equal(getattr(views[0], name), getattr(other, name)), name
        assert torch.equal(views[0].attention.level, other.attention.level) and other.attention.reach is None
    with torch.no_grad():
        scores = [token_logps(models(family, torch.float32), rollout, estimator) for estimator in trio]
    for other in scores[1:]:
        assert torch.equal(scores[0].logps, other.logps) and torch.equal(scores[0].scored, other.scored)
        assert torch.equal(scores[0].entropies, other.entropies)


def test_identity_5_full_pkl_is_pkl_u_of_single_positions(models, family):
    model, rollout = models(family), rollout_for_tests(seed=4)
    with torch.no_grad():
        pkl, pkl_u = (
            token_logps(model, rollout, estimator)
            for estimator in (PseudoLikelihood(), BlockPseudoLikelihood(1, "partition"))
        )
        another = token_logps(model, rollout, PseudoLikelihood(), iteration=5)
    torch.testing.assert_close(pkl.logps, pkl_u.logps, atol=1e-5, rtol=0)
    assert torch.equal(pkl.scored, pkl_u.scored)
    torch.testing.assert_close(pkl.logps, another.logps, atol=1e-5, rtol=0)
    assert not PseudoLikelihood().stochastic and PseudoLikelihood(3).stochastic


# --------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("block, number", [(1, 3), (2, 2), (4, 1), (3, "partition"), (5, "partition")])
def test_pkl_u_draws_disjoint_sets_without_replacement(block, number):
    """Every set has m members while they last; a partition scores every counted position once."""
    estimator = BlockPseudoLikelihood(block, number)
    rollout = rollout_for_tests(seed=7)
    total = rollout.counted.sum(dim=1)
    sets = torch.stack([hits(estimator, rollout, n) for n in range(estimator.num_views(rollout))])
    assert sets.sum(dim=0).max() == 1
    for n, members in enumerate(sets):
        assert torch.equal(members.sum(dim=1), (total - n * block).clamp(0, block))
    if number == "partition":
        assert torch.equal(sets.any(dim=0), rollout.counted)
        assert len(sets) == -(-int(total.max()) // block)


def test_draws_are_uniform_over_pairs_of_positions():
    """PKL of K = 2 positions and PKL-U of one pair, four counted positions: twelve ordered pairs and six sets."""
    rollout = many_rows()
    first, second = (codes(hits(PseudoLikelihood(2), rollout, n)) for n in range(2))
    _, number = torch.unique(first * 64 + second, return_counts=True)
    assert len(number) == 12 and chi_square_p(number, [500] * 12) > 1e-3
    _, number = torch.unique(codes(hits(BlockPseudoLikelihood(2), rollout, 0)), return_counts=True)
    assert len(number) == 6 and chi_square_p(number, [1000] * 6) > 1e-3


# ------------------------------------------------------------------------------------------------ identity 7, and PKL⁺


@pytest.mark.parametrize("p_mask_prompt", [0.0, 0.4])
@pytest.mark.parametrize("name", [*PKL, *PKL_UNSHIFTED])
def test_identity_7_scores_do_not_depend_on_the_batch(models, family, name, p_mask_prompt):
    """Left padding, batch order, batch size and micro-batching."""
    if name in PKL_UNSHIFTED and family == "dream":
        pytest.skip("refused for shifted families")
    estimator = {**PKL, **PKL_UNSHIFTED}[name]
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


@pytest.mark.parametrize("estimator", [PseudoLikelihood(4), BlockPseudoLikelihood(3, 2)], ids=["pkl", "pkl_u"])
def test_pkl_plus_is_pkl_with_one_perturbed_prompt_for_all_views(models, family, estimator):
    model, rollout = models(family), rollout_for_tests(seed=1)
    perturbed = perturb_prompt(rollout, 0.5, rollout.view_seed, 3)
    assert not torch.equal(perturbed.prompt_ids, rollout.prompt_ids)
    with torch.no_grad():
        scores = token_logps(model, rollout, estimator, p_mask_prompt=0.5, iteration=3)
        expected = slow_views(model, perturbed, estimator, SHIFT[family], iteration=3)
    torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_impossible_arguments_are_refused_with_what_would_be_right():
    for make, match in (
        (lambda: PseudoLikelihood(0), "num_positions=0 must be at least 1, or None for all"),
        (lambda: BlockPseudoLikelihood(0), "block_size=0 must be at least 1"),
        (lambda: BlockPseudoLikelihood(2, 0), "num_views=0 must be at least 1, or 'partition'"),
        (lambda: BlockPseudoLikelihood(2, "all"), "num_views='all' must be at least 1, or 'partition'"),
        (lambda: BlockPseudoLikelihood(2, 1, "none"), "mask_attention='none' is unknown"),
        (lambda: TrajectoryPseudoLikelihood("both"), "clean_rows='both' is unknown"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.parametrize("name", PKL_UNSHIFTED)
def test_shifted_families_are_refused_where_no_row_predicts_the_token(models, name):
    with pytest.raises(ValueError, match="logits_shift=1"):
        token_logps(models("dream"), rollout_for_tests(), PKL_UNSHIFTED[name])
