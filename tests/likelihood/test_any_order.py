"""The exact likelihood of an any-order trajectory in one pass: docs/methods.md §2.2 and identities 1, 3, 4 and 7.

The oracle knows neither the P + 2L layout nor a cache: for each token it runs the prompt, the tokens revealed before
it in their order, and one mask, under attention written with plain loops.
"""

import importlib.util

import pytest
import torch
from cases import MASK, PROMPTS, SEEDS, VOCAB, assert_same_rollout, sample_any_order, whole_canvas
from oracles import left_pad, random_rollout, sharp_model, slow_any_order
from peft import LoraConfig, get_peft_model

from trl_dllm import DiffusionGRPOConfig
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    ExactTrajectory,
    MeanField,
    TrajectoryPseudoLikelihood,
    token_logps,
)
from trl_dllm.models import attention_mask, create_tiny_model


def random_rollouts(dtype=torch.float64):
    """Never-revealed positions, ties, 1 to 9 steps; prompts of different lengths, then none at all."""
    yield random_rollout(MASK, VOCAB, 0, dtype=dtype)
    yield random_rollout(MASK, VOCAB, 1, dtype=dtype, prompt_lengths=(0, 3, 0, 5, 1), num_steps=(9, 2, 3, 1, 5))
    yield random_rollout(MASK, VOCAB, 2, dtype=dtype, prompt_lengths=(0,) * 5)


# -------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_identity_3_any_order_equals_slow_oracle(models, attn):
    """Log-probs and entropies of rollouts with ties, never-revealed positions, and prompts of 0 to 7 tokens."""
    for rollout in random_rollouts():
        assert not rollout.revealed.all() and (rollout.num_steps < rollout.revealed.sum(1)).any()
        with torch.no_grad():
            scores = token_logps(models("llada", attn=attn), rollout, AnyOrder(), temperature=0.7)
            logps, entropies = slow_any_order(models("llada", attn="eager"), rollout, temperature=0.7)
        torch.testing.assert_close(scores.logps, logps, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.entropies, entropies, atol=1e-5, rtol=0)
        assert torch.equal(scores.scored, rollout.counted)
        assert scores.logps[~rollout.counted].eq(0).all()


