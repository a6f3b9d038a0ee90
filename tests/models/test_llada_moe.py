"""LLaDA-MoE: LLaDA's model_type, Qwen3-MoE's keys with a tensor an expert, routing without renormalisation."""

import json

import pytest
import torch
from cases import IDS
from helpers_families import (
    ATTENTION,
    NORMS,
    QK_NORMS,
    TOKENS,
    check_adapter_and_merge,
    check_attention,
    check_loading,
    check_training,
    experts,
    logits,
    mixture,
    plain_forward,
    stock_shapes,
    write_checkpoint,
)
from transformers import AutoConfig, AutoModelForCausalLM

from trl_dllm.models import LLaDAConfig, LLaDAModelLM, create_tiny_model
from trl_dllm.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM


# LLaDA-MoE-7B-A1B's field names, nulls and constants, with small numbers in the place of the large.
CONFIG = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "clip_qkv": None,
    "dense_intermediate_size": 48,
    "expert_intermediate_size": 24,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "mask_token_id": 3,
    "max_position_embeddings": 512,
    "model_type": "llada",
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": None,
    "output_router_logits": False,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 12345.0,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    **TOKENS,
}
SHAPES = stock_shapes([ATTENTION | NORMS | QK_NORMS | {"mlp.gate": (5, 32)} | experts(5)] * 2)


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path, write_checkpoint(tmp_path, CONFIG, SHAPES)


def test_a_checkpoint_loads_saves_and_computes_what_the_hubs_does(checkpoint):
    folder, state = checkpoint
    model = check_loading(folder, LLaDAMoEModelLM, state, mask_token_id=3)
    check_attention(model)

    def chosen(router):  # softmax over all experts, then the two best as they are
        probabilities = router.softmax(-1)
        return {int(expert): probabilities[expert] for expert in probabilities.topk(2).indices}

    def mlp(n, h):
        return mixture(state.__getitem__, f"model.layers.{n}", h, chosen)

    want = plain_forward(state.__getitem__, IDS, mlp, theta=12345.0, eps=1e-5)
    assert want.std() > 1
    torch.testing.assert_close(logits(model), want, atol=5e-5, rtol=1e-5)


def test_it_is_trained_adapted_and_merged(checkpoint):
    folder, _ = checkpoint
    check_training(folder)
    check_adapter_and_merge(folder, {"q_proj", "k_proj", "v_proj", "o_proj"})


def test_the_number_of_experts_tells_it_from_a_dense_llada(tmp_path, checkpoint):
    folder, _ = checkpoint
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is LLaDAMoEConfig and type(LLaDAConfig.from_pretrained(folder)) is LLaDAMoEConfig
    assert config.moe_intermediate_size == config.expert_intermediate_size == 24
    assert config.intermediate_size == 48 and config.num_experts == 5 and config.norm_topk_prob is False
    assert (config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (2, 12345.0)
    create_tiny_model("llada", 16, 1)[0].save_pretrained(tmp_path / "dense")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is LLaDAModelLM
    with pytest.raises(ValueError, match=r"num_experts=64 in a LLaDAConfig is LLaDA-MoE.*take LLaDAMoEConfig"):
        LLaDAConfig(num_experts=64)


def test_the_defaults_are_the_released_model():
    config = LLaDAMoEConfig()
    assert (config.vocab_size, config.mask_token_id, config.eos_token_id) == (157184, 156895, 156892)
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts) == (2048, 16, 64)
    assert (config.num_key_value_heads, config.num_experts_per_tok, config.moe_intermediate_size) == (16, 8, 1024)
    assert not config.norm_topk_prob and not config.is_causal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_qkv", 8.0),
        ("moe_router_enable_expert_bias", True),
        ("moe_router_score_function", "sigmoid"),
        ("qk_layernorm", False),
        ("routed_scaling_factor", 2.5),
        ("router_num_group", 8),
        ("shared_expert_intermediate_size", 64),
        ("moe_layer_freq", [0, 1]),
        ("attention_bias", True),
    ],
)
def test_another_structure_is_refused(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    with pytest.raises(ValueError, match=f"{name}=.* in a LLaDA-?MoE"):
        AutoConfig.from_pretrained(tmp_path)
