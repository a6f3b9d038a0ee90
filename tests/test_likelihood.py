"""Trajectory likelihoods against one-token-at-a-time oracles: docs/methods.md §7, identities 1, 2, 7, 8 and 9."""

import itertools
import math

import pytest
import torch
from oracles import (
    canvas_before,
    enumerate_trajectories,
    full_logits,
    joint_table,
    left_pad,
    random_rollout,
    random_table,
    segment_cuts,
    sharp_model,
    slow_step_merge,
    token_distribution,
    trajectories_rollout,
    unpadded,
)

import trl_dllm.generation.denoising
import trl_dllm.likelihood.view
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import ESTIMATORS, ExactTrajectory, MeanField, StepMerge, perturb_prompt, token_logps
from trl_dllm.models import MaskedDiffusionSpec
from trl_dllm.noise import hash64
from trl_dllm.rollout import Rollout, count_until_eos


MASK, VOCAB = 3, 101
SHIFT = {"llada": 0, "dream": 1}
VALUE_INDEPENDENT = ["random", "left_to_right", "margin", "entropy"]
ALL_ESTIMATORS = [MeanField(), StepMerge(2), StepMerge(4), StepMerge(20), ExactTrajectory()]


def names(estimator):
    return f"{type(estimator).__name__}{getattr(estimator, 'num_segments', '')}"


def rollout_for_tests(seed=0, **kwargs):
    return random_rollout(MASK, VOCAB, seed, **kwargs)


def draw(model, seed=0, **settings):
    """A rollout whose rows differ in prompt length, steps (threshold or early stop) and counted length."""
    prompts = [[17, 60, 9], [44, 8, 71, 25, 90, 33, 12], [55], [81, 20, 20, 67, 5]]
    ids, mask = left_pad(prompts)
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_ids": tuple(range(30, 45)), **settings}
    seeds = hash64(seed, torch.arange(len(prompts)))
    return generate(model, ids, mask, DiffusionGenerationConfig(**settings), seeds=seeds).validate()


def assert_same_scores(got, want, atol=1e-5):
    assert torch.equal(got.scored, want.scored)
    torch.testing.assert_close(got.logps, want.logps, atol=atol, rtol=0)
    torch.testing.assert_close(got.entropies, want.entropies, atol=atol, rtol=0)


# ----------------------------------------------------------------------------------------- against the oracle


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
    assert torch.equal(scores.scored, rollout.unmask_step >= 0), "every revealed position is scored, counted or not"
    assert scores.logps[~scores.scored].eq(0).all() and scores.entropies[~scores.scored].eq(0).all()


def test_every_number_of_segments_equals_slow_oracle(models):
    """N = 1 … 12 around every row's own T."""
    model, rollout = models("llada"), rollout_for_tests(seed=1, num_steps=(9, 4, 7), prompt_lengths=(3, 6, 1))
    with torch.no_grad():
        for segments in range(1, 13):
            logps, _ = slow_step_merge(model, rollout, segments, shift=0)
            scores = token_logps(model, rollout, StepMerge(segments))
            torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0, msg=f"N={segments}")


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


# ------------------------------------------------------------------------------------------------- identity 1


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


# ------------------------------------------------------------------------------------------------- identity 2


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
    longest = int(rollout.num_steps.max())
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
    from trl_dllm.models import create_tiny_model

    model, _ = create_tiny_model(family, hidden_size=16, num_layers=1)
    rollout = draw(model, diffusion_steps=6, stop_at_eos=False)
    with torch.no_grad():
        scores = token_logps(model, rollout, ExactTrajectory())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)
    p = token_distribution(full_logits(model, unpadded(rollout, 0) + [MASK] * 12)[2].detach(), MASK)
    assert p[MASK] == 0 and abs(scores.logps.exp().mean().item() - 1 / (VOCAB - 1)) < 1e-3


# ------------------------------------------------------------------------------------------------- identity 7


@pytest.mark.parametrize("p_mask_prompt", [0.0, 0.4])
@pytest.mark.parametrize("estimator", ALL_ESTIMATORS, ids=names)
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


# ---------------------------------------------------------------------------------------- prompt perturbation


