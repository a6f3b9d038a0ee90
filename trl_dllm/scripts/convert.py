"""Convert a checkpoint that needs code of its own into one that loads like any other: weights, config and tokenizer.

trl-dllm convert eso_lm downloads/Eso-LM-B-alpha-1 runs/eso_lm/init --tokenizer openai-community/gpt2
"""

import argparse
import json
import sys
from pathlib import Path

from trl_dllm.command import Parser, run_script


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=["eso_lm"], help="What the checkpoint is: eso_lm.")
    parser.add_argument("checkpoint", help="Folder with the Hub's config.json and weights.")
    parser.add_argument("output_dir", help="Folder to write to.")
    parser.add_argument(
        "--tokenizer", help="Folder or Hub name of the tokenizer, which is GPT-2's; default: the checkpoint's folder."
    )
    return parser


def main(args: argparse.Namespace) -> None:
    import torch

    from trl_dllm.models.eso_lm import EsoLMForCausalLM, convert_config, fold

    source, target = Path(args.checkpoint), Path(args.output_dir)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint={args.checkpoint!r} is no folder with a config.json. Download one: hf download "
            "sahoo-diffusion/Eso-LM-B-alpha-1 --local-dir FOLDER."
        )
    if target.resolve() == source.resolve():
        raise ValueError(f"output_dir={args.output_dir!r} is the checkpoint's own folder; name another.")
    hub = json.loads((source / "config.json").read_text())
    state = read_weights(source)
    config = convert_config(hub, state)
    weights = fold(config, state)
    tokenizer = mask_tokenizer(args.tokenizer or args.checkpoint, config.mask_token_id)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.device("meta"):
        model = EsoLMForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"{args.checkpoint} converted: {args.output_dir}.")


def read_weights(folder: Path) -> dict:
    """All tensors of a folder's safetensors files, or of its pytorch_model.bin.

    Raises:
        FileNotFoundError: neither is there.
    """
    import torch
    from safetensors.torch import load_file

    state = {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
    if state:
        return state
    if (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    raise FileNotFoundError(
        f"checkpoint={str(folder)!r} holds neither *.safetensors nor pytorch_model.bin. Take the Hub's export; a "
        "training run's .ckpt has to be exported first."
    )


def mask_tokenizer(name: str, mask_token_id: int):
    """GPT-2's tokenizer with a mask token of the given id, padding with its end-of-text token on the left.

    Raises:
        ValueError: a tokenizer whose next free id is not the mask's.
        OSError: no tokenizer of GPT-2's.
    """
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(name, padding_side="left")
    if len(tokenizer) < 2:  # what transformers makes of a folder without vocabulary
        raise FileNotFoundError(
            f"tokenizer={name!r} holds no vocabulary. Copy GPT-2's files there, or pass --tokenizer."
        )
    if len(tokenizer) == mask_token_id:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    elif len(tokenizer) == mask_token_id + 1:  # Eso-LM's own has a padding token there
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_token_id)
    else:
        raise ValueError(
            f"tokenizer={name!r} has {len(tokenizer)} tokens, and mask_index={mask_token_id} must be the next id or "
            "its last one. Pass GPT-2's own with --tokenizer."
        )
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


if __name__ == "__main__":
    run_script("trl-dllm convert", make_parser, main, sys.argv[1:])
