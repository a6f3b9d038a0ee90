"""LLaDA (8B Base and Instruct, 1.5): Llama with bidirectional attention under other key names.

Hub checkpoints load without remote code: keys are renamed while loading and renamed back while saving, so a saved
folder has the Hub's own key names, and its config also carries the names that the original modelling code reads.
"""

import re

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import WeightConverter, WeightRenaming


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

# What is fixed in every released LLaDA: written to a saved config for readers that use the original code.
_ORIGINAL_CONSTANTS = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_fn": "mitchell",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}


# Of these, the ones that would change what the model computes.
_STRUCTURAL = (
    "activation_type",
    "alibi",
    "attention_layer_norm",
    "block_type",
    "include_bias",
    "include_qkv_bias",
    "input_emb_norm",
    "layer_norm_type",
    "rope",
    "scale_logits",
)


class LLaDAConfig(LlamaConfig):
    """Config of LLaDA: reads the original names and writes both, so that the original code can read what is saved
    here.

    Args:
        mask_token_id (`int`, defaults to 126336): id of the mask token.
        is_causal (`bool`, defaults to `False`): every position attends to every other.
    """

    model_type = "llada"
    attribute_map = CONFIG_NAMES

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
                f"num_experts={kwargs['num_experts']} in a config of model_type='llada' is LLaDA-MoE, another "
                "architecture, whose checkpoint would load here as a dense LLaDA with random weights and the wrong "
                "mask token. It is not supported yet; use a dense LLaDA."
            )
        for original, name in CONFIG_NAMES.items():
            value = kwargs.pop(original, None)
            if value is not None:
                setattr(self, name, value)
        for name, constant in _ORIGINAL_CONSTANTS.items():
            value = kwargs.pop(name, constant)
            if name in _STRUCTURAL and value != constant:
                raise ValueError(
                    f"{name}={value!r} in a LLaDA config: this implementation has {constant!r}, as every released "
                    "LLaDA; such a checkpoint would load and compute something else."
                )
        if self.rope_parameters is None:
            kwargs.setdefault("rope_theta", 500_000.0)
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        # TRL reads auto_map; a folder saved here has no modelling files for it to point at.
        self.auto_map = {}

    def to_dict(self) -> dict:
        output = super().to_dict()
        output.pop("auto_map", None)
        names = {original: output[name] for original, name in CONFIG_NAMES.items() if name in output}
        return {**_ORIGINAL_CONSTANTS, **names, "rope_theta": output["rope_parameters"]["rope_theta"], **output}


# Applied in order on loading and undone on saving. The head's `ff_out` goes first: the blocks' own `ff_out`, the MLP's
# down projection, is only told from it by the layer number before it.
KEY_RENAMING: list[WeightConverter | WeightRenaming] = [
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


class LLaDAModelLM(LlamaForCausalLM):
    """LLaDA: the row at a position predicts that position."""

    config_class = LLaDAConfig

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_own_names)


def _own_names(module, state_dict: dict, prefix: str, *_) -> None:
    """Rename the Hub's keys of a state dict to the module's own.

    `from_pretrained` does so by itself; Trainer resumes and loads its best model by `load_state_dict(strict=False)`,
    which would match nothing and go on with the wrong weights.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        for rule in KEY_RENAMING:
            for source, target in zip(rule.source_patterns, rule.target_patterns, strict=True):
                name = re.sub(source, target, name)
        if prefix + name != key:
            state_dict[prefix + name] = state_dict.pop(key)