class Recorder(torch.nn.Module):
    """A wrapper that keeps what the model was run on."""

    def __init__(self, model):
        super().__init__()
        self.module, self.seen = model, []

    def forward(self, **inputs):
        self.seen.append(inputs["input_ids"])
        return self.module(**inputs)


def prompts_seen(model, rollout, width, **kwargs):
    recorder = Recorder(model)
    with torch.no_grad():
        token_logps(recorder, rollout, ExactTrajectory(), **kwargs)
    assert len(recorder.seen) == ExactTrajectory().num_views(rollout)
    return [ids[:, :width] for ids in recorder.seen]


def test_prompt_perturbation_is_one_draw_for_all_views(models):
    """Only prompt tokens change, alike in every view; the canvas is never perturbed."""
    model, rollout = models("llada"), rollout_for_tests(width=9)
    seen = prompts_seen(model, rollout, 9, p_mask_prompt=0.5)
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    changed = seen[0] != rollout.prompt_ids
    assert changed.any() and not (changed & ~rollout.prompt_mask).any()
    assert seen[0][changed].eq(MASK).all() and not changed[rollout.prompt_mask].all()
    again = prompts_seen(model, rollout, 9, p_mask_prompt=0.5, iteration=0)
    assert torch.equal(again[0], seen[0])
    assert not torch.equal(prompts_seen(model, rollout, 9, p_mask_prompt=0.5, iteration=1)[0], seen[0])
    assert not torch.equal(prompts_seen(model, rollout, 9, p_mask_prompt=0.5, seeds=rollout.view_seed + 1)[0], seen[0])
    assert torch.equal(prompts_seen(model, rollout, 9)[0], rollout.prompt_ids)


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
    assert torch.equal(perturb_prompt(rollout, 0.0, rollout.view_seed, 0).prompt_ids, rollout.prompt_ids)
    everything = perturb_prompt(rollout, 1.0, rollout.view_seed, 0).prompt_ids
    assert everything[rollout.prompt_mask].eq(MASK).all()


def test_prompt_perturbation_does_not_depend_on_padding():
    """Identity 7: keyed by the token's index without padding."""
    narrow, wide = rollout_for_tests(), rollout_for_tests(width=12)
    for iteration in range(5):
        a = perturb_prompt(narrow, 0.5, narrow.view_seed, iteration)
        b = perturb_prompt(wide, 0.5, wide.view_seed, iteration)
        assert [unpadded(a, row) for row in range(5)] == [unpadded(b, row) for row in range(5)]


def test_prompt_perturbation_never_shares_draws_with_the_sampler(models, monkeypatch):
    """`Purpose` (docs/methods.md §2.6): iteration 2 of the prompt draws must not be step 4 of the token draws."""
    seen = {}

    def record(module):
        plain = module.uniform

        def recorder(*keys):
            draws = plain(*keys)
            seen.setdefault(module.__name__, set()).update(draws.flatten().tolist())
            return draws

        monkeypatch.setattr(module, "uniform", recorder)

    record(trl_dllm.generation.denoising)
    record(trl_dllm.likelihood.view)
    rollout = draw(models("llada"), max_new_tokens=12, block_length=12, diffusion_steps=12, stop_at_eos=False)
    for iteration in range(8):
        perturb_prompt(rollout, 0.5, rollout.view_seed, iteration)
    sampler, prompt = seen["trl_dllm.generation.denoising"], seen["trl_dllm.likelihood.view"]
    assert len(sampler) > 500 and len(prompt) > 100
    assert not sampler & prompt


# ------------------------------------------------------------------------------------ identity 8: brute force


def exact_scores(model, trajectories, estimator, **kwargs):
    with torch.no_grad():
        return token_logps(model, trajectories_rollout(model, trajectories), estimator, **kwargs).logps.sum(dim=1)


def weights(trajectories):
    """Probability of each trajectory by the oracle."""
    return torch.tensor([t.order_prob * t.log_prob.exp().item() for t in trajectories], dtype=torch.float64)


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
    """Under low_confidence the product of the values' probabilities is no trajectory probability (§3.1)."""
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
    return (weights(trajectories) * gap).sum().item()


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


