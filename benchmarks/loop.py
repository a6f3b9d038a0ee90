"""What a completion costs in a whole loop, counted, against the schedule of d2's released code.

    python benchmarks/loop.py

Rollout, old and reference log-probs and μ updates of one completion, in counted floating-point operations at the
shapes of LLaDA-8B with LoRA of rank 128 (nothing is run: the model has no weights). Prompt 200, canvas 256 in blocks
of 32, two tokens a step, groups of 6, no gradient checkpointing on either side. Released: every step runs prompt and
canvas in full, each inner iteration redraws the prompt's mask and scores old and reference policy, and nothing is
skipped. Ours: the forwards that the trainer plans for a rollout of which a share is counted, drawn here and not taken
from a model.

Then the update alone, in row-forwards and operations of all views on all columns: where all rows count the same share
of the canvas, and where their lengths spread by half of it.
"""

import argparse
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from trl_dllm.generation import DiffusionGenerationConfig, decode, generate
from trl_dllm.generation.any_order import CachedAnyOrderDecoding
from trl_dllm.likelihood import AnyOrder, Estimator, Plan, StepMerge, compact
from trl_dllm.models import ForwardFlops, LLaDAConfig, LLaDAModelLM, TrainingFlops, create_tiny_model
from trl_dllm.rollout import Rollout


PROMPT, CANVAS, BLOCK, STEPS, GROUP = 200, 256, 32, 128, 6


@dataclass
class Costs:
    """Operations of one completion."""

    rollout: float
    old: float
    reference: float
    updates: float

    @property
    def total(self) -> float:
        return self.rollout + self.old + self.reference + self.updates


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.46, 0.5, 0.75, 1.0], help="Of the canvas.")
    parser.add_argument("--seed", type=int, default=0, help="Of the trajectories and lengths.")
    return parser


def adapted_8b() -> torch.nn.Module:
    """LLaDA-8B with adapters on all linear layers, without weights."""
    with torch.device("meta"):
        return get_peft_model(LLaDAModelLM(LLaDAConfig()), LoraConfig(r=128, target_modules="all-linear"))


