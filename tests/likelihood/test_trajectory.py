"""StepMerge, MeanField and ExactTrajectory: docs/methods.md §7: identities 1, 2, 7 and 8.

Identity 9, of the gradient, is in test_policy_gradient.py.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import MASK, PROMPTS, SHIFT, VOCAB, assert_same_scores, many_rows, rollout_for_tests, sample, whole_canvas
from oracles import (
    canvas_before,
    enumerate_trajectories,
    full_logits,
    joint_table,
    probabilities,
    random_table,
    segment_cuts,
    sharp_model,
    slow_step_merge,
    token_distribution,
    trajectories_rollout,
    unpadded,
)

from trl_dllm.likelihood import ESTIMATORS, ExactTrajectory, MeanField, SampledTrajectory, StepMerge, token_logps
from trl_dllm.models import create_tiny_model
from trl_dllm.noise import hash64
from trl_dllm.rollout import Rollout


VALUE_INDEPENDENT = ["random", "left_to_right", "margin", "entropy"]
ALL_ESTIMATORS = [MeanField(), StepMerge(2), StepMerge(4), StepMerge(20), ExactTrajectory()]


def names(estimator):
    return f"{type(estimator).__name__}{getattr(estimator, 'num_segments', '')}"


def draw(model, **settings):
    """A rollout whose rows differ in prompt length and steps (threshold or early stop), all of it counted."""
    settings = {"block_length": 4, "eos_token_ids": tuple(range(30, 45)), **settings}
    return whole_canvas(sample(model, seeds=hash64(0, torch.arange(len(PROMPTS))), **settings))


# -------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS, ids=names)
def test_scores_equal_slow_oracle(models, family, estimator):
    """Rows with prompts of 1 to 7 tokens, 1 to 9 steps and unrevealed positions; b_n = floor(n T / N) by row."""
    model, rollout = models(family), rollout_for_tests()
    assert len(set(rollout.num_steps.tolist())) == len(rollout) and not rollout.revealed.all()
    assert not torch.equal(rollout.counted, rollout.revealed)
    with torch.no_grad():
        scores = token_logps(model, rollout, estimator, temperature=0.7)
        segments = getattr(estimator, "num_segments", None)
        logps, entropies = slow_step_merge(model, rollout, segments, SHIFT[family], temperature=0.7)
    torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropies, entropies, atol=1e-5, rtol=0)
    assert torch.equal(scores.scored, rollout.counted), "what nobody counts is not scored"
    assert scores.logps[~scores.scored].eq(0).all() and scores.entropies[~scores.scored].eq(0).all()


def test_every_number_of_segments_equals_slow_oracle(models):
    """N = 1 … 12 around every row's own T."""
    model, rollout = models("llada"), rollout_for_tests(seed=1, num_steps=(9, 4, 7), prompt_lengths=(3, 6, 1))
    with torch.no_grad():
        for segments in range(1, 13):
            logps, _ = slow_step_merge(model, rollout, segments, shift=0)
            scores = token_logps(model, rollout, StepMerge(segments))
            torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0, msg=f"N={segments}")


@pytest.mark.parametrize("estimator", [MeanField(), StepMerge(3), ExactTrajectory()], ids=names)
def test_gradients_equal_full_logits(family, estimator):
    """Gradients of log-probs, and of entropies where asked for, for every parameter."""
    model, rollout = sharp_model(family), rollout_for_tests(num_steps=(9, 3, 1), prompt_lengths=(4, 1, 6))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, *rollout.completion_ids.shape, generator=generator, dtype=torch.float64)
    parameters = list(model.parameters())
    segments = getattr(estimator, "num_segments", None)
    logps, entropies = slow_step_merge(model, rollout, segments, SHIFT[family], temperature=0.8)
    for with_entropy in (False, True):
        scores = token_logps(model, rollout, estimator, temperature=0.8, differentiable_entropy=with_entropy)
        got = torch.autograd.grad((weight[0] * scores.logps + weight[1] * scores.entropies).sum(), parameters)
        total = (weight[0] * logps + (weight[1] * entropies if with_entropy else 0)).sum()
        want = torch.autograd.grad(total, parameters, retain_graph=True)
        for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), name


