"""Where the time of a training step goes, and what of it is no forward and no backward of a model.

    python benchmarks/step.py

Trains a random LLaDA of about 50M parameters with LoRA, as d2's recipes do: two updates on each generation batch, a KL
(the reference is the model without its adapter) and, for StepMerge, 15 % of the prompt masked anew in each. Prints,
for StepMerge with N = 8 and for AnyOrder, time and operations of each part of a step, as the trainer logs them
(`profile/*_seconds`, and `flops`).

Beside each step, in the same process, stands the limit: the bare forwards and backwards of exactly the pairs that were
scored, with their inputs made beforehand and the head at the scored rows alone. What a step takes beyond it, drawing
the completions left out, is everything else: planning, noise, attention masks, entropies, TRL's loss, decoding of text
and metrics, the optimizer. One thread, and processor time of that thread, so that other work on the machine does not
count. About four minutes of it.
"""

import argparse
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_dllm.likelihood import score_view
from trl_dllm.likelihood.view import IGNORE, View
from trl_dllm.models import create_tiny_model, unwrap, view_inputs
from trl_dllm.trainer import grpo_trainer, profile


PARTS = (*profile.PARTS, "rest")
ITERATIONS = 2
ESTIMATORS = {
    "StepMerge N = 8": {"estimator": "step_merge", "num_segments": 8, "p_mask_prompt": 0.15},
    "AnyOrder": {"estimator": "any_order", "decoding": "any_order", "cache": "exact"},
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=640, help="Width; heads are 64 wide.")
    parser.add_argument("--num_layers", type=int, default=8, help="Decoder layers.")
    parser.add_argument("--vocab_size", type=int, default=8192, help="Vocabulary.")
    parser.add_argument("--lora_r", type=int, default=16, help="Rank of the adapters.")
    parser.add_argument("--prompt_length", type=int, default=64, help="Prompt tokens a row, at most.")
    parser.add_argument("--canvas", type=int, default=128, help="Canvas, in blocks of 32.")
    parser.add_argument("--steps", type=int, default=16, help="Decoding steps; what they cost is left out.")
    parser.add_argument("--rows", type=int, default=4, help="Completions of a micro-batch, all of one prompt.")
    parser.add_argument("--cycles", type=int, default=4, help="Generation batches measured, behind one that is not.")
    parser.add_argument("--share", type=float, default=0.75, help="Of the canvas up to the EOS, on average.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights and draws.")
    return parser


@dataclass
class Step:
    """What an optimizer step took, and what its views take alone; seconds, and operations."""

    seconds: dict[str, float] = field(default_factory=dict)
    limit: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)

    @property
    def scoring(self) -> float:
        """All of it but the sampling."""
        return sum(self.seconds.values()) - self.seconds["sampling"]