def draw(share: float, seed: int, spread: float = 0.0, stopped: bool = False) -> Rollout:
    """A group whose rows count `share` of the canvas, give or take `spread` of it; `stopped` behind that block."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(GROUP, CANVAS // BLOCK, BLOCK, generator=generator).argsort(dim=2).argsort(dim=2)
    step = (order * STEPS // CANVAS + torch.arange(CANVAS // BLOCK)[None, :, None] * STEPS * BLOCK // CANVAS).flatten(
        1
    )
    length = share * CANVAS * (1 + spread * (2 * torch.rand(GROUP, generator=generator) - 1))
    length = length.round().long().clamp(1, CANVAS)[:, None]
    place = torch.arange(CANVAS)
    if stopped:
        step = step.masked_fill(place // BLOCK > (length - 1) // BLOCK, -1)
    return Rollout(
        prompt_ids=torch.zeros(GROUP, PROMPT, dtype=torch.int64),
        prompt_mask=torch.ones(GROUP, PROMPT, dtype=torch.bool),
        completion_ids=torch.ones_like(step).masked_fill(step < 0, 2),
        unmask_step=step,
        logps=torch.zeros(step.shape),
        counted=place < length,
        view_seed=torch.arange(GROUP),
        mask_token_id=2,
        steps=STEPS,
    ).validate()


class Loop:
    """The costs of both loops for one estimator; `mu` inner iterations."""

    def __init__(self, model, estimator: Estimator, mu: int, redrawn: bool):
        self.forward, self.training = ForwardFlops(model), TrainingFlops(model)
        self.estimator, self.mu, self.redrawn = estimator, mu, redrawn

    def released(self, rollout: Rollout) -> Costs:
        views = self.estimator.num_views(rollout)
        width = PROMPT + CANVAS * (2 if isinstance(self.estimator, AnyOrder) else 1)
        passed = views * self.training.view(1, width, CANVAS // views, training=False)
        # Of one row all logits are kept for the backward pass, as they are there.
        trained = views * self.training.view(1, width, CANVAS // views, training=True)
        draws = self.mu if self.redrawn else 1
        rollout_cost = STEPS * self.forward(1, PROMPT + CANVAS, PROMPT + CANVAS, BLOCK // 2)
        return Costs(rollout_cost, draws * passed, draws * passed, self.mu * trained)

    def ours(self, rollout: Rollout, cached_rollout: float | None) -> Costs:
        plan = Plan(self.estimator, rollout, 0, GROUP)
        views = [compact(plan[number][0]) for number in range(len(plan))]
        passed, trained = (
            sum(self.training.view(*view.input_ids.shape, view.num_targets, training) for view in views) / GROUP
            for training in (False, True)
        )
        draws = self.mu if self.redrawn else 1
        steps = int(rollout.num_steps.sum()) / GROUP
        full = steps * self.forward(1, PROMPT + CANVAS, PROMPT + CANVAS, BLOCK // 2)
        # The first update of a generation batch finds the old policy's log-probs of the first draw.
        return Costs(cached_rollout or full, (draws - 1) * passed, draws * passed, self.mu * trained)

    def update(self, rollout: Rollout) -> tuple[float, float]:
        """Row-forwards and operations of an update, as parts of those of all views on all columns."""
        plan = Plan(self.estimator, rollout, 0, GROUP)
        everything = Plan(self.estimator, replace(rollout, counted=rollout.revealed), 0, GROUP)
        ours = sum(
            self.training.view(*view.input_ids.shape, view.num_targets, True)
            for view in (compact(plan[number][0]) for number in range(len(plan)))
        )
        theirs = sum(
            self.training.view(*view.input_ids.shape, view.num_targets, True)
            for view in (everything[number][0] for number in range(len(everything)))
        )
        return plan.num_pairs / everything.num_pairs, ours / theirs


def cached_rollout(flops: ForwardFlops) -> float:
    """Operations of a completion's any-order rollout: a tiny model is decoded, and its forwards priced as 8B's."""
    model, _ = create_tiny_model("llada", hidden_size=16, num_layers=1)
    config = DiffusionGenerationConfig(
        CANVAS, block_length=BLOCK, diffusion_steps=STEPS, decoding="any_order", cache="exact", stop_at_eos=False
    )

    class Priced(CachedAnyOrderDecoding):
        def __init__(self, *args):
            super().__init__(*args)
            self.count_flops = flops

    ids = torch.full((GROUP, PROMPT), 5)
    plain, decode.CachedAnyOrderDecoding = decode.CachedAnyOrderDecoding, Priced
    try:
        return generate(model, ids, torch.ones_like(ids), config).flops / GROUP
    finally:
        decode.CachedAnyOrderDecoding = plain


def main(args: argparse.Namespace) -> dict[str, float]:
    model, found, console = adapted_8b(), {}, Console(width=120)
    any_order, step_merge = Loop(model, AnyOrder(), 2, False), Loop(model, StepMerge(8), 12, True)
    cached = cached_rollout(ForwardFlops(model))
    table = Table("loop", "share", "stop_at_eos", "released", "ours", "released / ours", title="TFLOPs a completion")
    for name, loop, cost in (("AnyOrder, μ = 2", any_order, cached), ("StepMerge N = 8, μ = 12", step_merge, None)):
        for share in args.shares:
            for stopped in (False, True) if cost is None else (False,):
                released = loop.released(draw(share, args.seed))
                ours = loop.ours(draw(share, args.seed, stopped=stopped), cost)
                ratio = released.total / ours.total
                found[f"{name.split(',')[0]} {share}{' stopped' * stopped}"] = ratio
                cells = [f"{value / 1e12:.0f}" for value in (released.total, ours.total)]
                table.add_row(name, f"{share}", str(stopped).lower(), *cells, f"{ratio:.2f}")
    console.print(table)
    table = Table("update", "share", "lengths", "row-forwards", "operations", title="Part of all views on all columns")
    for name, loop in (("AnyOrder", any_order), ("StepMerge N = 8", step_merge)):
        for share in args.shares:
            for spread in (0.0, 0.5):
                rows, flops = loop.update(draw(share, args.seed, spread))
                found[f"{name} {share} ± {spread}"] = flops
                table.add_row(name, f"{share}", f"± {spread:.0%}", f"{rows:.2f}", f"{flops:.2f}")
    console.print(table)
    return found


if __name__ == "__main__":
    main(make_parser().parse_args())
