"""One decoding step against the bare forward of its rows, at LLaDA's vocabulary.

    python benchmarks/rollout.py

The step is the first of a block: all its positions are candidates. Bare are the model's layers on prompt and canvas
and the output head on the block's rows, without softmax, draw, choice or bookkeeping. The layers are made to take ten
times the operations of the head. Step, forward and the step's parts alternate in this one run; medians are printed, of
the thread's own CPU time where one thread of a CPU runs them, else of wall-clock time. Defaults: prompt 200, canvas
256, blocks of 32, one row, float32, one thread; a minute.
"""

import argparse
import platform
import statistics
import time
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.generation.denoising import Denoising
from trl_dllm.generation.order import MEASURES, draw_tokens, measure
from trl_dllm.models import (
    ForwardFlops,
    Layout,
    LLaDAConfig,
    LLaDAModelLM,
    MaskedDiffusionSpec,
    log_probs,
    view_inputs,
)


RATIO = 10  # operations of the layers, by those of the head


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256, help="Width; heads are 64 wide, or all of it.")
    parser.add_argument("--num_layers", type=int, default=16, help="Decoder layers.")
    parser.add_argument("--vocab_size", type=int, default=126_464, help="Vocabulary.")
    parser.add_argument("--prompt_length", type=int, default=200, help="Prompt tokens a row.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Canvas.")
    parser.add_argument("--block_length", type=int, default=32, help="Positions a block.")
    parser.add_argument("--tokens_per_step", type=int, default=2, help="Tokens revealed a step.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Of the draw.")
    parser.add_argument("--remasking", default="low_confidence", choices=MEASURES, help="Which tokens are kept.")
    parser.add_argument("--rows", type=int, default=1, help="Completions.")
    parser.add_argument("--repeats", type=int, default=15, help="Times that each is measured.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, prompts and draws.")
    return parser


def create_model(args: argparse.Namespace) -> LLaDAModelLM:
    """A LLaDA with random weights, whose layers take `RATIO` times the operations of its head in a step.

    Raises:
        ValueError: attention alone takes more.
    """

    def build(intermediate_size: int, device: str) -> LLaDAModelLM:
        heads = max(1, args.hidden_size // 64)
        config = LLaDAConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            mask_token_id=args.vocab_size - 1,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=0,
        )
        with torch.device(device):
            return LLaDAModelLM(config)

    one, two = (body_and_head(build(size, "meta"), args) for size in (8, 16))
    size = 8 + round((RATIO * one[1] - one[0]) / (two[0] - one[0]) * 8)
    if size < 8:
        raise ValueError(
            f"hidden_size={args.hidden_size} and num_layers={args.num_layers} take more than {RATIO} times the "
            f"operations of the head at {args.rows * args.block_length} rows; choose fewer num_layers."
        )
    torch.manual_seed(args.seed)
    return build(size, args.device).to(getattr(torch, args.dtype)).eval()


def body_and_head(model: LLaDAModelLM, args: argparse.Namespace) -> tuple[int, int]:
    """Operations of the layers and of the head in a step, the head's without the rows that fill up its tiles."""
    count, width = ForwardFlops(model), args.prompt_length + args.max_new_tokens
    body = args.rows * width * (count.per_token + width * count.per_pair)
    return body, args.rows * args.block_length * count.per_head_row


@torch.no_grad()
def main(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    model = create_model(args)
    spec, device = MaskedDiffusionSpec.from_model(model), torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(1, args.vocab_size - 1, (args.rows, args.prompt_length), generator=generator).to(device)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    config = DiffusionGenerationConfig(
        args.max_new_tokens,
        block_length=args.block_length,
        tokens_per_step=args.tokens_per_step,
        temperature=args.temperature,
        remasking=args.remasking,
        stop_at_eos=False,
    )
    thread_time = device.type == "cpu" and args.threads == 1
    clock = time.thread_time if thread_time else time.perf_counter
    times: dict[str, list[float]] = {}

    def timed(name: str, function):
        start = clock()
        out = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.setdefault(name, []).append(clock() - start)
        return out

    for _ in range(args.repeats + 1):
        state = Denoising(model, prompts, mask, config, torch.arange(args.rows, device=device), spec)
        ids, every = torch.cat([prompts, state.tokens], dim=1), torch.arange(args.rows, device=device)
        places = args.prompt_length + torch.arange(args.block_length, device=device)
        rows = (every[:, None] * ids.shape[1] + places).flatten()
        inputs = view_inputs(model, Layout(ids, state.position_ids, state.attention(every))) | {"use_cache": False}

        def bare(inputs=inputs, rows=rows):
            return model.lm_head(model.model(**inputs).last_hidden_state.flatten(0, 1)[rows])

        timed("bare forward", bare)
        timed("step", state.step)
        hidden = timed("layers", partial(model.model, **inputs)).last_hidden_state.flatten(0, 1)[rows]
        logits = timed("head", partial(model.lm_head, hidden))
        log_p = timed("log-probs", partial(log_probs, logits, spec.mask_token_id, args.temperature))
        draws = torch.rand(len(rows), generator=generator, dtype=torch.float64).to(device)
        tokens = timed("draw", partial(draw_tokens, log_p, draws))
        timed("measure", partial(measure, args.remasking, log_p, tokens, draws))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    ratio = medians["step"] / medians["bare forward"]
    body, head = body_and_head(model, args)
    parts = ("layers", "head", "log-probs", "draw", "measure")
    medians["rest"] = medians["step"] - sum(medians[name] for name in parts)

    console = Console(width=120)
    console.print(
        f"{platform.machine()} {args.device}, {args.threads} thread(s), torch {torch.__version__}, {args.dtype}; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {args.num_layers} layers of "
        f"{args.hidden_size} (MLP {model.config.intermediate_size}), vocabulary {args.vocab_size}, "
        f"{args.rows} row(s), P={args.prompt_length}, L={args.max_new_tokens}, block {args.block_length}; "
        f"layers / head {body / head:.3f} in operations",
        highlight=False,
    )
    table = Table("", "ms", "of the bare forward", title=f"Medians of {args.repeats}, {clock.__name__}")
    for name in ("bare forward", "step", *parts, "rest"):
        table.add_row(name, f"{1e3 * medians[name]:.2f}", f"{medians[name] / medians['bare forward']:.3f}")
    console.print(table)
    console.print(f"step / bare forward: {ratio:.3f}", highlight=False)
    return {"ratio": ratio, "operations": body / head, **medians}


if __name__ == "__main__":
    main(make_parser().parse_args())
