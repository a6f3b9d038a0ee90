"""LLaDA-MoE (7B-A1B): Qwen3-MoE with bidirectional attention and LLaDA's name.

Its configs say `model_type: llada`, as the dense LLaDA's do; the number of experts tells them apart. Keys are
Qwen3-MoE's, with a tensor an expert, which transformers merges while loading and takes apart while saving.
"""

from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from .hub import HubConfig, HubKeys


CONFIG_NAMES = {
    "expert_intermediate_size": "moe_intermediate_size",
    "dense_intermediate_size": "intermediate_size",
    "num_experts": "num_local_experts",
}


# The same in every released checkpoint; another value would change what the model computes.
FIXED: dict[str, tuple] = {
    "qk_layernorm": (True,),
    "clip_qkv": (None,),
    "attention_bias": (False,),
    "shared_expert_intermediate_size": (None, 0, -1),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "routed_scaling_factor": (1, None),
    "router_num_group": (None, 0, 1, -1, -2),
    "router_topk_group": (None, 0, 1, -1, -2),
}


class LLaDAMoEConfig(HubConfig, Qwen3MoeConfig):
    """Config of LLaDA-MoE: reads the original names and writes both.

    Args:
        mask_token_id (`int`, defaults to 156895): id of the mask token.
        is_causal (`bool`, defaults to `False`): every position attends to every other.
    """

    model_type = "llada"
    attribute_map = CONFIG_NAMES
    hub_names = CONFIG_NAMES
    hub_fixed = FIXED

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 8192
    moe_intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    num_experts: int = 64
    num_experts_per_tok: int = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.01
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    mask_token_id: int = 156895
    is_causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        layers = kwargs.pop("moe_layer_freq", None) or [1]
        if set(layers) != {1}:
            raise ValueError(f"moe_layer_freq={layers} in a LLaDA-MoE config: here every layer has experts.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config that a dictionary describes; the Hub's have null for what follows from the rest."""
        heads, normalised = config_dict.get("num_key_value_heads"), config_dict.get("norm_topk_prob")
        given = {
            "num_key_value_heads": config_dict.get("num_attention_heads", 16) if heads is None else heads,
            "norm_topk_prob": bool(normalised),
        }
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_dict(self) -> dict:
        return {"moe_layer_freq": [1] * self.num_hidden_layers, **super().to_dict()}


class LLaDAMoEModelLM(HubKeys, Qwen3MoeForCausalLM):
    """LLaDA-MoE: the row at a position predicts that position."""

    config_class = LLaDAMoEConfig
    hub_conversion = get_checkpoint_conversion_mapping("qwen2_moe")
