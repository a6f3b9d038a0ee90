"""What the page of `trl-dllm trace` is told of each estimator: `token_logps`, the exact one first."""

from dataclasses import replace

import pytest
import torch
from cases import rollout_for_tests, sample, sample_any_order
from oracles import sharp_model

from trl_dllm.likelihood import AnyOrder, Elbo, ExactTrajectory, PseudoLikelihood, token_logps
from trl_dllm.models import MaskedDiffusionSpec
from trl_dllm.reports.gaps import estimate_all
from trl_dllm.reports.likelihood import default_estimators


def test_the_exact_one_comes_first_and_the_reports_follow(models, family):
    model = models(family)
    rollout = sample(model, diffusion_steps=6)
    lines = estimate_all(model, rollout, ExactTrajectory(), batch_size=3)
    named = default_estimators(rollout, MaskedDiffusionSpec.from_model(model))
    assert [line.name for line in lines] == ["exact", *(name for name in named if name != "exact trajectory")]
    assert torch.allclose(lines[0].logps, rollout.logps * rollout.counted, atol=1e-5), "the sampler's own"
    for line in lines[1:]:
        with torch.no_grad():
            scores = token_logps(model, rollout, named[line.name])
        assert torch.allclose(line.logps, scores.logps, atol=1e-6) and torch.equal(line.scored, scores.scored)
        assert line.forwards == named[line.name].num_views(rollout) and not line.logps.requires_grad
        assert line.per_token is (line.name != "ELBO M=8")


def test_any_order_decoding_and_a_block_causal_model_have_their_own_truth(models):
    rollout = sample_any_order(models("llada"), diffusion_steps=4)
    lines = {line.name: line for line in estimate_all(models("llada"), rollout, AnyOrder())}
    counted = rollout.counted
    assert torch.allclose(lines["exact"].logps[counted], rollout.logps[counted], atol=1e-5)
    assert torch.allclose(lines["PKL-T = AnyOrder"].logps, lines["exact"].logps, atol=1e-6)
    assert (lines["exact trajectory"].logps - lines["exact"].logps).abs().max() > 1e-3
    model = sharp_model("sdar", block_size=4)
    rollout = sample(model, block_length=4, diffusion_steps=12)
    exact, *others = estimate_all(model, rollout, ExactTrajectory())
    assert torch.allclose(exact.logps[rollout.counted], rollout.logps[rollout.counted], atol=1e-5) and others


def test_sub_samples_and_truncated_draws(models):
    """What an estimator leaves out is not scored; one that cannot follow top-k is left out itself."""
    model, rollout = models("llada"), rollout_for_tests()
    _, some = estimate_all(model, rollout, ExactTrajectory(), {"some": PseudoLikelihood(2)})
    assert 0 < int(some.scored.sum()) < int(rollout.counted.sum()) and not some.logps[~some.scored].any()
    truncated = sample(model, diffusion_steps=6, top_k=5)
    lines = estimate_all(model, truncated, ExactTrajectory(), {"pkl": PseudoLikelihood(), "bound": Elbo(2)})
    assert [line.name for line in lines] == ["exact"]
    assert torch.allclose(lines[0].logps, truncated.logps * truncated.counted, atol=1e-5)


def test_a_rollout_of_another_model_is_refused(models):
    rollout = rollout_for_tests()
    with pytest.raises(ValueError, match=r"mask_token_id=4 in the rollout, 3 in the model"):
        estimate_all(models("llada"), replace(rollout, mask_token_id=4), ExactTrajectory())
