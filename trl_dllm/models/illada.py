"""iLLaDA (8B Base and Instruct): Llama with bidirectional attention, grouped keys and tied embeddings.

Keys and config names are Llama's own. Neither the Hub's config nor its tokenizer names the mask token, and LLaDA's id
is an ordinary word here.
"""

from transformers import LlamaConfig, LlamaForCausalLM

from .hub import HubConfig, HubKeys


# The same in every released checkpoint; another value would change what the model computes.
FIXED: dict[str, tuple] = {
    "layer_norm_eps": (None,),  # a number would mean LayerNorm
    "resid_pdrop": (0.0,),
}


class ILLaDAConfig(HubConfig, LlamaConfig):
    """Config of iLLaDA.

    Args:
        mask_token_id (`int`, defaults to 5): id of the mask token.
        is_causal (`bool`, defaults to `False`): every position attends to every other.
    """

    model_type = "illada"
    hub_fixed = FIXED

    vocab_size: int = 155136
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 1
    mask_token_id: int = 5
    is_causal: bool = False


class ILLaDAForCausalLM(HubKeys, LlamaForCausalLM):
    """iLLaDA: the row at a position predicts that position."""

    config_class = ILLaDAConfig
