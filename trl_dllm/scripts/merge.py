"""Merge an adapter into its base model: a folder with the full model, in the Hub's names, and its tokenizer.

trl-dllm merge runs/llada_8b/grpo runs/llada_8b/merged --dtype bfloat16
"""

import argparse
import sys
from pathlib import Path

from trl_dllm.command import Parser, run_script


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="Folder or Hub name of the adapter.")
    parser.add_argument("output_dir", help="Folder to write to.")
    parser.add_argument(
        "--model_name_or_path", help="Folder or Hub name of the base model; default: the one that the adapter names."
    )
    parser.add_argument(
        "--dtype", default="auto", help="Dtype of the result: auto (the base's), float32, bfloat16 or float16."
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from peft import PeftConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import trl_dllm  # noqa: F401  registers the model families
    from trl_dllm.generation import read_decoding, save_decoding
    from trl_dllm.models.adapters import load_adapter

    base = args.model_name_or_path or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    if base is None:
        raise ValueError(f"The adapter {args.adapter} does not name its base model; pass --model_name_or_path.")
    if Path(args.output_dir).resolve() == Path(args.adapter).resolve():
        raise ValueError(f"output_dir={args.output_dir} is the adapter's own folder; name another.")
    quantization = getattr(AutoConfig.from_pretrained(base), "quantization_config", None)
    if quantization is not None:
        raise ValueError(
            f"{base} is quantised ({_method(quantization)}): the sum of its weights and the adapter's would be "
            "rounded to its few levels again, which is not the model that was trained. Name the base model in full "
            "precision with --model_name_or_path."
        )
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype), args.adapter)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.adapter if _has_tokenizer(args.adapter) else base)
    tokenizer.save_pretrained(args.output_dir)
    save_decoding(read_decoding(args.adapter) or read_decoding(base), args.output_dir)
    print(f"{args.adapter} merged into {base}: {args.output_dir}.")


def _method(quantization) -> str:
    read = quantization.get if isinstance(quantization, dict) else lambda name: getattr(quantization, name, None)
    return str(read("quant_method"))


def _has_tokenizer(name: str) -> bool:
    """Whether the adapter brings a tokenizer, as the trainers save it beside the weights."""
    from transformers.utils import cached_file

    found = cached_file(
        name,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


if __name__ == "__main__":
    run_script("trl-dllm merge", make_parser, main, sys.argv[1:])
