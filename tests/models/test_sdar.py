"""SDAR: Qwen3's keys and Qwen3-MoE's; they load, and are trained in their own blocks."""

import json

import pytest
import torch
from cases import IDS
from datasets import Dataset
from helpers_families import (
    ATTENTION,
    DENSE,
    LINEAR,
    NORMS,
    QK_NORMS,
    TOKENS,
    check_adapter_and_merge,
    check_loading,
    check_training,
    dense_mlp,
    experts,
    logits,
    mixture,
    plain_forward,
    stock_shapes,
    write_checkpoint,
)
from transformers import AutoConfig

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.blocks import Blocks
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.models.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM


# SDAR-4B-Chat's fields, inert ones among them, with small numbers. The Hub's has neither mask token nor block size;
# the tiny vocabulary needs a mask token of its own.
CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARForCausalLM"},
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "mask_token_id": 3,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 12345.0,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_deepep": False,
    "use_sliding_window": False,
    **TOKENS,
}
MOE = {
    **CONFIG,
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
MOE_PARTS = ATTENTION | NORMS | QK_NORMS | {"mlp.gate": (5, 32)} | experts(5)

# Blocks of four, counted from position 0: what a position may see.
BLOCK = torch.arange(IDS.shape[1]) // 4
ALLOWED = BLOCK[None, :] <= BLOCK[:, None]


def test_a_checkpoint_loads_saves_and_computes_what_the_hubs_does(tmp_path):
    state = write_checkpoint(tmp_path, CONFIG, stock_shapes([DENSE | QK_NORMS] * 2))
    model = check_loading(tmp_path, SDARForCausalLM, state, mask_token_id=3)
    assert model.config.block_size == 4
    want = plain_forward(state.__getitem__, IDS, dense_mlp(state.__getitem__), theta=12345.0, allowed=ALLOWED)
    got = logits(model, attention_mask=ALLOWED.expand(2, 1, -1, -1))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert (logits(model) - want).abs().max() > 0.1, "blocks should matter"
    check_adapter_and_merge(tmp_path, LINEAR)


def test_a_mixture_of_experts_loads_saves_and_computes_what_the_hubs_does(tmp_path):
    state = write_checkpoint(tmp_path, MOE, stock_shapes([MOE_PARTS] * 2))
    model = check_loading(tmp_path, SDARMoeForCausalLM, state, mask_token_id=3)

    def chosen(router):  # the two best of a softmax over all, made to sum to one
        best = router.softmax(-1).topk(2)
        return {
            int(expert): share for expert, share in zip(best.indices, best.values / best.values.sum(), strict=True)
        }

    def mlp(n, h):
        return mixture(state.__getitem__, f"model.layers.{n}", h, chosen)

    want = plain_forward(state.__getitem__, IDS, mlp, theta=12345.0, allowed=ALLOWED)
    got = logits(model, attention_mask=ALLOWED.expand(2, 1, -1, -1))
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)
    check_adapter_and_merge(tmp_path, {"q_proj", "k_proj", "v_proj", "o_proj"})


def test_the_defaults_are_the_released_models():
    for config in (SDARConfig(), SDARMoeConfig()):
        assert (config.mask_token_id, config.block_size, config.is_causal) == (151669, 4, False)
    assert SDARMoeConfig().norm_topk_prob


def test_a_block_size_in_the_name_alone_is_warned_of(tmp_path):
    folder = tmp_path / "SDAR-4B-Chat-b16"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.warns(UserWarning, match=r"block_size=4 in the config, but the checkpoint is called .*-b16: set"):
        AutoConfig.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "block_size": 16}))
    assert AutoConfig.from_pretrained(folder).block_size == 16


def test_it_is_trained_in_its_own_blocks(tmp_path):
    write_checkpoint(tmp_path, CONFIG, stock_shapes([DENSE | QK_NORMS] * 2))
    check_training(tmp_path)


def test_a_mixture_is_trained_in_its_own_blocks(tmp_path):
    write_checkpoint(tmp_path, MOE, stock_shapes([MOE_PARTS] * 2))
    check_training(tmp_path)


def test_a_user_may_say_other_blocks(tmp_path):
    write_checkpoint(tmp_path, CONFIG, stock_shapes([DENSE | QK_NORMS] * 2))
    model = SDARForCausalLM.from_pretrained(tmp_path, block_size=8, block_alignment="canvas")
    spec = MaskedDiffusionSpec.from_model(model)
    assert spec == MaskedDiffusionSpec(3, 0, 8, "canvas") and spec.blocks == Blocks(8, "canvas")
    model.save_pretrained(tmp_path / "saved")
    assert MaskedDiffusionSpec.from_config(AutoConfig.from_pretrained(tmp_path / "saved")) == spec


def test_what_does_not_follow_blocks_is_refused_before_any_weight_is_loaded(tmp_path):
    _, tokenizer = create_tiny_model("sdar", 16, 1)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer.save_pretrained(tmp_path)
    data = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
    common = {"use_cpu": True, "bf16": False, "report_to": "none"}

    def grpo(**settings):
        config = DiffusionGRPOConfig(
            str(tmp_path), **{"max_completion_length": 8, "block_length": 4, **settings}, **common
        )
        DiffusionGRPOTrainer(str(tmp_path), lambda completions, **kwargs: [0.0], config, train_dataset=data)

    reason = "does not apply to a block-causal model, and this one has block_size=4"
    with pytest.raises(ValueError, match=f"objective='any_order' {reason}.*Set objective='masked_diffusion'"):
        config = DiffusionSFTConfig(str(tmp_path), objective="any_order", **common)
        DiffusionSFTTrainer(str(tmp_path), config, train_dataset=data)
    with pytest.raises(ValueError, match=f"AnyOrder {reason}.*Use exact_trajectory or step_merge"):
        grpo(estimator="any_order")
    with pytest.raises(ValueError, match=r"block_length=4, and the model .* with block_size=8: .*Set block_length=8"):
        grpo(model_init_kwargs={"block_size": 8})
    with pytest.raises(ValueError, match=r"block_length=8, and the model is block-causal .*Set block_length=4"):
        grpo(block_length=8)
