"""Dream (7B Base and Instruct, Dream-Coder, DiffuCoder): Qwen2 with bidirectional attention and shifted logits.

Key and config names are Qwen2's own, so nothing is renamed. The row before a position predicts it, a shift that Dream
kept from the autoregressive model it was initialised from; the first completion token therefore needs a prompt token
before it.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from .hub import HubConfig, HubKeys


class DreamConfig(HubConfig, Qwen2Config):
    """Config of Dream.

    Args:
        mask_token_id (`int`, defaults to 151666): id of the mask token.
        logits_shift (`int`, defaults to 1): the row before a position predicts it.
        is_causal (`bool`, defaults to `False`): every position attends to every other.
    """

    model_type = "Dream"

    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    mask_token_id: int = 151666
    logits_shift: int = 1
    is_causal: bool = False


class DreamModel(HubKeys, Qwen2ForCausalLM):
    """Dream: the row before a position predicts that position."""

    config_class = DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """The class that Dream's checkpoints name; its files are Qwen2's, with special tokens of their own."""
