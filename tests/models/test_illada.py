"""iLLaDA: Llama's keys, tied embeddings, and a mask token that nothing on the Hub names."""

import pytest
import torch
from cases import IDS
from helpers_families import (
    DENSE,
    LINEAR,
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
from transformers import AutoConfig, AutoTokenizer

from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.models.illada import ILLaDAConfig, ILLaDAForCausalLM


# The Hub's field names, with small numbers; neither a mask token nor a padding token of LLaDA's.
CONFIG = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_illada.ILLaDAConfig",
        "AutoModel": "modeling_illada.ILLaDAForCausalLM",
        "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    },
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_norm_eps": None,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12345.0,
    "tie_word_embeddings": True,
    **TOKENS,
}
GROUPED = {"self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}


@pytest.fixture
def checkpoint(tmp_path):
    shapes = stock_shapes([DENSE | GROUPED] * 2, head=False)
    return tmp_path, write_checkpoint(tmp_path, CONFIG, shapes, mask_token=False)


def test_a_checkpoint_loads_saves_and_computes_what_the_hubs_does(checkpoint):
    folder, state = checkpoint
    model = check_loading(folder, ILLaDAForCausalLM, state, mask_token_id=5)
    check_attention(model)

    def weight(name):
        return state["model.embed_tokens.weight" if name == "lm_head.weight" else name]

    want = plain_forward(weight, IDS, dense_mlp(weight), theta=12345.0, kv_heads=1, qk_norm=False, eps=1e-5)
    assert want.std() > 1
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-5)


def test_it_is_trained_adapted_and_merged(checkpoint):
    folder, _ = checkpoint
    check_training(folder)
    check_adapter_and_merge(folder, LINEAR)


def test_the_defaults_are_the_released_models():
    config = ILLaDAConfig()
    assert (config.vocab_size, config.mask_token_id, config.eos_token_id, config.pad_token_id) == (155136, 5, 2, 1)
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (4096, 32, 8)
    assert config.tie_word_embeddings and not config.is_causal


@pytest.mark.parametrize(("name", "value"), [("layer_norm_eps", 1e-5), ("resid_pdrop", 0.1)])
def test_another_structure_is_refused(checkpoint, name, value):
    folder, state = checkpoint
    write_checkpoint(folder, {**CONFIG, name: value}, {key: tuple(v.shape) for key, v in state.items()})
    with pytest.raises(ValueError, match=f"{name}={value} in a ILLaDAConfig: this implementation has"):
        AutoConfig.from_pretrained(folder)


def test_another_mask_token_of_the_tokenizer_is_refused(checkpoint):
    """As LLaDA's tokenizer would name one; iLLaDA's names none."""
    folder, _ = checkpoint
    assert AutoTokenizer.from_pretrained(folder).mask_token_id is None
    tokenizer = create_tiny_model("llada", 16, 1)[1]
    with pytest.raises(ValueError, match=r"mask_token_id=5 in the model's config, but the tokenizer's .* has id 3"):
        MaskedDiffusionSpec.from_config(AutoConfig.from_pretrained(folder), tokenizer)
