"""A tiny checkpoint in Eso-LM's own keys and config, with a tokenizer like GPT-2's; and `trl-dllm convert` on it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import GPT2Tokenizer

from trl_dllm.scripts import convert


# A byte is a token; then GPT-2's only special token, then the mask, as in the original.
EOS, MASK, VOCAB = 256, 257, 258
HIDDEN, HEADS, MLP, TIME, BLOCKS = 32, 2, 48, 8, 2

# The Hub's field names, with small numbers.
CONFIG = {
    "architectures": ["EsoLM"],
    "auto_map": {"AutoConfig": "config_esolm.EsoLMConfig", "AutoModelForMaskedLM": "modeling_esolm.EsoLM"},
    "cond_dim": TIME,
    "dropout": 0.1,
    "hidden_dim": 768,
    "hidden_size": HIDDEN,
    "mask_index": MASK,
    "model_length": 64,
    "model_type": "EsoLM",
    "n_blocks": BLOCKS,
    "n_heads": HEADS,
    "return_dict": False,
    "vocab_size": VOCAB,
}


def shapes() -> dict[str, tuple]:
    """Eso-LM's own keys."""
    found = {
        "vocab_embed.embedding": (VOCAB, HIDDEN),
        "sigma_map.mlp.0.weight": (TIME, 256),
        "sigma_map.mlp.0.bias": (TIME,),
        "sigma_map.mlp.2.weight": (TIME, TIME),
        "sigma_map.mlp.2.bias": (TIME,),
        "rotary_emb.inv_freq": (HIDDEN // HEADS // 2,),
        "output_layer.norm_final.weight": (HIDDEN,),
        "output_layer.linear.weight": (VOCAB, HIDDEN),
        "output_layer.linear.bias": (VOCAB,),
        "output_layer.adaLN_modulation.weight": (2 * HIDDEN, TIME),
        "output_layer.adaLN_modulation.bias": (2 * HIDDEN,),
    }
    for n in range(BLOCKS):
        found |= {
            f"blocks.{n}.norm1.weight": (HIDDEN,),
            f"blocks.{n}.attn_qkv.weight": (3 * HIDDEN, HIDDEN),
            f"blocks.{n}.attn_out.weight": (HIDDEN, HIDDEN),
            f"blocks.{n}.norm2.weight": (HIDDEN,),
            f"blocks.{n}.mlp.0.weight": (MLP, HIDDEN),
            f"blocks.{n}.mlp.0.bias": (MLP,),
            f"blocks.{n}.mlp.2.weight": (HIDDEN, MLP),
            f"blocks.{n}.mlp.2.bias": (HIDDEN,),
            f"blocks.{n}.adaLN_modulation.weight": (6 * HIDDEN, TIME),
            f"blocks.{n}.adaLN_modulation.bias": (6 * HIDDEN,),
        }
    return {f"backbone.{key}": shape for key, shape in found.items()}


def write_original(folder: Path, dtype=torch.float64, config=CONFIG) -> dict[str, Tensor]:
    """A folder as the Hub has it, with random weights, and GPT-2's tokenizer without merges beside them."""
    folder.mkdir(exist_ok=True, parents=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: (torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.2)).to(dtype)
        + ("norm" in key and key.endswith("weight"))
        for key, shape in shapes().items()
    }
    # float32, as a buffer is in float32 training: the angles' tables are that in both implementations
    state["backbone.rotary_emb.inv_freq"] = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    GPT2Tokenizer(vocab=vocabulary | {"<|endoftext|>": EOS}, merges=[]).save_pretrained(folder)
    return state


def run(*argv) -> None:
    convert.main(convert.make_parser().parse_args([str(word) for word in argv]))
