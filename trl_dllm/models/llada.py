"""LLaDA (8B Base and Instruct, 1.5): Llama with bidirectional attention under other key names.

Hub checkpoints load without remote code: keys are renamed while loading and renamed back while saving, so a saved
folder has the Hub's own key names, and its config also carries the names that the original modelling code reads.
"""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import WeightRenaming

from .hub import Conversion, HubConfig, HubKeys
from .llada_moe import LLaDAMoEConfig


# Original config name -> the name that transformers' Llama gives the same thing.
CONFIG_NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "embedding_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
}

# What the original code reads and the forward does not depend on: written to a saved config.
_INERT = {
    "block_group_size": 1,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_fn": "mitchell",
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rope_full_precision": True,
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
}


# The same in every released checkpoint; another value would change what the model computes.
FIXED: dict[str, tuple] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "scale_logits": (False,),
}


class LLaDAConfig(HubConfig, LlamaConfig):
    """Config of LLaDA: reads the original names and writes both, so that the original code can read what is saved
    here.

    Args:
        mask_token_id (`int`, defaults to 126336): id of the mask token.
        is_causal (`bool`, defaults to `False`): every position attends to every other.
    """

    model_type = "llada"
    attribute_map = CONFIG_NAMES
    hub_names = CONFIG_NAMES
    hub_fixed = FIXED

    vocab_size: int = 126464
    intermediate_size: int = 12288
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 126080
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    mask_token_id: int = 126336
    is_causal: bool = False

    def __post_init__(self, **kwargs):
        if kwargs.get("num_experts"):
            raise ValueError(
                f"num_experts={kwargs['num_experts']} in a LLaDAConfig is LLaDA-MoE, another architecture under the "
                "same model_type='llada'; take LLaDAMoEConfig, or AutoConfig, which tells them apart."
            )
        for name in _INERT:
            kwargs.pop(name, None)
        if self.rope_parameters is None:
            kwargs.setdefault("rope_theta", 500_000.0)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config that a dictionary describes: LLaDA-MoE's checkpoints say `model_type: llada` too."""
        if config_dict.get("num_experts"):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict:
        return {**_INERT, **super().to_dict()}


# Applied in order on loading and undone on saving. The head's `ff_out` goes first: the blocks' own `ff_out`, the MLP's
# down projection, is only told from it by the layer number before it.
KEY_RENAMING: Conversion = [
    WeightRenaming(source, target)
    for source, target in (
        (r"model\.transformer\.wte\.", "model.embed_tokens."),
        (r"model\.transformer\.ln_f\.", "model.norm."),
        (r"model\.transformer\.ff_out\.", "lm_head."),
        (r"model\.transformer\.blocks\.", "model.layers."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ff_norm\.", ".post_attention_layernorm."),
        (r"\.attn_out\.", ".self_attn.o_proj."),
        (r"(\d+)\.q_proj\.", r"\1.self_attn.q_proj."),
        (r"(\d+)\.k_proj\.", r"\1.self_attn.k_proj."),
        (r"(\d+)\.v_proj\.", r"\1.self_attn.v_proj."),
        (r"\.ff_proj\.", ".mlp.gate_proj."),
        (r"(\d+)\.up_proj\.", r"\1.mlp.up_proj."),
        (r"(\d+)\.ff_out\.", r"\1.mlp.down_proj."),
    )
]


class LLaDAModelLM(HubKeys, LlamaForCausalLM):
    """LLaDA: the row at a position predicts that position."""

    config_class = LLaDAConfig
    hub_conversion = KEY_RENAMING
