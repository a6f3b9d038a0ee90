"""LLaDA2.0 and 2.1 (mini, flash): GLM-4-MoE with block-causal attention under other key names.

Sigmoid routing in groups with a correction bias, a shared expert, a dense first layer, rotary embeddings of half of
each head. Of 2.1, decoding that edits visible tokens is left out: a token is revealed once here.
"""

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.conversion_mapping import WeightConverter, WeightRenaming, get_checkpoint_conversion_mapping
from transformers.core_model_loading import Split

from .hub import Conversion, HubConfig, HubKeys


CONFIG_NAMES = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}


# The same in every released checkpoint; another value would change what the model computes.
FIXED: dict[str, tuple] = {
    "use_qk_norm": (True,),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "norm_head": (False,),
    "norm_topk_prob": (True,),
    "score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,),
    "use_sliding_window": (False,),
}


class LLaDA2MoeConfig(HubConfig, Glm4MoeConfig):
    """Config of LLaDA2: reads the original names and writes both.

    Args:
        mask_token_id (`int`, defaults to 156895): id of the mask token.
        block_size (`int`, defaults to 32): positions of a block.
        block_alignment (`str`, defaults to `"position"`): where blocks begin: at the first token of the prompt or,
            with "canvas", of the canvas.
        is_causal (`bool`, defaults to `False`): attention is not causal.
    """

    model_type = "llada2_moe"
    attribute_map = Glm4MoeConfig.attribute_map | CONFIG_NAMES
    hub_names = CONFIG_NAMES
    hub_fixed = FIXED

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    n_routed_experts: int = 256
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    use_qk_norm: bool = True
    num_mtp_layers: int = 0
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    mask_token_id: int = 156895
    block_size: int = 32
    block_alignment: str = "position"
    is_causal: bool = False

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            kwargs.setdefault("rope_theta", 600_000.0)
        super().__post_init__(**kwargs)


# The fused projection's rows are the queries', the keys' and the values'.
KEY_CONVERSION: Conversion = [
    WeightRenaming(r"model\.word_embeddings\.", "model.embed_tokens."),
    WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    WeightConverter(
        source_patterns=".attention.query_key_value.weight",
        target_patterns=[".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight"],
        operations=[Split(dim=0)],
    ),
    *get_checkpoint_conversion_mapping("qwen2_moe"),
]


class LLaDA2MoeModelLM(HubKeys, Glm4MoeForCausalLM):
    """LLaDA2: the row at a position predicts that position."""

    config_class = LLaDA2MoeConfig
    hub_conversion = KEY_CONVERSION
    # The stock class drops layers 46 and 92, which are GLM's.
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012  transformers declares it so