def test_oracle_joint_is_consistent():
    """Left to right and any other order give a canvas the same probability; an arbitrary table does not."""
    for model, consistent in ((joint_table(3, 3, seed=1), True), (random_table(3, 3, seed=1), False)):
        trajectories = enumerate_trajectories(model, "random", [1, 1, 1])
        by_canvas = {}
        for t in trajectories:
            by_canvas.setdefault(t.tokens, []).append(t.log_prob.item())
        assert all((max(v) - min(v) < 1e-10) == consistent for v in by_canvas.values())


# -------------------------------------------------------------------- identity 9: gradient of the mean reward

EOS = 0


def reward(tokens) -> float:
    """Of the completion up to its first EOS, as reward functions see it."""
    cut = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
    return 0.3 * len(cut) ** 2 + sum((i + 1) * t * 0.7 for i, t in enumerate(cut)) % 2.1


def dr_grpo_as_plain_sum(logps, advantages, mask, probability):
    """TRL's dr_grpo before its division by a constant: −Σ_i p_i A_i Σ_l ratio_il, old policy = current policy."""
    ratio = (logps - logps.detach()).exp()
    return -(probability * advantages * (ratio * mask).sum(dim=1)).sum()


def gradients(model, remasking, schedule, advantages_of, mask_of, temperature=0.7, weight_of=None):
    """(library's expected gradient, enumerated gradient of the expected reward), flat."""
    trajectories = enumerate_trajectories(model, remasking, schedule, temperature=temperature)
    rewards = torch.tensor([reward(list(t.tokens)) for t in trajectories], dtype=torch.float64)
    probability = torch.stack([t.order_prob * t.log_prob.exp() for t in trajectories])
    (true,) = torch.autograd.grad((probability * rewards).sum(), model.table)
    rollout = trajectories_rollout(model, trajectories, temperature=temperature)
    p = probability.detach()
    mask = mask_of(rollout).double()
    if weight_of is not None:
        mask = mask * weight_of(mask)[:, None]
    scores = token_logps(model, rollout, ExactTrajectory())
    loss = dr_grpo_as_plain_sum(scores.logps, advantages_of(rewards, p), mask, p)
    (got,) = torch.autograd.grad(-loss, model.table)
    return got.flatten(), true.flatten()


def raw(rewards, p):
    return rewards


def leave_one_out(rewards, p):
    """G = 2: A_1 = r_1 − r_2, its expectation over an independent second completion, pair by pair."""
    return ((rewards[:, None] - rewards[None, :]) * p[None, :]).sum(dim=1)


def leave_one_out_of_three(rewards, p):
    pair = p[:, None] * p[None, :]
    others = (rewards[:, None] + rewards[None, :]) / 2
    return torch.stack([((r - others) * pair).sum() for r in rewards])


def group_mean(rewards, p, group):
    """A_1 = r_1 − mean of the group, over all (G−1)-tuples of the others."""
    total = torch.zeros_like(rewards)
    for others in itertools.product(range(len(p)), repeat=group - 1):
        chance = math.prod(p[j].item() for j in others)
        total += chance * (rewards - (rewards + sum(rewards[j] for j in others)) / group)
    return total


def canvas_mask(rollout):
    return torch.ones_like(rollout.counted)


def eos_mask(rollout):
    return count_until_eos(rollout.completion_ids, rollout.unmask_step, (EOS,))


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("schedule", [[1, 1, 1], [2, 1], [3]], ids=str)
@pytest.mark.parametrize("remasking", VALUE_INDEPENDENT)
def test_identity_9_expected_gradient_is_that_of_the_expected_reward(remasking, schedule):
    """Theorem 3.1: whole canvas, raw rewards, plain sum, any tokens a step, every value-independent order."""
    got, want = gradients(random_table(3, 4, seed=2), remasking, schedule, raw, canvas_mask)
    assert want.norm() > 0.1
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("advantages", [leave_one_out, leave_one_out_of_three])
def test_identity_9_leave_one_out(advantages):
    got, want = gradients(random_table(3, 3, seed=2), "random", [2, 1], advantages, canvas_mask)
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("group", [2, 3])
def test_identity_9_group_mean_gives_exactly_g_minus_1_over_g(group):
    got, want = gradients(
        random_table(3, 3, seed=2), "left_to_right", [2, 1], lambda r, p: group_mean(r, p, group), canvas_mask
    )
    assert relative_error(got, want * (group - 1) / group) < 1e-10


