"""LLaDA2: GLM-4-MoE under other key names, with a fused projection that is split on loading."""

import json

import pytest
import torch
from cases import IDS
from helpers_families import (
    LINEAR,
    NORMS,
    TOKENS,
    VOCAB,
    check_adapter_and_merge,
    check_loading,
    check_training,
    experts,
    logits,
    mixture,
    plain_forward,
    swiglu,
    write_checkpoint,
)
from transformers import AutoConfig

from trl_dllm.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM


# LLaDA2.0-mini's fields, with small numbers; the Hub's has no mask token and no block size.
CONFIG = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": 3,
    "max_position_embeddings": 512,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 12345.0,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_sliding_window": False,
    **TOKENS,
}
LAYER = {
    "attention.query_key_value.weight": ((2 + 1 + 1) * 16, 32),
    "attention.dense.weight": (32, 32),
    "attention.query_layernorm.weight": (16,),
    "attention.key_layernorm.weight": (16,),
    **{f"{name}.weight": shape for name, shape in NORMS.items()},
}
DENSE = {"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48)}
EXPERTS = {
    "mlp.gate.weight": (8, 32),
    "mlp.gate.expert_bias": (8,),
    "mlp.shared_experts.gate_proj.weight": (24, 32),
    "mlp.shared_experts.up_proj.weight": (24, 32),
    "mlp.shared_experts.down_proj.weight": (32, 24),
    **{f"{name}.weight": shape for name, shape in experts(8).items()},
}
SHAPES = {
    "model.word_embeddings.weight": (VOCAB, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (VOCAB, 32),
    **{f"model.layers.0.{name}": shape for name, shape in (LAYER | DENSE).items()},
    **{f"model.layers.1.{name}": shape for name, shape in (LAYER | EXPERTS).items()},
}


def stock(state):
    """The weights by stock names; the fused projection's rows are queries, keys, values."""
    names = {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}
    original = {"o_proj": "dense", "q_norm": "query_layernorm", "k_norm": "key_layernorm"}

    def weight(name):
        if name == "model.embed_tokens.weight":
            return state["model.word_embeddings.weight"]
        layer, _, part = name.removesuffix(".weight").partition(".self_attn.")
        if part in names:
            return state[f"{layer}.attention.query_key_value.weight"][names[part]]
        return state[f"{layer}.attention.{original[part]}.weight"] if part else state[name]

    return weight


def reference(state, allowed=None):
    weight = stock(state)

    def chosen(router):
        """Two of four groups by the sum of their two best scores, three experts of these; the bias only chooses."""
        scores = router.sigmoid()
        biased = (scores + state["model.layers.1.mlp.gate.expert_bias"]).view(4, 2)
        groups = biased.sum(dim=1).topk(2).indices
        left = torch.full((4, 2), -torch.inf).index_copy(0, groups, biased[groups]).flatten()
        best = left.topk(3).indices
        return {int(expert): 2.5 * scores[expert] / scores[best].sum() for expert in best}

    def mlp(n, h):
        if n == 0:
            return swiglu(weight, "model.layers.0.mlp", h)
        return mixture(weight, "model.layers.1", h, chosen) + swiglu(weight, "model.layers.1.mlp.shared_experts", h)

    return plain_forward(weight, IDS, mlp, theta=12345.0, kv_heads=1, rotary=0.5, allowed=allowed)


def test_a_checkpoint_loads_saves_and_computes_what_the_hubs_does(tmp_path):
    state = write_checkpoint(tmp_path, CONFIG, SHAPES)
    model = check_loading(tmp_path, LLaDA2MoeModelLM, state, mask_token_id=3)
    assert model.config.block_size == 32 and model.config.n_routed_experts == model.config.num_experts == 8
    want = reference(state)
    assert want.std() > 1
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-5)
    block = torch.arange(IDS.shape[1]) // 4
    allowed = block[None, :] <= block[:, None]
    got = logits(model, attention_mask=allowed.expand(2, 1, -1, -1))
    torch.testing.assert_close(got, reference(state, allowed), atol=1e-4, rtol=1e-5)
    check_adapter_and_merge(tmp_path, LINEAR)  # of the dense MLP and the shared expert


def test_the_defaults_are_the_released_mini():
    config = LLaDA2MoeConfig()
    assert (config.vocab_size, config.mask_token_id, config.eos_token_id) == (157184, 156895, 156892)
    assert (config.num_experts, config.n_group, config.topk_group, config.num_experts_per_tok) == (256, 8, 4, 8)
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.block_size) == (20, 1, 32)
    assert config.rope_parameters == {"rope_theta": 600_000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_enable_expert_bias", False),
        ("norm_head", True),
        ("norm_topk_prob", False),
        ("score_function", "softmax"),
        ("use_bias", True),
        ("use_qk_norm", False),
        ("use_qkv_bias", True),
        ("use_sliding_window", True),
    ],
)
def test_another_structure_is_refused(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    with pytest.raises(ValueError, match=f"{name}={value!r} in a LLaDA2MoeConfig: this implementation has"):
        AutoConfig.from_pretrained(tmp_path)


def test_it_is_trained_in_its_own_blocks(tmp_path):
    write_checkpoint(tmp_path, {**CONFIG, "block_size": 4}, SHAPES)
    check_training(tmp_path)
