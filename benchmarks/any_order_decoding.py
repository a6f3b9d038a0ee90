"""Cached against uncached any-order decoding, on a random LLaDA of about 50M parameters.

    python benchmarks/any_order_decoding.py

Draws the same completions twice, once with every step run in full (d2 Algorithm 2 as printed) and once with the exact
key/value cache, and prints the ratios of wall-clock time and of counted forward FLOPs, both measured in this one run.
Defaults: prompt 200, canvas 256, blocks of 32, two tokens a step, one row, float32, one thread; about two minutes.
"""

import argparse
import time

import torch

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, token_logps
from trl_dllm.models import LLaDAConfig, LLaDAModelLM


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=640, help="Width; heads are 64 wide.")
    parser.add_argument("--num_layers", type=int, default=8, help="Decoder layers.")
    parser.add_argument("--vocab_size", type=int, default=8192, help="Vocabulary.")
    parser.add_argument("--prompt_length", type=int, default=200, help="Prompt tokens a row.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Canvas.")
    parser.add_argument("--block_length", type=int, default=32, help="Positions a block.")
    parser.add_argument("--tokens_per_step", type=int, default=2, help="Tokens revealed a step.")
    parser.add_argument("--rows", type=int, default=1, help="Completions, all of one prompt.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16.")
    parser.add_argument("--attn_implementation", default="sdpa", help="sdpa or eager.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, prompt and draws.")
    return parser


def create_model(args: argparse.Namespace) -> LLaDAModelLM:
    """A LLaDA with random weights."""
    torch.manual_seed(args.seed)
    config = LLaDAConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3 // 64 * 64,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64,
        mask_token_id=args.vocab_size - 1,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        attn_implementation=args.attn_implementation,
    )
    return LLaDAModelLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def main(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    model = create_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    prompt = torch.randint(1, args.vocab_size - 1, (1, args.prompt_length), device=args.device).repeat(args.rows, 1)
    mask = torch.ones_like(prompt)

    def decode(cache: str | None, canvas: int):
        config = DiffusionGenerationConfig(
            max_new_tokens=canvas,
            block_length=args.block_length,
            tokens_per_step=args.tokens_per_step,
            decoding="any_order",
            cache=cache,
            stop_at_eos=False,
        )
        seeds = torch.arange(args.rows, device=args.device)
        start = time.perf_counter()
        rollout = generate(model, prompt, mask, config, seeds=seeds)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return rollout, time.perf_counter() - start

    print(
        f"{parameters / 1e6:.1f}M parameters, {args.dtype} on {args.device}, {args.rows} row(s), "
        f"P={args.prompt_length}, L={args.max_new_tokens}, block {args.block_length}, {args.tokens_per_step} tokens "
        "a step",
        flush=True,
    )
    results = {}
    for name, cache in (("exact cache", "exact"), ("no cache", None)):
        decode(cache, args.block_length)  # warm-up
        rollout, seconds = decode(cache, args.max_new_tokens)
        results[name] = (rollout, seconds)
        print(
            f"{name:>12}: {seconds:8.2f} s   {rollout.flops / 1e9:10.1f} GFLOPs   {rollout.num_forwards} forwards",
            flush=True,
        )
    (cached, fast), (uncached, slow) = results.values()
    same = (cached.completion_ids == uncached.completion_ids).float().mean().item()
    with torch.no_grad():
        gap = (token_logps(model, cached, AnyOrder()).logps - cached.logps).abs().max().item()
    out = {"wall_clock": slow / fast, "flops": uncached.flops / cached.flops, "same_tokens": same, "gap": gap}
    print(f"no cache / exact cache: {out['wall_clock']:.1f} x wall clock, {out['flops']:.1f} x counted FLOPs")
    print(f"largest |AnyOrder - cached decoder's log-prob|: {gap:.1e}")
    # Rounding moves a draw now and then (one in thousands at this vocabulary), and what follows a moved draw differs.
    print(f"tokens that are the same: {same:.1%}")
    return out


if __name__ == "__main__":
    main(make_parser().parse_args())