def test_identity_9_with_the_eos_cut_holds_only_left_to_right():
    """Tokens behind the EOS earn nothing left to right; in another order they were context of what came later."""
    model = random_table(3, 4, seed=2)
    for schedule in ([1, 1, 1], [2, 1]):
        got, want = gradients(model, "left_to_right", schedule, raw, eos_mask)
        assert relative_error(got, want) < 1e-10
    for remasking, seed in (("random", 2), ("margin", 7), ("entropy", 7)):
        got, want = gradients(random_table(3, 4, seed), remasking, [1, 1, 1], raw, eos_mask)
        assert relative_error(got, want) > 0.02, remasking


def test_identity_9_is_broken_by_one_over_length():
    """A factor 1/length of each completion is no plain sum, left to right either."""
    got, want = gradients(
        random_table(3, 4, seed=2), "left_to_right", [1, 1, 1], raw, eos_mask, weight_of=lambda m: 1 / m.sum(dim=1)
    )
    scale = (got @ want) / (got @ got)
    assert relative_error(scale * got, want) > 0.02


def test_identity_9_is_broken_by_another_scoring_temperature_or_fewer_cuts():
    """A token is scored under the distribution that it was drawn from."""
    model = random_table(3, 4, seed=2)
    trajectories = enumerate_trajectories(model, "random", [1, 1, 1], temperature=0.7)
    p = weights(trajectories)
    rewards = torch.tensor([reward(list(t.tokens)) for t in trajectories], dtype=torch.float64)
    rollout = trajectories_rollout(model, trajectories, temperature=0.7)
    mask = canvas_mask(rollout).double()

    def gradient(estimator, temperature):
        scores = token_logps(model, rollout, estimator, temperature=temperature)
        (out,) = torch.autograd.grad(-dr_grpo_as_plain_sum(scores.logps, rewards, mask, p), model.table)
        return out.flatten()

    want = gradient(ExactTrajectory(), None)
    assert relative_error(gradient(StepMerge(3), 0.7), want) < 1e-10
    assert relative_error(gradient(ExactTrajectory(), 1.0), want) > 0.02
    assert relative_error(gradient(MeanField(), 0.7), want) > 0.02


# ----------------------------------------------------------------------------------------------------- errors


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


def test_rollout_checks_shapes_and_values():
    good = rollout_for_tests()
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for change, match in [
        ({"unmask_step": good.unmask_step[:, 1:]}, r"unmask_step has shape \(5, 8\).*\(5, 9\)"),
        ({"prompt_mask": good.prompt_mask[:, 1:]}, "prompt_ids.*prompt_mask"),
        ({"view_seed": good.view_seed[:2]}, "view_seed"),
        ({"prompt_mask": good.prompt_mask.flip(1)}, "left-padded"),
        ({"unmask_step": torch.zeros_like(good.unmask_step)}, "revealed whose token is the mask"),
        ({"unmask_step": torch.full_like(good.unmask_step, -1)}, "positions never revealed must hold"),
        ({"counted": torch.ones_like(good.counted)}, "counted includes a position that was never revealed"),
    ]:
        with pytest.raises(ValueError, match=match):
            Rollout(**{**fields, **change}).validate()


def test_rollout_slices_and_stacks():
    rollout = rollout_for_tests()
    stacked = Rollout.cat([rollout[slice(0, 2)], rollout[torch.tensor([2, 3, 4])]])
    for name, value in rollout._tensors().items():
        assert torch.equal(getattr(stacked, name), value), name
    assert len(rollout[rollout.num_steps > 3]) == 3 and stacked.mask_token_id == MASK
    assert rollout.num_steps.tolist() == [9, 3, 1, 6, 4]


def test_count_until_eos_by_loops():
    """Revealed positions up to and including the first revealed EOS; several ids; none."""
    rollout = rollout_for_tests(seed=5, num_steps=(9,) * 8, prompt_lengths=(2,) * 8)
    for eos in ((), tuple(range(60, 90))):
        got = count_until_eos(rollout.completion_ids, rollout.unmask_step, eos)
        for row in range(8):
            ended, expected = False, []
            for token, step in zip(
                rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist(), strict=True
            ):
                expected.append(step >= 0 and not ended)
                ended = ended or (step >= 0 and token in eos)
            assert got[row].tolist() == expected
    assert (got.sum(1) < rollout.revealed.sum(1)).any()
