"""A whole AnyOrder loop by the clock, against the same loop without cache and on all columns.

    python benchmarks/any_order_loop.py

Rollout, old and reference log-probs and μ = 2 updates of a group, full fine-tuning of a random LLaDA of about 20M
parameters whose head takes a small part of its operations. Ours: the exact cache draws the group, a forward runs the
columns that a counted token sees, and the first update finds the old policy's log-probs itself. The other: every step
of the rollout runs prompt and canvas in full; old, reference and updates run all P + 2L columns, and the old policy is
a pass of its own. Both are this library's code, and their parts alternate in this one run. Times are of the thread's
own CPU time where one thread of a CPU runs them, else of the clock on the wall; medians. A minute or two.
"""

import argparse
import platform
import statistics
from dataclasses import replace

import any_order_decoding
import torch
from rich.console import Console
from rich.table import Table

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, compact, score_view
from trl_dllm.likelihood.plan import counted_view
from trl_dllm.models import ForwardFlops, MaskedDiffusionSpec
from trl_dllm.rollout import Rollout


PARTS = ("rollout", "old", "reference", "updates")


def make_parser() -> argparse.ArgumentParser:
    parser = any_order_decoding.make_parser()
    parser.description = __doc__
    parser.set_defaults(hidden_size=512, num_layers=6, vocab_size=2048, prompt_length=128, rows=2, repeats=1)
    parser.add_argument("--share", type=float, default=0.75, help="Of the canvas that is counted.")
    parser.add_argument("--mu", type=int, default=2, help="Updates on a generation batch.")
    return parser


class Loop:
    """One side: its model, and the parts of its loop in their order."""

    def __init__(self, args: argparse.Namespace, ours: bool):
        self.args, self.ours = args, ours
        self.model = any_order_decoding.create_model(args)
        self.spec = MaskedDiffusionSpec.from_model(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.prompt = any_order_decoding.prompts(args)
        self.losses: list[float] = []

    def rollout(self) -> None:
        args, rows = self.args, self.args.rows
        config = DiffusionGenerationConfig(
            max_new_tokens=args.max_new_tokens,
            block_length=args.block_length,
            tokens_per_step=args.tokens_per_step,
            decoding="any_order",
            cache="exact" if self.ours else None,
            stop_at_eos=False,
        )
        seeds = torch.arange(rows, device=args.device)
        drawn = generate(self.model, self.prompt, torch.ones_like(self.prompt), config, seeds)
        # Where a random model would end its answers says nothing: the rows' lengths are given.
        end = round(args.share * args.max_new_tokens)
        counted = torch.arange(args.max_new_tokens, device=args.device) < end
        self.drawn: Rollout = replace(drawn, counted=counted.expand(rows, -1))

    def log_probs(self) -> torch.Tensor:
        view = counted_view(AnyOrder(), self.drawn, 0, self.drawn.view_seed, 0)
        view = compact(view) if self.ours else view
        return score_view(self.model, view, self.args.max_new_tokens, self.spec).logps

    @torch.no_grad()
    def old(self) -> None:
        self.old_logps = None if self.ours else self.log_probs()

    @torch.no_grad()
    def reference(self) -> None:
        self.reference_logps = self.log_probs()

    def updates(self) -> None:
        counted = self.drawn.counted
        advantage = torch.linspace(-1, 1, self.args.rows, device=counted.device)[:, None] + 0.5
        for _ in range(self.args.mu):
            logps = self.log_probs()
            self.old_logps = logps.detach() if self.old_logps is None else self.old_logps
            ratio = (logps - self.old_logps).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            away = self.reference_logps - logps
            loss = ((away.exp() - away - 1) * 0.04 - gain)[counted].mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())


def main(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    clock = any_order_decoding.clock(args)
    sides = {"all columns, no cache": Loop(args, False), "ours": Loop(args, True)}
    model = sides["ours"].model
    count, parameters = ForwardFlops(model), sum(p.numel() for p in model.parameters())
    console = Console(width=120)
    console.print(
        f"{platform.machine()} {args.device}, {args.threads} thread(s), torch {torch.__version__}, {args.dtype}; "
        f"{parameters / 1e6:.1f}M parameters, head {count.per_head_row / count.per_token:.1%} of a token's "
        f"operations; {args.rows} row(s), P={args.prompt_length}, L={args.max_new_tokens}, block {args.block_length}, "
        f"{args.tokens_per_step} tokens a step, {args.share:.0%} of the canvas counted, {args.mu} updates",
        highlight=False,
    )
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in sides}
    for _ in range(args.repeats):
        for part in PARTS:
            for name, side in sides.items():
                start = clock()
                getattr(side, part)()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                times[name][part].append(clock() - start)
    table = Table("seconds", *PARTS, "loop", title=f"Medians of {args.repeats}, {clock.__name__}")
    totals = {}
    for name, parts in times.items():
        medians = [statistics.median(parts[part]) for part in PARTS]
        totals[name] = sum(medians)
        table.add_row(name, *(f"{seconds:.2f}" for seconds in (*medians, totals[name])))
    console.print(table)
    theirs, ours = sides.values()
    gap = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    same = (theirs.drawn.completion_ids == ours.drawn.completion_ids).float().mean().item()
    ratio = totals["all columns, no cache"] / totals["ours"]
    console.print(
        f"all columns, no cache / ours: {ratio:.2f}; tokens that are the same: {same:.1%}; largest difference of a "
        f"loss: {gap:.1e}",
        highlight=False,
    )
    return {"ratio": ratio, "same_tokens": same, "loss_gap": gap}


if __name__ == "__main__":
    main(make_parser().parse_args())
