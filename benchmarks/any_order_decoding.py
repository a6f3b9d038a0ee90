"""Cached against uncached any-order decoding, on a random LLaDA of about 50M parameters.

    python benchmarks/any_order_decoding.py

Draws the same completions twice, once with every step run in full (d2 Algorithm 2 as printed) and once with the exact
key/value cache, and prints the ratios of time and of counted forward FLOPs. The two alternate in this one run, and the
fastest runs are compared: by the thread's own CPU time where one thread of a CPU runs them, so that other work on the
machine counts least, else by wall-clock time. Defaults: prompt 200, canvas 256, blocks of 32, two tokens a step, one
row, float32, one thread; about three minutes.
"""

import argparse
import time
from collections.abc import Callable

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
    parser.add_argument("--repeats", type=int, default=3, help="Times that each is measured.")
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


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """CPU time of the thread, where it is all there is; else the clock on the wall."""
    return time.thread_time if args.device == "cpu" and args.threads == 1 else time.perf_counter


def prompts(args: argparse.Namespace) -> torch.Tensor:
    """A random prompt for each row, the same for all."""
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(1, args.vocab_size - 1, (1, args.prompt_length), generator=generator)
    return prompt.to(args.device).repeat(args.rows, 1)


def main(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    model = create_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    prompt, now = prompts(args), clock(args)
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
        start = now()
        rollout = generate(model, prompt, mask, config, seeds=seeds)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return rollout, now() - start

    print(
        f"{parameters / 1e6:.1f}M parameters, {args.dtype} on {args.device}, {args.rows} row(s), "
        f"P={args.prompt_length}, L={args.max_new_tokens}, block {args.block_length}, {args.tokens_per_step} tokens "
        "a step",
        flush=True,
    )
    caches = {"exact cache": "exact", "no cache": None}
    rollouts, times = {}, {name: [] for name in caches}
    for cache in caches.values():
        decode(cache, args.block_length)  # warm-up
    for _ in range(args.repeats):
        for name, cache in caches.items():
            rollouts[name], seconds = decode(cache, args.max_new_tokens)
            times[name].append(seconds)
    for name, rollout in rollouts.items():
        print(
            f"{name:>12}: {min(times[name]):8.2f} s   {rollout.flops / 1e9:10.1f} GFLOPs   "
            f"{rollout.num_forwards} forwards   ({now.__name__}, best of {args.repeats})",
        )
    cached, uncached = rollouts.values()
    fast, slow = map(min, times.values())
    same = (cached.completion_ids == uncached.completion_ids).float().mean().item()
    with torch.no_grad():
        gap = (token_logps(model, cached, AnyOrder()).logps - cached.logps).abs().max().item()
    out = {"time": slow / fast, "flops": uncached.flops / cached.flops, "same_tokens": same, "gap": gap}
    print(f"no cache / exact cache: {out['time']:.1f} x time, {out['flops']:.1f} x counted FLOPs")
    print(f"largest |AnyOrder - cached decoder's log-prob|: {gap:.1e}")
    # Rounding moves a draw now and then (one in thousands at this vocabulary), and what follows a moved draw differs.
    print(f"tokens that are the same: {same:.1%}")
    return out


if __name__ == "__main__":
    main(make_parser().parse_args())