# ------------------------------------------------------------------------------------------------ views and identity 1


def test_identity_1_equal_view_tensors_and_bits(models, family):
    """StepMerge(1) and MeanField build equal views, so equal bits in the same batch."""
    model, rollout = models(family, torch.float32), rollout_for_tests(dtype=torch.float32)
    views = [estimator.view(rollout, 0, rollout.view_seed, 0) for estimator in (StepMerge(1), MeanField())]
    for name in ("input_ids", "position_ids", "targets", "index", "weight"):
        assert torch.equal(getattr(views[0], name), getattr(views[1], name)), name
    assert torch.equal(views[0].attention.level, views[1].attention.level)
    assert views[0].attention.reach is None and views[1].attention.reach is None
    assert StepMerge(1).num_views(rollout) == MeanField().num_views(rollout) == 1
    with torch.no_grad():
        one, field = (token_logps(model, rollout, estimator) for estimator in (StepMerge(1), MeanField()))
    assert torch.equal(one.logps, field.logps) and torch.equal(one.entropies, field.entropies)


def test_identity_1_views_as_written():
    """The tensors of one view, by hand: prompt ⊕ canvas before b_n, targets of the segment, unpadded positions."""
    rollout = Rollout(
        prompt_ids=torch.tensor([[0, 0, 7], [5, 6, 7]]),
        prompt_mask=torch.tensor([[0, 0, 1], [1, 1, 1]]),
        completion_ids=torch.tensor([[10, 11, 12, 13], [20, 3, 22, 23]]),
        unmask_step=torch.tensor([[3, 0, 2, 1], [0, -1, 0, 1]]),
        logps=torch.zeros(2, 4),
        counted=torch.tensor([[True, True, False, False], [True, False, True, True]]),
        view_seed=torch.tensor([1, 2]),
        mask_token_id=3,
    ).validate()
    view = StepMerge(3).view(rollout, 2, rollout.view_seed, 0)  # row 0: cuts 0, 1, 2, 4; row 1: cuts 0, 0, 1, 2
    assert view.input_ids.tolist() == [[0, 0, 7, 3, 11, 3, 13], [5, 6, 7, 20, 3, 22, 3]]
    assert view.targets.tolist() == [[-100, -100, -100, 10, -100, 12, -100], [-100] * 6 + [23]]
    assert view.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert view.index[:, 3:].tolist() == [[0, 1, 2, 3]] * 2
    assert (view.attention.level == 0).tolist() == [[False, False] + [True] * 5, [True] * 7]
    assert view.weight[:, 3:].eq(1).all()


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS, ids=names)
def test_views_partition_the_revealed_positions(estimator):
    """`disjoint`: every revealed position is the target of exactly one view; views beyond the last score nothing."""
    rollout = rollout_for_tests(seed=2)
    assert estimator.disjoint and not estimator.stochastic
    count = torch.zeros_like(rollout.completion_ids)
    for n in range(estimator.num_views(rollout) + 3):
        view = estimator.view(rollout, n, rollout.view_seed, 0)
        hit = view.targets[:, rollout.prompt_ids.shape[1] :] != -100
        assert (view.targets[:, : rollout.prompt_ids.shape[1]] == -100).all()
        assert not (n >= estimator.num_views(rollout) and hit.any())
        shown = view.input_ids[:, rollout.prompt_ids.shape[1] :] != MASK
        assert not (hit & shown).any(), "a scored token must not be shown"
        count += hit
    assert torch.equal(count, rollout.revealed.long())


