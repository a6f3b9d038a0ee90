"""What a model must tell: the spec of any decoder, and the refusals."""

import pytest
from cases import CACHES, rollout_for_tests, sample_any_order
from datasets import Dataset
from transformers import BloomConfig, DiffusionGemmaConfig, Gemma2Config, LlamaConfig, Qwen2Config

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.likelihood import AnyOrder, TrajectoryPseudoLikelihood, token_logps
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.models.spec import check_positions


def test_spec_of_the_families():
    for family, shift in (("llada", 0), ("dream", 1)):
        model, tokenizer = create_tiny_model(family, hidden_size=16, num_layers=1)
        assert MaskedDiffusionSpec.from_model(model) == MaskedDiffusionSpec(3, shift)
        assert MaskedDiffusionSpec.from_model(model, tokenizer).mask_token_id == tokenizer.mask_token_id


def test_spec_of_a_stock_decoder_trained_as_a_diffusion_model():
    """Any decoder with is_causal=False and a mask token; the tokenizer may be the one that names it."""
    config = LlamaConfig(vocab_size=50, is_causal=False, mask_token_id=7, logits_shift=1)
    assert MaskedDiffusionSpec.from_config(config) == MaskedDiffusionSpec(7, 1)
    _, tokenizer = create_tiny_model("llada", hidden_size=16, num_layers=1)
    assert MaskedDiffusionSpec.from_config(LlamaConfig(vocab_size=50, is_causal=False), tokenizer).mask_token_id == 3


def test_block_size_is_the_configs():
    config = LlamaConfig(is_causal=False, mask_token_id=7)
    assert MaskedDiffusionSpec.from_config(config).block_size is None
    config.block_size = 8
    assert MaskedDiffusionSpec.from_config(config) == MaskedDiffusionSpec(7, 0, 8)
    config.block_size = 0
    with pytest.raises(ValueError, match=r"block_size=0 must be a whole number from 1 on, or None"):
        MaskedDiffusionSpec.from_config(config)


class NoMask:
    mask_token_id = None


class OtherMask:
    mask_token_id = 9


@pytest.mark.parametrize(
    ("config", "tokenizer", "match"),
    [
        (
            LlamaConfig(mask_token_id=7),
            None,
            "model_type='llama'.*is_causal.*autoregressive.*config.is_causal = False",
        ),
        (Qwen2Config(mask_token_id=7, is_causal=True), None, "is_causal=True.*autoregressive.*set config.is_causal"),
        (LlamaConfig(is_causal=False), None, "mask_token_id is missing.*'llama'.*Set config.mask_token_id"),
        (LlamaConfig(is_causal=False), NoMask, "mask_token_id is missing.*Set config.mask_token_id"),
        (
            LlamaConfig(is_causal=False, mask_token_id=7),
            OtherMask,
            "mask_token_id=7.*id 9.*checkpoint's own tokenizer",
        ),
        (LlamaConfig(is_causal=False, mask_token_id=50, vocab_size=50), None, "mask_token_id=50.*50 tokens.*resize"),
        (LlamaConfig(is_causal=False, mask_token_id=-1), None, "mask_token_id=-1.*name the right token"),
        (LlamaConfig(is_causal=False, vocab_size=5), OtherMask, "mask_token_id=9.*vocabulary of 5"),
        (
            Gemma2Config(is_causal=False, mask_token_id=4),
            None,
            "final_logit_softcapping=30.0 is not supported.*logits",
        ),
        (LlamaConfig(is_causal=False, mask_token_id=4, logit_scale=0.06), None, "logit_scale=0.06 is not supported"),
        (LlamaConfig(is_causal=False, mask_token_id=4, logits_shift=2), None, "logits_shift=2.*0.*or 1"),
    ],
)
def test_spec_errors_name_field_value_and_remedy(config, tokenizer, match):
    with pytest.raises(ValueError, match=match):
        MaskedDiffusionSpec.from_config(config, tokenizer)


def test_diffusion_gemma_is_refused():
    """Uniform noise: there is no mask token."""
    with pytest.raises(NotImplementedError, match=r"model_type='diffusion_gemma'.*no mask token.*LLaDA"):
        MaskedDiffusionSpec.from_config(DiffusionGemmaConfig())


@pytest.mark.parametrize("name", ["logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"])
def test_every_scale_behind_the_head_is_refused(name):
    config = LlamaConfig(is_causal=False, mask_token_id=4, **{name: 0.5})
    with pytest.raises(ValueError, match=f"{name}=0.5 is not supported"):
        MaskedDiffusionSpec.from_config(config)


def test_a_scale_of_one_is_no_transformation():
    assert MaskedDiffusionSpec.from_config(
        LlamaConfig(is_causal=False, mask_token_id=4, logit_scale=1.0, final_logit_softcapping=None)
    )


def test_shifted_families_are_refused_with_the_reason(models, tmp_path):
    """Dream predicts a position at the row before it: estimators, decoding, GRPO and the SFT objective say so."""
    model, rollout = models("dream"), rollout_for_tests()
    reason = r"logits_shift=1 \(Dream\).*row before it.*no row predicts token i.*unshifted family \(LLaDA\)"
    for estimator in (AnyOrder(), TrajectoryPseudoLikelihood(), TrajectoryPseudoLikelihood("bidirectional")):
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} does not apply.*{reason}"):
            token_logps(model, rollout, estimator)
    for cache in CACHES:
        with pytest.raises(ValueError, match=f"decoding='any_order' does not apply.*{reason}"):
            sample_any_order(model, cache)
    tiny, tokenizer = create_tiny_model("dream", 16, 1)
    data = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
    with pytest.raises(ValueError, match=f"objective='any_order' does not apply.*{reason}"):
        DiffusionSFTTrainer(
            tiny,
            DiffusionSFTConfig(str(tmp_path), objective="any_order", use_cpu=True, bf16=False),
            train_dataset=data,
            processing_class=tokenizer,
        )
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "max_completion_length": 8}
    for settings, name in (
        ({"estimator": "any_order"}, "AnyOrder"),
        ({"decoding": "any_order"}, "decoding='any_order'"),
    ):
        with pytest.raises(ValueError, match=f"{name} does not apply.*{reason}"):
            DiffusionGRPOTrainer(
                tiny,
                lambda completions, **kwargs: [0.0] * len(completions),
                DiffusionGRPOConfig(str(tmp_path), **common, **settings),
                train_dataset=data,
                processing_class=tokenizer,
            )


def test_prompt_and_canvas_fit_the_models_positions():
    config = LlamaConfig(max_position_embeddings=32)
    check_positions(config, 24, 8, "canvas_length")
    with pytest.raises(ValueError, match=r"^row 3: 25 prompt tokens and canvas_length=8 are beyond .*embeddings=32\."):
        check_positions(config, 25, 8, "canvas_length", "row 3: ")
    check_positions(BloomConfig(), 10**6, 8, "canvas_length")  # whose positions have no end
