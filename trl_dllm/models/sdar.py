"""SDAR (1.7B, 4B, 8B and 30B-A3B Chat), TraDo, DiRL: Qwen3 and Qwen3-MoE with block-causal attention.

Keys and config names are the stock decoder's own. A position sees its own block of `block_size` positions and all
blocks before it. Variants trained with other blocks (`-b8`, `-b16`, …) say so only in the repository's name.
"""

import re
import warnings
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from .hub import HubConfig, HubKeys


class _SDARConfig(HubConfig):
    """What both have in common: a name that tells another block size than the config is warned of."""

    block_size: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        named = re.search(r"-b(\d+)$", (self.name_or_path or "").rstrip("/"), re.IGNORECASE)
        if named and int(named[1]) != self.block_size:
            warnings.warn(
                f"block_size={self.block_size} in the config, but the checkpoint is called {self.name_or_path}: set "
                f"block_size={named[1]} if it was trained with that."
            )


class SDARConfig(_SDARConfig, Qwen3Config):
    """Config of SDAR.

    Args:
        mask_token_id (`int`, defaults to 151669): id of the mask token.
        block_size (`int`, defaults to 4): positions of a block.
        block_alignment (`str`, defaults to `"position"`): where blocks begin: at the first token of the prompt or,
            with "canvas", of the canvas.
        is_causal (`bool`, defaults to `False`): attention is not causal.
    """

    model_type = "sdar"

    mask_token_id: int = 151669
    block_size: int = 4
    block_alignment: str = "position"
    is_causal: bool = False


class SDARMoeConfig(_SDARConfig, Qwen3MoeConfig):
    """Config of SDAR's mixture of experts; arguments as in `SDARConfig`."""

    model_type = "sdar_moe"
    hub_names = Qwen3MoeConfig.attribute_map  # under which transformers writes the number of experts

    norm_topk_prob: bool = True
    mask_token_id: int = 151669
    block_size: int = 4
    block_alignment: str = "position"
    is_causal: bool = False


class SDARForCausalLM(HubKeys, Qwen3ForCausalLM):
    """SDAR: the row at a position predicts that position."""

    config_class = SDARConfig


class SDARMoeForCausalLM(HubKeys, Qwen3MoeForCausalLM):
    """SDAR's mixture of experts: the row at a position predicts that position."""

    config_class = SDARMoeConfig
    hub_conversion = get_checkpoint_conversion_mapping("qwen2_moe")
