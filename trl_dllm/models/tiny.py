"""A small masked diffusion model and its character tokenizer, made on the spot.

They stand in for an 8B checkpoint wherever only the plumbing counts: tests, the demo, a first run on a laptop. The
tokenizer knows printable ASCII and the newline, so every task of the library fits through it.
"""

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .families import FAMILIES


# What a family's shapes need beyond the common ones.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHAPES = {
    "a2d_qwen3": {"head_dim": 16},
    "sdar": {"head_dim": 16},
    "llada_moe": _EXPERTS,
    "sdar_moe": _EXPERTS,
    "llada2": {**_EXPERTS, "n_group": 2, "topk_group": 1},
}

_SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "mask_token": "<mask>",
    "unk_token": "<unk>",
}
_CHARACTERS = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def create_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character of printable ASCII (and the newline), padding on the left."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL.values(), *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=4096,
        **_SPECIAL,
    )


def create_tiny_model(
    family: str = "llada", hidden_size: int = 64, num_layers: int = 4, seed: int = 0, **config_kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Create a randomly initialised model of `family` and its tokenizer.

    Args:
        family (`str`): one of `FAMILIES`, such as "llada" or "dream".
        hidden_size (`int`): width; a multiple of 16 (heads are 16 wide), of 64 for 4-bit quantisation.
        num_layers (`int`): decoder layers.
        seed (`int`): of the weights; global generators are left as they were.
        **config_kwargs: further fields of the family's config.

    Returns:
        `(model, tokenizer)`, float32 on the CPU. The defaults give about 200 thousand parameters.

    Raises:
        ValueError: an unknown family, or a width that its heads do not divide.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose one of {sorted(FAMILIES)}.")
    if hidden_size % 16:
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of 16, the width of an attention head.")
    tokenizer = create_tiny_tokenizer()
    config_class, model_class = FAMILIES[family]
    config = config_class(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size + hidden_size // 2 // 16 * 16,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 16,
            "num_key_value_heads": hidden_size // 16,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "mask_token_id": tokenizer.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            **_SHAPES.get(family, {}),
            **config_kwargs,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model, tokenizer
