"""A2D: a stock decoder's keys and config; the tokenizer names the mask token, the repository's name the attention."""

import json

import pytest
import torch
from cases import IDS
from helpers_families import (
    DENSE,
    LINEAR,
    QK_NORMS,
    TOKENS,
    check_adapter_and_merge,
    check_attention,
    check_loading,
    check_training,
    dense_mlp,
    logits,
    plain_forward,
    stock_shapes,
    write_checkpoint,
)
from oracles import left_pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.models import MaskedDiffusionSpec
from trl_dllm.models.a2d import (
    A2DLlamaConfig,
    A2DLlamaLMHeadModel,
    A2DQwen2Config,
    A2DQwen2LMHeadModel,
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
)


# The base model's config under another model_type: nothing says mask, blocks or that attention is not causal.
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 12345.0,
    "tie_word_embeddings": False,
    **TOKENS,
}
QWEN2 = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
CASES = {
    "qwen3": (A2DQwen3LMHeadModel, {"head_dim": 16, **QWEN2}, DENSE | QK_NORMS),
    "qwen2": (A2DQwen2LMHeadModel, QWEN2, DENSE | {f"self_attn.{name}_proj.bias": (32,) for name in "qkv"}),
    "llama": (A2DLlamaLMHeadModel, {"attention_bias": False, "mlp_bias": False}, DENSE),
}


@pytest.fixture(params=CASES)
def checkpoint(request, tmp_path):
    model_class, more, parts = CASES[request.param]
    model_type = f"a2d-{request.param}"
    config = {**COMMON, **more, "architectures": [model_class.__name__], "model_type": model_type}
    folder = tmp_path / "tiny-diffusion-mdlm-v0.1"
    return folder, model_class, write_checkpoint(folder, config, stock_shapes([parts] * 2))


def test_a_checkpoint_loads_saves_and_computes_what_the_hubs_does(checkpoint):
    folder, model_class, state = checkpoint
    model = check_loading(folder, model_class, state, mask_token_id=3)
    check_attention(model)
    stock = {A2DQwen2LMHeadModel: Qwen2ForCausalLM, A2DLlamaLMHeadModel: LlamaForCausalLM}.get(model_class)
    if stock is None:
        want = plain_forward(state.__getitem__, IDS, dense_mlp(state.__getitem__), theta=12345.0)
    else:
        other = stock(model.config)
        other.load_state_dict(state)
        want = logits(other)
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-5)


def test_it_is_trained_adapted_and_merged(checkpoint):
    folder, _, _ = checkpoint
    check_training(folder)
    check_adapter_and_merge(folder, LINEAR)


def test_the_mask_token_is_the_tokenizers(checkpoint):
    folder, _, _ = checkpoint
    with pytest.raises(ValueError, match=r"mask_token_id is missing: neither the config of this 'a2d-.*' model nor"):
        MaskedDiffusionSpec.from_config(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    MaskedDiffusionSpec.from_model(model, AutoTokenizer.from_pretrained(folder)).write_to(model)
    model.save_pretrained(folder / "named")
    assert MaskedDiffusionSpec.from_config(AutoConfig.from_pretrained(folder / "named")).mask_token_id == 3


@pytest.mark.parametrize(
    ("name", "block_size"),
    [("Qwen3-0.6B-diffusion-bd3lm-v0.1", 32), ("opdlm-4b", 4), ("Qwen3-0.6B-diffusion-mdlm-v0.1", None)],
)
def test_a_block_causal_one_is_told_by_its_name_and_trained_in_its_blocks(tmp_path, name, block_size):
    model_class, more, parts = CASES["qwen3"]
    folder = tmp_path / name
    write_checkpoint(
        folder,
        {**COMMON, **more, "architectures": [model_class.__name__], "model_type": "a2d-qwen3"},
        stock_shapes([parts] * 2),
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is model_class and model.config.block_size == block_size
    spec = MaskedDiffusionSpec.from_model(model, AutoTokenizer.from_pretrained(folder))
    assert spec == MaskedDiffusionSpec(3, 0, block_size)
    ids, mask = left_pad([[5, 6]])
    config = DiffusionGenerationConfig(max_new_tokens=4, block_length=4, diffusion_steps=2)
    if block_size is None:
        assert generate(model, ids, mask, config, spec=spec).revealed.all()
        return
    check_training(folder)
    model.save_pretrained(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere" / "config.json").read_text())["block_size"] == block_size


def test_a_config_by_itself_is_of_full_attention():
    for config in (A2DQwen3Config(), A2DQwen2Config(), A2DLlamaConfig()):
        assert config.block_size is None and config.mask_token_id is None and not config.is_causal
