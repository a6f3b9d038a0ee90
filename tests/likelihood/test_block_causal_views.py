"""Likelihoods of block-causal models and growing canvases, a block at a time (docs/methods.md §2.8, identity 12)."""

from dataclasses import replace

import pytest
import torch
from cases import MASK, PROMPTS, rollout_for_tests, sample
from oracles import block_starts, hits, segment_cuts, sharp_model, slow_block_views, token_distribution, unpadded

from trl_dllm.blocks import ALIGNMENTS, Blocks
from trl_dllm.likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    CoupledElbo,
    Elbo,
    ExactTrajectory,
    MeanField,
    PseudoLikelihood,
    StepMerge,
    TrajectoryPseudoLikelihood,
    score_view,
    token_logps,
)
from trl_dllm.likelihood.plan import Plan, compact
from trl_dllm.likelihood.view import IGNORE, Estimator, View, canvas_view
from trl_dllm.models import Attention, MaskedDiffusionSpec


SIZE = 4


@pytest.fixture(scope="module")
def model_of():
    models = {}

    def get(alignment: str = "position", family: str = "sdar"):
        if (alignment, family) not in models:
            models[alignment, family] = sharp_model(family, block_size=SIZE)
            models[alignment, family].config.block_alignment = alignment
        return models[alignment, family]

    return get


def drawn(model, **settings):
    """A rollout whose rows have blocks of different lengths and steps."""
    return sample(model, **{"block_length": SIZE, "cache": "exact", "diffusion_steps": 9, **settings})


def steps_in_block(rollout, row):
    """(step within its block, the block's number of steps) of each position; -1 for never, by loops."""
    steps, size = rollout.unmask_step[row].tolist(), rollout.blocks.size
    bounds = block_starts(len(unpadded(rollout, row)), len(steps), size, rollout.blocks.alignment)
    out = []
    for start, end in zip(bounds, [*bounds[1:], len(steps)], strict=True):
        taken = sorted({s for s in steps[start:end] if s >= 0})
        out += [(taken.index(s) if s >= 0 else -1, len(taken)) for s in steps[start:end]]
    return out


# ---------------------------------------------------------------------------------------------------- exact likelihood


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("settings", [{}, {"diffusion_steps": 3}, {"tokens_per_step": 1, "diffusion_steps": None}])
def test_identity_12_the_exact_likelihood_is_the_samplers_in_a_blocks_steps(model_of, alignment, settings):
    """Identity 12: rows differ in P mod 4, and the forwards are as many as a block takes steps."""
    model = model_of(alignment)
    rollout = drawn(model, **settings)
    estimator = ExactTrajectory()
    schedule = {9: 3, 3: 1}.get(settings.get("diffusion_steps", 9), 4)
    assert estimator.num_views(rollout) == schedule
    everything = replace(rollout, counted=rollout.revealed)
    scores = token_logps(model, everything, estimator)
    assert scores.scored.all()
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
    assert len(Plan(estimator, everything, 0, len(rollout))) == schedule


def test_under_a_threshold_rows_take_their_own_steps(model_of):
    rollout = drawn(model_of(), confidence_threshold=0.15, diffusion_steps=None)
    assert len(set(rollout.num_steps.tolist())) > 1
    scores = token_logps(model_of(), replace(rollout, counted=rollout.revealed), ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)


def test_unfinished_rows_are_scored_where_they_are_revealed(model_of):
    eos = tuple(drawn(model_of()).completion_ids[[0, 2], [1, 6]].tolist())
    rollout = drawn(model_of(), eos_token_ids=eos, stop_at_eos=True)
    assert not rollout.revealed.all()
    rollout = replace(rollout, counted=rollout.revealed)
    scores = token_logps(model_of(), rollout, ExactTrajectory())
    assert torch.equal(scores.scored, rollout.revealed)
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)