@pytest.fixture
def fresh_compiler():
    """For a second shape PyTorch compiles FlexAttention with dynamic shapes, which its CPU back end cannot build."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_identity_3_any_order_equals_slow_oracle_on_flex_attention(models, fresh_compiler):
    """Forward only: flex_attention has no backward on a CPU. Slow: it compiles."""
    rollout = next(random_rollouts(torch.float32))
    with torch.no_grad():
        scores = token_logps(models("llada", torch.float32, "flex_attention"), rollout, AnyOrder())
        logps, _ = slow_any_order(models("llada", attn="eager"), rollout)
    torch.testing.assert_close(scores.logps.double(), logps, atol=3e-5, rtol=0)


def test_identity_3_any_order_equals_causal_pkl_t(models):
    """On every rollout: random ones, the denoising decoder's, the any-order decoder's; equal views, so equal bits."""
    model = models("llada", torch.float32)
    ids, mask = left_pad(PROMPTS)
    denoising = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, diffusion_steps=8)
    rollouts = [
        *random_rollouts(torch.float32),
        generate(model, ids, mask, denoising, seeds=SEEDS),
        sample_any_order(model),
    ]
    for rollout in rollouts:
        with torch.no_grad():
            a, b = (token_logps(model, rollout, e) for e in (AnyOrder(), TrajectoryPseudoLikelihood("causal")))
        assert torch.equal(a.logps, b.logps) and torch.equal(a.entropies, b.entropies)
        assert torch.equal(a.scored, b.scored)
    assert AnyOrder().num_views(rollouts[0]) == 1
    with torch.no_grad():
        other = token_logps(model, rollouts[-2], AnyOrder()).logps
    assert (other - rollouts[-2].logps).abs().max() > 0.1, "a denoising rollout's likelihood is another number"


# ----------------------------------------------------------------------------------------------- against both decoders


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", [PROMPTS, [[]] * 4, [[], [5, 6], [7], []]], ids=["P=7", "P=0", "mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_step": 1},
        {"tokens_per_step": 2, "temperature": 0.7},
        {"tokens_per_step": 3, "remasking": "random"},
        {"confidence_threshold": 0.1, "remasking": "margin"},
        {"diffusion_steps": 9, "block_length": 4, "stop_at_eos": True, "eos_token_ids": tuple(range(40, 60))},
    ],
    ids=["1", "2", "3", "threshold", "stop"],
)
def test_identity_3_scores_equal_both_decoders(models, attn, prompts, settings):
    """Float32: AnyOrder on an any-order rollout is the cached decoder's log-probs and the uncached one's, to 1e-5."""
    model = models("llada", torch.float32, attn)
    rollouts = [sample_any_order(model, cache, prompts, **settings) for cache in ("exact", None)]
    assert_same_rollout(*rollouts)
    cached, uncached = map(whole_canvas, rollouts)
    with torch.no_grad():
        scores = token_logps(model, cached, AnyOrder())
    torch.testing.assert_close(scores.logps, cached.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.logps, uncached.logps, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_identity_3_scores_equal_the_cached_decoder_on_flex_attention(models, fresh_compiler):
    model = models("llada", torch.float32, "flex_attention")
    rollout = whole_canvas(sample_any_order(model, diffusion_steps=8))
    assert model.config._attn_implementation == "flex_attention"
    with torch.no_grad():
        scores = token_logps(model, rollout, AnyOrder())
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-5, rtol=0)


def test_exactness_is_declared_for_the_decoder_it_holds_for():
    assert AnyOrder.exact_for == ("any_order",) and TrajectoryPseudoLikelihood().exact_for == ("any_order",)
    assert ExactTrajectory.exact_for == ("denoising",)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"estimator": "step_merge", "decoding": "any_order"}, "StepMerge is not exact for decoding='any_order'"),
        ({"estimator": "any_order"}, "AnyOrder is not exact for decoding='denoising'"),
        (
            {"estimator": "any_order", "decoding": "any_order", "p_mask_prompt": 0.1},
            "the sampler saw the whole prompt, and p_mask_prompt=0.1",
        ),
        (
            {"estimator": "any_order", "decoding": "any_order", "temperature": 0.9, "score_temperature": 1.0},
            "the sampler scored at temperature=0.9, not score_temperature=1.0",
        ),
    ],
)
def test_the_samplers_log_probs_are_refused_where_they_are_not_exact(settings, match, tmp_path):
    common = {"use_cpu": True, "bf16": False, "max_completion_length": 8}
    with pytest.raises(ValueError, match=f"old_logps='rollout'.*{match}.*old_logps='recompute'"):
        DiffusionGRPOConfig(str(tmp_path), old_logps="rollout", **common, **settings)
    assert DiffusionGRPOConfig(str(tmp_path), **common, **settings).old_logps == "recompute"


# ----------------------------------------------------------------------------------------------------------- gradients


def _adapter_gradients(model, logps, weight):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((logps * weight).sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def _lora(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_through_lora_equal_the_oracles(attn):
    torch.manual_seed(0)
    model = _lora(sharp_model("llada", attn_implementation=attn))
    rollout = random_rollout(MASK, VOCAB, 0, num_steps=(9, 3, 1), prompt_lengths=(4, 0, 6))
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = _adapter_gradients(model, token_logps(model, rollout, AnyOrder()).logps, weight)
    model.get_base_model().set_attn_implementation("eager")
    want = _adapter_gradients(model, slow_any_order(model, rollout)[0], weight)
    assert len(got) == 2 * 2 * 7 and all("lora_" in name for name in got)
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= 1e-5 * max(1, want[name].abs().max()), name
        assert want[name].abs().max() > 0, name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_4_bit_model_with_lora_decodes_scores_and_has_the_oracles_gradients(tmp_path, monkeypatch):
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    forward = bitsandbytes.nn.Linear4bit.forward

    def unpacked(self, x):
        # On a CPU with avx512_bf16 a forward without gradients would repack the weights for inference, for good.
        self.support_avx512bf16_for_cpu = False
        return forward(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", unpacked)
    create_tiny_model("llada", hidden_size=64, num_layers=2)[0].save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(0)
    model = _lora(base)
    assert base.is_loaded_in_4bit
    rollout = sample_any_order(model, prompts=PROMPTS[:3], seeds=SEEDS[:3], tokens_per_step=2)
    scores = token_logps(model, rollout, AnyOrder())
    torch.testing.assert_close(scores.logps.detach(), rollout.logps, atol=1e-4, rtol=0)
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    got = _adapter_gradients(model, scores.logps, weight)
    base.set_attn_implementation("eager")
    want = _adapter_gradients(model, slow_any_order(model, rollout)[0], weight.double())
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= 1e-3 * want[name].abs().max(), name


# ----------------------------------------------------------------------------------------------- identities 1, 4 and 7


def test_identity_1_isolated_pkl_u_of_the_whole_canvas_is_the_mean_field_of_an_any_order_model(models):
    """All positions at once from the prompt alone, under the model's own attention: AnyOrder of a one-step rollout."""
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 0)
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    at_once = type(rollout)(**{**fields, "unmask_step": rollout.unmask_step.clamp(max=0)})
    with torch.no_grad():
        want = token_logps(model, at_once, AnyOrder())
        got = token_logps(model, rollout, BlockPseudoLikelihood(block_size=9, mask_attention="isolated"))
        full = token_logps(model, rollout, MeanField())
    torch.testing.assert_close(got.logps, want.logps, atol=1e-5, rtol=0)
    assert (full.logps - want.logps).abs().max() > 1e-2, "the plain denoiser's masks see each other"


