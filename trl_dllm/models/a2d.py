"""A2D (Tiny-A2D, OPDLM): Qwen3, Qwen2 and Llama checkpoints that were trained on as masked diffusion models.

Keys and config names are the stock decoder's own. A config says neither which token is the mask, which the tokenizer
names, nor whether attention is full or block-causal: that stands in the repository's name, or the user says it.
"""

from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .hub import HubConfig, HubKeys


# What a repository's name says about its block size.
_BLOCK_SIZES = {"bd3lm": 32, "opdlm": 4}


class A2DConfig(HubConfig):
    """What the three have in common; stands before a stock config.

    Args:
        mask_token_id (`int`, *optional*): id of the mask token; None leaves it to the tokenizer.
        block_size (`int`, *optional*): positions of a block, where attention is block-causal; None is full attention,
            unless the checkpoint's name says otherwise.
        block_alignment (`str`, defaults to `"position"`): where blocks begin: at the first token of the prompt or,
            with "canvas", of the canvas.
        is_causal (`bool`, defaults to `False`): attention is not causal.
    """

    block_size: int | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        name = (self.name_or_path or "").lower()
        if self.block_size is None:
            self.block_size = next((size for part, size in _BLOCK_SIZES.items() if part in name), None)


class A2DQwen3Config(A2DConfig, Qwen3Config):
    """A2DConfig over Qwen3's."""

    model_type = "a2d-qwen3"

    mask_token_id: int | None = None
    block_size: int | None = None
    block_alignment: str = "position"
    is_causal: bool = False


class A2DQwen2Config(A2DConfig, Qwen2Config):
    """A2DConfig over Qwen2's."""

    model_type = "a2d-qwen2"

    mask_token_id: int | None = None
    block_size: int | None = None
    block_alignment: str = "position"
    is_causal: bool = False


class A2DLlamaConfig(A2DConfig, LlamaConfig):
    """A2DConfig over Llama's."""

    model_type = "a2d-llama"

    mask_token_id: int | None = None
    block_size: int | None = None
    block_alignment: str = "position"
    is_causal: bool = False


class A2DQwen3LMHeadModel(HubKeys, Qwen3ForCausalLM):
    """A2D over Qwen3: the row at a position predicts that position."""

    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(HubKeys, Qwen2ForCausalLM):
    """A2D over Qwen2: the row at a position predicts that position."""

    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(HubKeys, LlamaForCausalLM):
    """A2D over Llama: the row at a position predicts that position."""

    config_class = A2DLlamaConfig