def test_number_of_views():
    rollout = rollout_for_tests()
    assert ExactTrajectory().num_views(rollout) == 9 and ExactTrajectory().num_views(rollout[slice(1, 3)]) == 3
    assert StepMerge(5).num_views(rollout) == 5 and StepMerge().num_segments == 8
    with pytest.raises(ValueError, match="num_segments=0 must be at least 1"):
        StepMerge(0)
    assert {"mean_field", "step_merge", "exact_trajectory"} <= set(ESTIMATORS)


# ---------------------------------------------------------------------------------------------------------- identity 2


@pytest.mark.parametrize(
    "settings",
    [
        {"remasking": "low_confidence", "diffusion_steps": 9, "temperature": 0.8, "stop_at_eos": True},
        {"remasking": "random", "diffusion_steps": 6, "temperature": 1.0, "stop_at_eos": False},
        {"remasking": "margin", "confidence_threshold": 0.1, "temperature": 0.5, "stop_at_eos": True},
        {"remasking": "left_to_right", "diffusion_steps": 12, "temperature": 0.0, "stop_at_eos": False},
    ],
    ids=lambda s: s["remasking"],
)
def test_identity_2_exact_scores_equal_the_samplers(models, family, settings):
    """StepMerge(N) for every N >= T, and ExactTrajectory, give the sampler's own log-probs."""
    model = models(family)
    rollout = draw(model, **settings)
    longest = int(rollout.scheduled_steps.max())
    if settings.get("stop_at_eos"):
        assert not rollout.revealed.all() and len(rollout.num_steps.unique()) > 1
    with torch.no_grad():
        for estimator in [ExactTrajectory(), *(StepMerge(n) for n in (longest, longest + 1, 2 * longest + 3, 40))]:
            scores = token_logps(model, rollout, estimator)
            torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
            assert torch.equal(scores.scored, rollout.revealed)
        merged = token_logps(model, rollout, StepMerge(max(1, longest // 3)))
    assert (merged.logps - rollout.logps).abs().max() > 1e-2, "fewer cuts should be another number"


def test_identity_2_float32(models, family):
    model = models(family, torch.float32)
    rollout = draw(model, diffusion_steps=6, temperature=0.9, stop_at_eos=False)
    with torch.no_grad():
        scores = token_logps(model, rollout, ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=3e-5, rtol=0)  # logits have a spread of about 2


def test_identity_2_on_random_trajectories(models, family):
    """Steps in no order, steps without a token, positions never revealed: N >= T is N = T for every row."""
    model, rollout = models(family), rollout_for_tests(seed=3)
    with torch.no_grad():
        exact = token_logps(model, rollout, ExactTrajectory())
        for segments in (9, 10, 17, 31):
            assert_same_scores(token_logps(model, rollout, StepMerge(segments)), exact)
        for row in range(len(rollout)):
            alone = token_logps(model, rollout[slice(row, row + 1)], StepMerge(int(rollout.num_steps[row])))
            torch.testing.assert_close(alone.logps[0], exact.logps[row], atol=1e-5, rtol=0)


def test_identity_2_on_a_fresh_model(family):
    """Sampler and scorer both leave the mask out, whose probability is 1/V before training."""
    model, _ = create_tiny_model(family, hidden_size=16, num_layers=1)
    rollout = draw(model, diffusion_steps=6, stop_at_eos=False)
    with torch.no_grad():
        scores = token_logps(model, rollout, ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
    p = token_distribution(full_logits(model, unpadded(rollout, 0) + [MASK] * 12)[2].detach(), MASK)
    assert p[MASK] == 0 and abs(scores.logps.exp().mean().item() - 1 / (VOCAB - 1)) < 1e-3


# ----------------------------------------------------------------------------------------- some steps of the exact one


@pytest.mark.parametrize("number", [1, 2, 4, 40])
def test_sampled_steps_have_the_exact_trajectorys_log_probs(models, family, number):
    """Of K of a row's steps that revealed something counted, all of them if it has no more; and of whole steps."""
    model, rollout, estimator = models(family), rollout_for_tests(seed=2), SampledTrajectory(number)
    with torch.no_grad():
        exact = token_logps(model, rollout, ExactTrajectory(), temperature=0.7, iteration=3)
        scores = token_logps(model, rollout, estimator, temperature=0.7, iteration=3)
    torch.testing.assert_close(scores.logps, exact.logps.masked_fill(~scores.scored, 0), atol=1e-9, rtol=0)
    assert torch.equal(scores.logps != 0, scores.scored)
    weights = estimator.sampling_weights(rollout, rollout.view_seed, 3)
    shortened = 0
    for row in range(len(rollout)):
        counted = set(rollout.unmask_step[row][rollout.counted[row]].tolist())
        drawn = set(rollout.unmask_step[row][scores.scored[row]].tolist())
        assert len(drawn) == min(number, len(counted))
        whole = torch.isin(rollout.unmask_step[row], torch.tensor(sorted(drawn), dtype=torch.int64))
        assert torch.equal(scores.scored[row], whole & rollout.counted[row])
        assert weights[row].tolist() == pytest.approx([len(counted) / len(drawn)] * weights.shape[1])
        shortened += len(counted) < len(set(rollout.unmask_step[row][rollout.revealed[row]].tolist()))
    assert shortened, "a row with steps that revealed nothing counted"


@pytest.mark.parametrize("number", [1, 2, 40])
@pytest.mark.parametrize("alignment", ["position", "canvas"])
def test_steps_of_a_block_causal_model_are_drawn_for_all_blocks_at_once(alignment, number):
    """Of the steps that blocks replay beside each other, K; scored as the exact trajectory's, in K forwards."""
    model = sharp_model("sdar", block_size=4)
    model.config.block_alignment = alignment
    rollout = whole_canvas(sample(model, block_length=4, cache="exact", diffusion_steps=9, temperature=1.0))
    step, _ = rollout.replayed_steps()
    estimator = SampledTrajectory(number)
    with torch.no_grad():
        exact = token_logps(model, rollout, ExactTrajectory(), iteration=1)
        scores = token_logps(model, rollout, estimator, iteration=1)
    torch.testing.assert_close(scores.logps, exact.logps.masked_fill(~scores.scored, 0), atol=1e-9, rtol=0)
    weights = estimator.sampling_weights(rollout, rollout.view_seed, 1)
    for row in range(len(rollout)):
        drawn, steps = set(step[row][scores.scored[row]].tolist()), set(step[row].tolist())
        assert len(drawn) == min(number, len(steps)) and weights[row, 0].item() == len(steps) / len(drawn)
        assert torch.equal(scores.scored[row], torch.isin(step[row], torch.tensor(sorted(drawn))))
    assert estimator.num_views(rollout) == min(number, int(step.max()) + 1) < int(rollout.num_steps.max())


def test_every_set_of_steps_is_drawn_equally_often():
    """Four steps of 1, 1, 2 and 1 counted tokens, of which two are drawn; a fifth revealed nothing counted."""
    rollout = many_rows(6000, counted=(1, 1, 1, 1, 1, 0))
    steps = torch.tensor([2, 0, 4, 4, 1, 3]).expand(6000, -1)
    rollout = replace(rollout, unmask_step=steps)
    estimator = SampledTrajectory(2)
    scored = estimator.scored(rollout, rollout.view_seed, 5) & rollout.counted
    assert torch.equal(scored[:, 2], scored[:, 3])
    found = Counter(tuple(row) for row in scored[:, [0, 1, 2, 4]].tolist())
    assert len(found) == 6 and all(abs(count - 1000) < 4 * (1000 * 5 / 6) ** 0.5 for count in found.values())
    weights = estimator.sampling_weights(rollout, rollout.view_seed, 5)
    assert weights.eq(2).all() and (scored.double().mean(dim=0)[:5] - 0.5).abs().max() < 0.03


def test_steps_of_a_trajectory_are_at_least_one():
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        SampledTrajectory(0)


# ---------------------------------------------------------------------------------------------------------- identity 7


@pytest.mark.parametrize("p_mask_prompt", [0.0, 0.4])
@pytest.mark.parametrize("estimator", [*ALL_ESTIMATORS, SampledTrajectory(2)], ids=names)
def test_identity_7_scores_do_not_depend_on_the_batch(models, family, estimator, p_mask_prompt):
    """Left padding, batch order, batch size (rows together) and micro-batching (`batch_size`)."""
    model, rollout = models(family), rollout_for_tests(seed=4)
    kwargs = {"p_mask_prompt": p_mask_prompt, "iteration": 2}
    with torch.no_grad():
        scores = token_logps(model, rollout, estimator, **kwargs)
        wide = rollout_for_tests(seed=4, width=13)
        assert wide.prompt_ids.shape[1] == 13
        assert_same_scores(token_logps(model, wide, estimator, **kwargs), scores)
        for size in (1, 2, 4):
            assert_same_scores(token_logps(model, rollout, estimator, batch_size=size, **kwargs), scores)
        order = torch.tensor([3, 0, 4, 1, 2])
        shuffled = token_logps(model, rollout[order], estimator, **kwargs)
        torch.testing.assert_close(shuffled.logps, scores.logps[order], atol=1e-5, rtol=0)
        assert torch.equal(shuffled.scored, scores.scored[order])
        parts = [token_logps(model, rollout[part], estimator, **kwargs) for part in (slice(0, 2), slice(2, 5))]
        torch.testing.assert_close(torch.cat([p.logps for p in parts]), scores.logps, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------- identity 8: brute force


def exact_scores(model, trajectories, estimator, **kwargs):
    with torch.no_grad():
        return token_logps(model, trajectories_rollout(model, trajectories), estimator, **kwargs).logps.sum(dim=1)


SHAPES = [  # (canvas, vocab with the mask, schedule of a block, block length)
    (3, 4, [1, 1, 1], None),
    (4, 3, [2, 2], None),
    (4, 3, [2, 1, 1], None),
    (4, 3, [1, 1], 2),
    (3, 3, [3], None),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("remasking", VALUE_INDEPENDENT)
def test_identity_8_trajectory_probabilities_sum_to_one(remasking, shape):
    """Exact scores equal the oracle's; with the order's probabilities they sum to one. Several tokens a step too."""
    canvas, vocab, schedule, block = shape
    model = random_table(canvas, vocab, seed=canvas + vocab)
    trajectories = enumerate_trajectories(model, remasking, schedule, block, temperature=0.7)
    assert len({(t.tokens, t.steps) for t in trajectories}) == len(trajectories) >= (vocab - 1) ** canvas
    scores = exact_scores(model, trajectories, ExactTrajectory(), temperature=0.7)
    torch.testing.assert_close(scores, torch.stack([t.log_prob.detach() for t in trajectories]), atol=1e-10, rtol=0)
    order = torch.tensor([t.order_prob for t in trajectories], dtype=torch.float64)
    assert (order * scores.exp()).sum().item() == pytest.approx(1.0, abs=1e-10)
    if len(schedule) > 1 and block is None:
        mean_field = exact_scores(model, trajectories, MeanField(), temperature=0.7)
        assert (mean_field - scores).abs().max() > 0.1


def test_identity_8_value_dependent_orders_are_not_normalised():
    """Under low_confidence the product of the probabilities is no trajectory probability (docs/methods.md §3.1)."""
    model, mask, seen = random_table(3, 3, seed=9), 2, set()
    # Every trajectory that the sampler can take: a token is proposed at each masked position, the likeliest is kept.
    stack = [((mask,) * 3, (-1,) * 3, 0)]
    while stack:
        canvas, steps, step = stack.pop()
        masked = [i for i in range(3) if canvas[i] == mask]
        if not masked:
            seen.add((canvas, steps))
            continue
        for values in itertools.product(range(2), repeat=len(masked)):
            confidence = [model.conditional(canvas, i)[v].item() for i, v in zip(masked, values, strict=True)]
            best = max(range(len(masked)), key=lambda j: (confidence[j], -j))
            position, value = masked[best], values[best]
            new, when = list(canvas), list(steps)
            new[position], when[position] = value, step
            stack.append((tuple(new), tuple(when), step + 1))
    rollout = trajectories_rollout(
        model,
        [],
        prompt_ids=torch.zeros(len(seen), 0, dtype=torch.int64),
        prompt_mask=torch.zeros(len(seen), 0, dtype=torch.bool),
        completion_ids=torch.tensor([c for c, _ in seen]),
        unmask_step=torch.tensor([s for _, s in seen]),
        logps=torch.zeros(len(seen), 3, dtype=torch.float64),
        counted=torch.ones(len(seen), 3, dtype=torch.bool),
        view_seed=torch.arange(len(seen)),
    )
    with torch.no_grad():
        total = token_logps(model, rollout, ExactTrajectory()).logps.sum(dim=1).exp().sum().item()
    assert abs(total - 1) > 0.05


def block_sensitivity(model, trajectories, segments, temperature=1.0):
    """ε_block (d2 Eq. 61): the largest log-ratio between a visited state before a step and its cut's."""
    mask, vocab, worst = model.config.mask_token_id, model.config.vocab_size, 0.0
    real = [v for v in range(vocab) if v != mask]
    for t in trajectories:
        cuts = segment_cuts(1 + max(t.steps), segments)
        for position, step in enumerate(t.steps):
            cut = max(b for b in cuts if b <= step)
            now = model.conditional(canvas_before(t.tokens, t.steps, step, mask), position, temperature)[real]
            then = model.conditional(canvas_before(t.tokens, t.steps, cut, mask), position, temperature)[real]
            worst = max(worst, (now - then).max().item())
    return worst


def divergence(model, trajectories, segments):
    """D_N = E[Σ log π_exact − log π_N]: scores from the library, the trajectories' probabilities from the oracle."""
    gap = exact_scores(model, trajectories, ExactTrajectory()) - exact_scores(model, trajectories, StepMerge(segments))
    return (probabilities(trajectories) * gap).sum().item()


@pytest.mark.parametrize("shape", [(4, 3, [1, 1, 1, 1]), (4, 3, [2, 2]), (3, 4, [2, 1])], ids=str)
@pytest.mark.parametrize("remasking", VALUE_INDEPENDENT)
def test_identity_8_divergence_is_between_zero_and_its_bound(remasking, shape):
    """0 <= D_N <= L ε_block (the value term of d2 Eq. 68), for any model; D_N = 0 for N >= T."""
    canvas, vocab, schedule = shape
    model = random_table(canvas, vocab, seed=3)
    trajectories = enumerate_trajectories(model, remasking, schedule)
    found = []
    for segments in range(1, len(schedule) + 2):
        found.append(divergence(model, trajectories, segments))
        bound = canvas * block_sensitivity(model, trajectories, segments)
        assert -1e-10 <= found[-1] <= bound + 1e-10, f"N={segments}"
    assert found[0] > 0.05
    assert all(abs(value) < 1e-10 for value in found[len(schedule) - 1 :])


@pytest.mark.parametrize("remasking", ["random", "left_to_right"])
def test_identity_8_divergence_falls_when_the_cuts_are_doubled(remasking):
    """D_2N <= D_N with conditionals of one joint, one token a step and an order independent of all values."""
    for seed in range(2):
        model = joint_table(canvas=4, vocab=3, seed=seed)
        trajectories = enumerate_trajectories(model, remasking, [1, 1, 1, 1])
        found = {segments: divergence(model, trajectories, segments) for segments in (1, 2, 3, 4, 6, 8)}
        for segments in (1, 2, 3, 4):
            assert found[2 * segments] <= found[segments] + 1e-10
        assert found[1] > found[2] + 1e-3 > found[4] + 1e-3 and abs(found[4]) < 1e-10
