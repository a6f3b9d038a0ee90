"""The demonstration: a tiny LLaDA learns 4x4 Sudoku by SFT, then improves by GRPO with d2-StepMerge.

    make demo SEED=0

Runs the same entry points and recipes that the command line runs, one after the other, and writes to the output folder
the trained model, `reward_vs_flops.png` and `summary.json`. SFT stops when the model solves a third of some validation
puzzles.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, TrainerCallback

from trl_dllm.command import Parser, run_script
from trl_dllm.evaluation import complete
from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.noise import Purpose, hash64
from trl_dllm.reports.plots import plot_reward
from trl_dllm.scripts import eval as evaluation
from trl_dllm.scripts import grpo, init_tiny, sft
from trl_dllm.tasks import get_task


HELD_OUT = 1000  # puzzles, whose solutions appear in no training puzzle
BLANKS = {"min_blanks": 6, "max_blanks": 10}
SAMPLING = {"max_new_tokens": 17, "block_length": 17, "diffusion_steps": 8, "temperature": 1.0}  # 16 digits and EOS


class StopAtSolveRate(TrainerCallback):
    """Ends a run once the model solves `target` of some validation puzzles, looking every `every` steps."""

    def __init__(self, target: float, tokenizer, every: int = 50, num_examples: int = 200, **sampling):
        self.task, self.target, self.tokenizer, self.every = get_task("sudoku"), target, tokenizer, every
        self.config = DiffusionGenerationConfig(**{**SAMPLING, "stop_at_eos": False, **sampling})
        self.puzzles = self.task.load("validation", num_examples, **BLANKS)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 and self.solve_rate(model) >= self.target:
            control.should_training_stop = True
        return control

    def solve_rate(self, model) -> float:
        seeds = hash64(Purpose.EVALUATION, torch.arange(len(self.puzzles)))
        texts, _ = complete(model, self.tokenizer, list(self.puzzles["prompt"]), self.config, seeds)
        scores = [self.task.score(text, row)["correct"] for text, row in zip(texts, self.puzzles, strict=True)]
        return sum(scores) / len(scores)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, data and draws.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="Folder to write to.")
    return parser


def main(args: argparse.Namespace) -> dict:
    start, folder, seed = time.time(), args.output_dir, str(args.seed)
    for name in ("init", "sft", "grpo", "before", "after"):
        shutil.rmtree(folder / name, ignore_errors=True)

    def train(script, recipe: str, model: str, name: str, *overrides: str, **kwargs):
        argv = ["--config", recipe, "--seed", seed]
        argv += ["--model_name_or_path", str(folder / model), "--output_dir", str(folder / name), *overrides]
        return script.main(*script.make_parser().parse_args_and_config(argv), **kwargs)

    def solve_rate(model: str, name: str) -> dict:
        argv = ["--task", "sudoku", "--task_kwargs", json.dumps(BLANKS), "--num_examples", str(HELD_OUT)]
        argv += ["--model_name_or_path", str(folder / model), "--output_dir", str(folder / name), "--seed", seed]
        argv += [word for key, value in SAMPLING.items() for word in (f"--{key}", str(value))]
        argv += ["--batch_size", "250", "--no_stop_at_eos"]
        return evaluation.main(evaluation.make_parser().parse_args(argv))

    headline("1/5  a tiny LLaDA")
    init_tiny.main(init_tiny.make_parser().parse_args([str(folder / "init"), "--seed", seed]))
    headline("2/5  masked-diffusion SFT on Sudoku, until it solves a third of some validation puzzles")
    stop = StopAtSolveRate(1 / 3, AutoTokenizer.from_pretrained(folder / "init"))
    train(sft, "tiny_llada/sft/sudoku", "init", "sft", "--max_steps", "1500", callbacks=[stop])
    headline("3/5  held-out puzzles before RL")
    before = solve_rate("sft", "before")
    headline("4/5  GRPO with d2-StepMerge")
    trainer = train(grpo, "tiny_llada/grpo/sudoku", "sft", "grpo")
    headline("5/5  held-out puzzles after RL")
    after = solve_rate("grpo", "after")

    title = (
        f"4x4 Sudoku, tiny LLaDA, GRPO with d2-StepMerge, seed {seed}\n{HELD_OUT:,} held-out puzzles, 95 % intervals"
    )
    held_out = [
        {**row, "value": row["solve_rate"], "name": f"held out, {name} RL: {row['solve_rate']:.1%}"}
        for name, row in (("before", before), ("after", after))
    ]
    figure = plot_reward(trainer.state.log_history, folder / "reward_vs_flops.png", title, held_out=held_out)
    keep = ("solve_rate", "low", "high", "n")
    summary = {
        "before": {key: before[key] for key in keep},
        "after": {key: after[key] for key in keep},
        "seconds": round(time.time() - start, 1),
        "seed": args.seed,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    headline("Solve rate on held-out puzzles (sampled at temperature 1, two tokens a step)")
    for name in ("before", "after"):
        row = summary[name]
        print(f"{name:>7}: {row['solve_rate']:6.1%}   95 % interval {row['low']:.1%} to {row['high']:.1%}", end="")
        print(f"   n = {row['n']}")
    print(f"\n{summary['seconds']:.0f} seconds. Model in {folder / 'grpo'}, figure {figure},", folder / "summary.json")
    return summary


def headline(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m", flush=True)


if __name__ == "__main__":
    # One thread: the model is so small that a second one mostly waits, and waits badly on a busy machine.
    torch.set_num_threads(int(os.environ.get("DEMO_THREADS", "1")))
    run_script("the demonstration", make_parser, main, sys.argv[1:])