class Limit(TrainerCallback):
    """Runs the views of each step again, bare, when the step has ended."""

    def __init__(self, trainer: DiffusionGRPOTrainer):
        self.trainer, self.steps = trainer, [Step()]
        self.views: list[tuple[str, View]] = []
        self.counted = 0

    def score_view(self, model, view: View, *args, **kwargs):
        switched_off = self.trainer._count_flops._adapted.disable_adapters
        kind = "update" if torch.is_grad_enabled() else "reference" if switched_off else "old"
        self.views.append((kind, view))
        return score_view(model, view, *args, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        step, model, count = self.steps[-1], self.trainer.model, self.trainer._count_flops
        for kind, view in self.views:
            shape = (*view.input_ids.shape, view.num_targets)
            inputs, rows = view_inputs(model, view), (view.targets != IGNORE).flatten().nonzero().squeeze(1)
            targets = view.targets.flatten()[rows, None]
            if kind == "update":
                start = time.thread_time()
                loss = bare(model, inputs, rows, targets)
                middle = time.thread_time()
                loss.backward()
                step.limit["forward"] += middle - start
                step.limit["backward"] += time.thread_time() - middle
                step.operations["forward"] += count.view(*shape, training=False)
                step.operations["backward"] += count.view(*shape, training=True) - count.view(*shape, training=False)
                model.zero_grad()
                continue
            with torch.no_grad(), model.disable_adapter() if kind == "reference" else nullcontext():
                start = time.thread_time()
                bare(model, inputs, rows, targets)
                step.limit[kind] += time.thread_time() - start
                step.operations[kind] += count.view(*shape, training=False)
        step.operations["sampling"] = self.trainer.flops.counted - self.counted - step.operations.total()
        self.counted = self.trainer.flops.counted
        self.views.clear()
        self.steps.append(Step())
        self.trainer.profile.on_evaluate(args, state, control)  # which leaves this out of the next step


def bare(model, inputs: dict, rows: Tensor, targets: Tensor) -> Tensor:
    """The log-probs of a view's tokens, summed, and nothing else."""
    plain = unwrap(model)
    hidden = plain.model(use_cache=False, **inputs).last_hidden_state.flatten(0, 1)[rows]
    return plain.get_output_embeddings()(hidden).log_softmax(dim=1).gather(1, targets).sum()


def measure(args: argparse.Namespace, settings: dict) -> list[Step]:
    """The steps of a run, without those of the first generation batch."""
    model, tokenizer = create_tiny_model(
        "llada",
        args.hidden_size,
        args.num_layers,
        args.seed,
        vocab_size=args.vocab_size,
        num_attention_heads=max(1, args.hidden_size // 64),
        num_key_value_heads=max(1, args.hidden_size // 64),
    )
    # Of a random model's tokens as many end a completion as give the share, so that lengths are drawn.
    odds = next(q for q in torch.linspace(1e-4, 1, 10000).tolist() if share_of(q, args.canvas) <= args.share)
    first = len(tokenizer)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *range(first, first + round(odds * args.vocab_size)),
    ]
    prompts = ["x" * (args.prompt_length - 5 * n) for n in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DiffusionGRPOTrainer(
            model,
            lambda completion_ids, **kwargs: [sum(ids) % 97 / 97 for ids in completion_ids],
            DiffusionGRPOConfig(
                folder,
                use_cpu=True,
                bf16=False,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                gradient_checkpointing=False,
                beta=0.04,
                num_iterations=ITERATIONS,
                num_generations=args.rows,
                per_device_train_batch_size=args.rows,
                gradient_accumulation_steps=1,
                max_steps=ITERATIONS * (1 + args.cycles),
                max_completion_length=args.canvas,
                block_length=min(32, args.canvas),
                diffusion_steps=args.steps,
                stop_at_eos=False,
                seed=args.seed,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.profile.clock = time.thread_time
        trainer.add_callback(limit := Limit(trainer))
        with patch.object(grpo_trainer, "score_view", limit.score_view):
            trainer.train()
    logged = [entry for entry in trainer.state.log_history if "profile/rest_seconds" in entry]
    for step, entry in zip(limit.steps, logged, strict=False):
        step.seconds = {part: entry[f"profile/{part}_seconds"] for part in PARTS}
    return limit.steps[ITERATIONS:-1]


def share_of(odds: float, canvas: int) -> float:
    """The mean part of a canvas up to and with the first EOS, where each token is one with probability `odds`."""
    return (1 - (1 - odds) ** canvas) / (odds * canvas)


def main(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    found, console = {}, Console(width=120)
    for name, settings in ESTIMATORS.items():
        steps = measure(args, settings)
        cycles = [steps[start : start + ITERATIONS] for start in range(0, len(steps), ITERATIONS)]
        table = Table("part", "seconds", "GFLOPs", "limit", "seconds / limit", title=f"{name}: means of a step")
        for part in PARTS:
            seconds, limit, operations = (
                sum(values) / len(steps)
                for values in (
                    [step.seconds[part] for step in steps],
                    [step.limit[part] for step in steps],
                    [step.operations[part] for step in steps],
                )
            )
            ratios = (f"{limit:.3f}", f"{seconds / limit:.3f}") if limit else ("", "")
            table.add_row(part, f"{seconds:.3f}", f"{operations / 1e9:.1f}", *ratios)
        console.print(table)
        ratios = [sum(s.scoring for s in cycle) / sum(s.limit.total() for s in cycle) for cycle in cycles]
        found[name] = median(ratios)
        console.print(
            f"A step without its sampling takes {found[name]:.3f} of the limit (median of {len(cycles)} cycles of "
            f"{ITERATIONS} steps): {1 - 1 / found[name]:.1%} of it is no forward and no backward.\n"
        )
    return found


if __name__ == "__main__":
    main(make_parser().parse_args())
