"""Complete prompts with a masked diffusion model.

trl-dllm generate --model_name_or_path runs/demo/grpo --max_new_tokens 16 --prompt "2041000014020010="
"""

import argparse
import sys
from dataclasses import fields
from typing import Any

from transformers.hf_argparser import DataClassType, HfArgumentParser

from trl_dllm.command import Parser, count, run_script
from trl_dllm.generation import DecodingArguments, DiffusionGenerationConfig, saved_decoding_config
from trl_dllm.processes import say
from trl_dllm.reports.dry_run import dry_run_decoding


def generation_parser(model_required: bool = True) -> argparse.ArgumentParser:
    """The decoding and model flags of `generate`, `eval` and `report`, as a parent of their parsers.

    Decoding flags are read off the settings' own declarations, by the parser that reads the trainers': a bool is
    `--stop_at_eos false` or `--no_stop_at_eos`. One that is not given is missing from what is parsed, and is then as
    the model was trained. Temperature is 0 unless given.
    """
    parser = HfArgumentParser(DataClassType(DecodingArguments), add_help=False)
    for f in fields(DiffusionGenerationConfig):
        if f.name in ("max_new_tokens", "temperature"):
            parser.add_argument(f"--{f.name}", type=type(f.default), help=f.metadata["help"])
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.set_defaults(temperature=0.0)
    parser.add_argument("--model_name_or_path", required=model_required, help="Folder or Hub name of the model.")
    parser.add_argument("--adapter", help="Folder or Hub name of a PEFT adapter to load onto it.")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="Weights' dtype.")
    parser.add_argument("--attn_implementation", help="eager, sdpa, flex_attention, …")
    parser.add_argument("--dry_run", action="store_true", help="Load no weights: print what decoding would cost.")
    parser.add_argument(
        "--batch_size", type=count, default=32, help="Rows decoded at a time; the next take finished ones' places."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws (and of generated data).")
    return parser


def generation_config(args: argparse.Namespace) -> DiffusionGenerationConfig:
    """The decoding settings that the flags describe: those not given are as the model was trained, which is said."""
    given = {f.name: getattr(args, f.name) for f in fields(DiffusionGenerationConfig) if f.name in args}
    config, line = saved_decoding_config([args.adapter, args.model_name_or_path], given)
    if line:
        say(line)
    return config


def load_model(args: argparse.Namespace):
    """Model (in evaluation mode, on the GPU if there is one) and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import trl_dllm  # noqa: F401  registers the model families
    from trl_dllm.models import MaskedDiffusionSpec

    name = args.model_name_or_path
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name, padding_side="left"), AutoConfig.from_pretrained(name)
    except OSError as error:  # which without a network does not say what it was looking for
        raise OSError(f"model_name_or_path={name!r} cannot be read: {error}") from error
    spec = MaskedDiffusionSpec.from_config(config, tokenizer)
    kwargs = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    base = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, **kwargs)
    spec.write_to(base)
    model: torch.nn.Module = base
    if args.adapter:
        from trl_dllm.models.adapters import load_adapter

        model = load_adapter(base, args.adapter)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], parents=[generation_parser()])
    parser.add_argument("--prompt", action="append", required=True, help="A prompt; may be given several times.")
    parser.add_argument("--chat", action="store_true", help="Wrap each prompt in the tokenizer's chat template.")
    parser.add_argument(
        "--save_rollouts", help="File of JSON lines to write: tokens, the step that revealed each, and log-probs."
    )
    return parser


def main(args: argparse.Namespace) -> list[str]:
    import torch

    from trl_dllm.evaluation import complete
    from trl_dllm.noise import Purpose, hash64
    from trl_dllm.step_maps import write_rollout

    config = generation_config(args)
    if args.dry_run:
        dry_run_decoding("generate", args.model_name_or_path, config, len(args.prompt), args.batch_size, args.dtype)
        return []
    model, tokenizer = load_model(args)
    prompts = [[{"role": "user", "content": prompt}] if args.chat else prompt for prompt in args.prompt]
    seeds = hash64(args.seed, Purpose.EVALUATION, torch.arange(len(prompts)))
    texts, rollout = complete(model, tokenizer, prompts, config, seeds, batch_size=args.batch_size)
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}")
    if args.save_rollouts:
        facts: dict[str, Any] = {"decoding": config.decoding, "block_length": config.block_length}
        facts |= {"cfg_scale": config.cfg_scale} if config.cfg_scale else {}
        write_rollout(args.save_rollouts, rollout, tokenizer, **facts)
    return texts


if __name__ == "__main__":
    run_script("trl-dllm generate", make_parser, main, sys.argv[1:])