def _mask_row_logits(model, rollout, estimator):
    view = estimator.view(rollout, 0, rollout.view_seed, 0)
    mask = attention_mask(view.attention, model.config._attn_implementation, model.dtype)
    with torch.no_grad():
        out = model(
            input_ids=view.input_ids, position_ids=view.position_ids, attention_mask=mask, use_cache=False
        ).logits
    return out[:, -rollout.completion_ids.shape[1] :]


def _leak(model, rollout, estimator) -> list[float]:
    """For each position, how far the logits at its mask row move when its own token changes, in any row."""
    before, moved = _mask_row_logits(model, rollout, estimator), []
    for i in range(rollout.completion_ids.shape[1]):
        tokens = rollout.completion_ids.clone()
        hit = rollout.revealed[:, i]
        tokens[hit, i] = (tokens[hit, i] + 41) % 90 + 10
        fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
        changed = type(rollout)(**{**fields, "completion_ids": tokens})
        after = _mask_row_logits(model, changed, estimator)
        moved.append((after - before)[hit, i].abs().max().item() if hit.any() else 0.0)
        others = [j for j in range(tokens.shape[1]) if j != i]
        assert (after - before)[hit][:, others].abs().max() > 1e-3, "some later mask row must see the token"
    return moved


def test_identity_4_a_tokens_own_value_does_not_reach_its_mask_row(models):
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 0)
    for estimator in (AnyOrder(), TrajectoryPseudoLikelihood("causal")):
        assert max(_leak(model, rollout, estimator)) < 1e-5


def test_identity_4_bidirectional_pkl_t_leaks_with_two_layers_and_not_with_one(models):
    """Through the other clean rows (d2 and PADRE §4.4; docs/methods.md §2.3)."""
    rollout, estimator = random_rollout(MASK, VOCAB, 0), TrajectoryPseudoLikelihood("bidirectional")
    assert estimator.exact_for == ()
    moved = _leak(models("llada"), rollout, estimator)
    assert min(moved) > 1e-2, moved
    shallow = sharp_model("llada")
    del shallow.model.layers[1:]
    shallow.config.num_hidden_layers = 1
    assert max(_leak(shallow, rollout, estimator)) < 1e-5


def test_identity_7_scores_do_not_depend_on_the_batch(models):
    model, rollout = models("llada"), random_rollout(MASK, VOCAB, 4)
    for estimator in (AnyOrder(), TrajectoryPseudoLikelihood("bidirectional")):
        with torch.no_grad():
            logps = token_logps(model, rollout, estimator).logps
            wide = token_logps(model, random_rollout(MASK, VOCAB, 4, width=13), estimator).logps
            torch.testing.assert_close(wide, logps, atol=1e-5, rtol=0)
            order = torch.tensor([3, 0, 4, 1, 2])
            for size in (1, 2):
                shuffled = token_logps(model, rollout[order], estimator, batch_size=size).logps
                torch.testing.assert_close(shuffled, logps[order], atol=1e-5, rtol=0)
