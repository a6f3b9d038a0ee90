"""GSPO-token: the ratio of a sequence, with a gradient of each token's own (docs/methods.md §4.3)."""

import pytest
import torch
from helpers_grpo import as_rollout, build, config, losses, weights
from test_grpo_padre import TEMPERATURE, flat, gradient, make_trainer, micro_batch, with_old_and_ref

from trl_dllm.likelihood import StepMerge, token_logps


LEVEL = {"importance_sampling_level": "sequence_token"}


@pytest.mark.parametrize("segments", [1, 3])
def test_with_one_advantage_a_completion_it_is_gspo(tmp_path, segments):
    """Six steps, of which every second has moved away from the old policy."""
    runs = []
    for level in ("sequence", "sequence_token"):
        trainer = build(
            tmp_path / level,
            importance_sampling_level=level,
            num_segments=segments,
            num_iterations=2,
            max_steps=6,
            epsilon=0.01,
            use_bias_correction_kl=False,
            beta=0.04,
        )
        trainer.train()
        assert trainer.state.global_step == 6 and not trainer._separable
        runs.append(trainer)
    for key in ("loss", "grad_norm", "kl"):
        assert losses(runs[1], key) == pytest.approx(losses(runs[0], key), rel=1e-4, abs=1e-6), key
    assert max(losses(runs[0], "clip_ratio/region_mean")) > 0, "something is clipped"
    for name, value in weights(runs[1]).items():
        torch.testing.assert_close(value, weights(runs[0])[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [1, 2])
def test_tokens_with_advantages_of_their_own_have_their_own_gradients(tmp_path, segments):
    """Against Eq. 14 by hand: -mean min(s_t A_t, clip(s_t) A_t), with s_t = sg(s) π_t / sg(π_t)."""
    estimator = StepMerge(segments)
    trainer = make_trainer(tmp_path, estimator, loss_type="grpo", beta=0.0, epsilon=0.1, **LEVEL)
    inputs = with_old_and_ref(trainer, micro_batch(trainer), estimator)
    generator = torch.Generator().manual_seed(3)
    inputs["advantages"] = torch.randn(inputs["completion_mask"].shape, generator=generator, dtype=torch.float64)
    loss, found = gradient(trainer, inputs)

    logps = token_logps(trainer.model, as_rollout(trainer, inputs), estimator, TEMPERATURE).logps
    mask, old, total, clipped = inputs["completion_mask"], inputs["old_per_token_logps"][:, 0], 0.0, 0
    for row in range(len(mask)):
        kept = mask[row].bool()
        own, before, advantage = (table[row][kept] for table in (logps, old, inputs["advantages"]))
        ratio = (own - before).mean().exp().detach() * own.exp() / own.exp().detach()
        bounded = ratio.clamp(0.9, 1.1)
        clipped += int((bounded != ratio).sum())
        total = total - torch.minimum(ratio * advantage, bounded * advantage).mean() / len(mask)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = flat(parameters, torch.autograd.grad(total, parameters, allow_unused=True))
    assert 0 < clipped < int(mask.sum()) and expected.abs().max() > 1e-3
    assert loss == pytest.approx(total.item(), rel=1e-6)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()

    trainer.importance_sampling_level = trainer.args.importance_sampling_level = "sequence"
    _, one_for_all = gradient(trainer, inputs)
    assert (one_for_all - expected).abs().max() > 1e-2 * expected.abs().max(), "GSPO's is another one"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 with importance_sampling_level"),
        ({"loss_type": "vespo"}, "loss_type='vespo' with importance_sampling_level='sequence_token'"),
        ({"loss_type": "wd1"}, "importance_sampling_level='sequence_token' with loss_type='wd1'"),
    ],
)
def test_what_needs_the_old_policys_own_log_probs_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **LEVEL, **settings)
