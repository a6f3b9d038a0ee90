"""Running views: precision, backends, temperature, batches (docs/methods.md §7: identity 7), and what is refused."""

import pytest
import torch
from cases import MASK, SHIFT, VOCAB, assert_same_scores, rollout_for_tests, whole_canvas
from oracles import random_rollout, sharp_model, slow_step_merge

from trl_dllm.likelihood import AnyOrder, ExactTrajectory, MeanField, StepMerge, counted_view, token_logps
from trl_dllm.likelihood.view import IGNORE
from trl_dllm.models import MaskedDiffusionSpec
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