def test_temperature_and_truncation_are_those_of_the_draw(model_of):
    rollout = drawn(model_of(), top_k=7, temperature=0.7)
    scores = token_logps(model_of(), replace(rollout, counted=rollout.revealed), ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------- all estimators


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("segments", [1, 2, 3, 7])
def test_step_merge_cuts_the_steps_of_each_block(model_of, alignment, segments):
    model = model_of(alignment)
    rollout = drawn(model)
    places = [steps_in_block(rollout, row) for row in range(len(rollout))]

    def shown(row, i, here):
        """Whether position `here` is revealed before the cut of position i's segment."""
        step, total = places[row][i]
        cut = max(b for b in segment_cuts(total, segments) if b <= step)
        return 0 <= places[row][here][0] < cut

    got = token_logps(model, rollout, StepMerge(segments)).logps
    want = torch.zeros_like(got)
    for position in range(rollout.completion_ids.shape[1]):
        want += slow_block_views(
            model,
            rollout,
            lambda row, here, i=position: shown(row, i, here),
            lambda row, here, i=position: here == i,
        )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    if segments == 1:
        torch.testing.assert_close(token_logps(model, rollout, MeanField()).logps, got, atol=0, rtol=0)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(
    "estimator",
    [PseudoLikelihood(), PseudoLikelihood(3), BlockPseudoLikelihood(5, "partition"), Elbo(3), CoupledElbo(2)],
    ids=lambda estimator: f"{type(estimator).__name__}",
)
def test_what_masks_a_canvas_masks_each_block_behind_clean_ones(model_of, alignment, estimator):
    model = model_of(alignment)
    rollout = drawn(model)
    want = torch.zeros_like(rollout.logps)
    for n in range(estimator.num_views(rollout)):
        masked = hits(estimator, rollout, n)
        weight = torch.zeros_like(want)
        view = estimator.view(rollout, n, rollout.view_seed, 0)
        weight.scatter_add_(1, view.index, view.weight.to(want.dtype) * (view.targets != IGNORE))
        logps = slow_block_views(
            model, rollout, lambda row, i, m=masked: not m[row, i], lambda row, i, m=masked: bool(m[row, i])
        )
        want += weight * logps
    want = estimator.assemble(want, rollout, rollout.view_seed, 0)
    torch.testing.assert_close(token_logps(model, rollout, estimator).logps, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("estimator", [StepMerge(2), ExactTrajectory(), PseudoLikelihood(2), Elbo(2)])
def test_numbers_and_gradients_do_not_depend_on_padding_batch_or_micro_batch(model_of, estimator):
    model = model_of()
    rollout, wider = drawn(model), drawn(model, width=15)
    whole = token_logps(model, rollout, estimator)
    assert torch.equal(rollout.completion_ids, wider.completion_ids)
    torch.testing.assert_close(token_logps(model, wider, estimator).logps, whole.logps, atol=1e-6, rtol=0)
    torch.testing.assert_close(token_logps(model, rollout, estimator, batch_size=2).logps, whole.logps)
    for row in range(len(rollout)):
        alone = token_logps(model, rollout[row : row + 1], estimator).logps
        torch.testing.assert_close(alone, whole.logps[row : row + 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_columns_that_no_scored_row_sees_change_nothing(model_of, attention):
    """What `compact` leaves: no clean block that nothing scored stands behind, no noisy block without a target."""
    model = model_of()
    rollout = drawn(model)
    cut = torch.arange(12) < 5
    rollout = replace(rollout, counted=rollout.revealed & cut)
    estimator = StepMerge(2)
    view, _ = Plan(estimator, rollout, 0, 4)[0]
    small = compact(view)
    assert small.num_targets == view.num_targets
    # Behind the first five positions nothing is left but what shares the last scored block.
    longest = max(map(len, PROMPTS))
    assert small.input_ids.shape[1] <= longest + 5 + 3 + 5 + 3 < view.input_ids.shape[1]
    model.set_attn_implementation(attention)
    try:
        spec = MaskedDiffusionSpec(MASK, block_size=SIZE)
        got, want = (score_view(model, v, 12, spec).logps for v in (small, view))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_token_of_a_block_does_not_reach_its_own_mask(model_of):
    """Logits of the noisy stream do not change with the tokens that it masks, which stand in the clean stream."""
    model = model_of()
    rollout = drawn(model)
    before = token_logps(model, rollout, MeanField()).entropies
    other = rollout.completion_ids.clone()
    last = torch.stack([r.nonzero().flatten()[-1] for r in rollout.revealed])
    other[torch.arange(len(other)), last] = 50
    after = token_logps(model, replace(rollout, completion_ids=other), MeanField()).entropies
    torch.testing.assert_close(after, before, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "estimator", [AnyOrder(), TrajectoryPseudoLikelihood(), BlockPseudoLikelihood(2, 1, "isolated")]
)
def test_estimators_with_an_attention_of_their_own_are_refused(model_of, estimator):
    with pytest.raises(ValueError, match="does not apply to a block-causal model, and this one has block_size=4"):
        token_logps(model_of(), drawn(model_of()), estimator)


def test_a_plain_view_is_refused(model_of):
    class Plain(Estimator):
        def num_views(self, rollout):
            return 1

        def view(self, rollout, n, seeds, iteration) -> View:
            view = canvas_view(replace(rollout, blocks=None), rollout.counted & False, rollout.counted)
            return replace(view, attention=Attention.padding(view.input_ids >= 0))

    with pytest.raises(ValueError, match="block_size=4, and the view lets every row see every column"):
        token_logps(model_of(), drawn(model_of()), Plain())


def test_a_rollout_of_other_blocks_is_refused(model_of):
    rollout = drawn(model_of())
    with pytest.raises(ValueError, match=r"blocks=None in the rollout, Blocks\(size=4, .*replace\(rollout, blocks="):
        token_logps(model_of(), replace(rollout, blocks=None), StepMerge(2))
    with pytest.raises(ValueError, match=r"alignment='position', .* in the rollout, Blocks\(size=4, alignment='can"):
        token_logps(model_of("canvas"), rollout, StepMerge(2))
    with pytest.raises(ValueError, match="logits_shift=1 with block_size=4: no family has both"):
        MaskedDiffusionSpec(MASK, 1, 4)


# ------------------------------------------------------------------------------------------------- a canvas that grows


@pytest.mark.parametrize("estimator", [ExactTrajectory(), StepMerge(12)], ids=["exact", "12 cuts"])
def test_the_exact_likelihood_of_a_growing_canvas_is_the_samplers(models, family, estimator):
    model = models(family)
    rollout = sample(model, future_blocks="absent", diffusion_steps=8)
    everything = replace(rollout, counted=rollout.revealed)
    scores = token_logps(model, everything, estimator)
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
    masked = token_logps(model, replace(everything, blocks=None), estimator)
    assert (masked.logps - rollout.logps).abs().max() > 1e-3, "later blocks should matter"


@pytest.mark.parametrize("estimator", [MeanField(), StepMerge(2), StepMerge(3), PseudoLikelihood(4), Elbo(2)])
def test_views_show_no_block_behind_the_last_one_that_they_score_or_show(models, estimator):
    model = models("llada")
    rollout = replace(rollout_for_tests(), blocks=Blocks(3, "canvas", causal=False))
    for n in range(estimator.num_views(rollout)):
        view = estimator.view(rollout, n, rollout.view_seed, 0)
        scored = hits(estimator, rollout, n)
        prompt = rollout.prompt_ids.shape[1]
        for row in range(len(rollout)):
            ids = view.input_ids[row, prompt:].tolist()
            there = [i for i in range(9) if ids[i] != MASK or scored[row, i]]
            length = (max(there, default=-1) // 3 + 1) * 3
            seen = (view.attention.level[row, prompt:] == 0).tolist()
            assert seen == [i < length for i in range(9)], f"view {n} of row {row}"
            targets = scored[row].nonzero().flatten().tolist()
            if not targets:
                continue
            context = unpadded(rollout, row) + ids[:length]
            logits = model(input_ids=torch.tensor([context]), use_cache=False).logits[0].double()
            logps = score_view(model, view[row : row + 1], 9, MaskedDiffusionSpec(MASK)).logps[0]
            for i in targets:
                p = token_distribution(logits[len(context) - length + i], MASK)
                want = p[rollout.completion_ids[row, i]].log() * view.weight[row, prompt + i]
                assert abs(logps[i] - want) < 1e-5
