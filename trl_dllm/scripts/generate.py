"""Complete prompts with a masked diffusion model.

trl-dllm generate --model_name_or_path runs/demo/grpo --max_new_tokens 16 --prompt "2041000014020010="
"""

import argparse

from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.generation.config import CACHES
from trl_dllm.generation.order import MEASURES
from trl_dllm.reports.dry_run import dry_run_decoding


def add_generation_arguments(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """The model and decoding flags, shared with `eval`."""
    parser.add_argument("--model_name_or_path", required=model_required, help="Folder or Hub name of the model.")
    parser.add_argument("--adapter", help="Folder or Hub name of a PEFT adapter to load onto it.")
    parser.add_argument("--dtype", default="auto", help="Weights' dtype: auto, float32, bfloat16 or float16.")
    parser.add_argument("--attn_implementation", help="eager, sdpa, flex_attention, …")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Canvas length in tokens.")
    parser.add_argument(
        "--block_length", type=int, help="Positions a block; default: largest divisor of the canvas up to 32."
    )
    parser.add_argument("--diffusion_steps", type=int, help="Decoding steps; default: half the canvas.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Sampling temperature; 0 is greedy.")
    parser.add_argument("--remasking", default="low_confidence", choices=MEASURES, help="Which drawn tokens are kept.")
    parser.add_argument(
        "--confidence_threshold", type=float, help="Keep all positions above it instead of an even schedule."
    )
    parser.add_argument("--no_stop_at_eos", dest="stop_at_eos", action="store_false", help="Decode the whole canvas.")
    parser.add_argument(
        "--decoding",
        default="denoising",
        choices=sorted(CACHES),
        help="How completions are drawn; any_order for models trained with any-order attention.",
    )
    parser.add_argument("--cache", choices=["exact"], help="Key/value cache of any-order decoding; default: none.")
    parser.add_argument("--cfg_scale", type=float, default=0.0, help="Classifier-free guidance.")
    parser.add_argument("--dry_run", action="store_true", help="Load no weights: print what decoding would cost.")
    parser.add_argument("--batch_size", type=int, default=32, help="Rows decoded at a time.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws (and of generated data).")


def generation_config(args: argparse.Namespace) -> DiffusionGenerationConfig:
    """The decoding settings that the flags describe."""
    return DiffusionGenerationConfig(
        max_new_tokens=args.max_new_tokens,
        block_length=args.block_length,
        diffusion_steps=args.diffusion_steps,
        temperature=args.temperature,
        remasking=args.remasking,
        confidence_threshold=args.confidence_threshold,
        stop_at_eos=args.stop_at_eos,
        decoding=args.decoding,
        cache=args.cache,
        cfg_scale=args.cfg_scale,
    )


def load_model(args: argparse.Namespace):
    """Model (in evaluation mode, on the GPU if there is one) and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import trl_dllm  # noqa: F401  registers the model families
    from trl_dllm.models import MaskedDiffusionSpec

    name = args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    MaskedDiffusionSpec.from_config(AutoConfig.from_pretrained(name), tokenizer)
    kwargs = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, **kwargs)
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", required=True, help="A prompt; may be given several times.")
    parser.add_argument("--chat", action="store_true", help="Wrap each prompt in the tokenizer's chat template.")
    add_generation_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> list[str]:
    import torch

    from trl_dllm.evaluation import complete
    from trl_dllm.noise import Purpose, hash64

    config = generation_config(args)
    if args.dry_run:
        dry_run_decoding("generate", args.model_name_or_path, config, len(args.prompt), args.batch_size, args.dtype)
        return []
    model, tokenizer = load_model(args)
    prompts = [[{"role": "user", "content": prompt}] if args.chat else prompt for prompt in args.prompt]
    seeds = hash64(args.seed, Purpose.EVALUATION, torch.arange(len(prompts)))
    texts, _ = complete(model, tokenizer, prompts, config, seeds, batch_size=args.batch_size)
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}")
    return texts


if __name__ == "__main__":
    main(make_parser().parse_args())
