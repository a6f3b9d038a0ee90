"""The demonstration: a tiny LLaDA learns 4x4 Sudoku by SFT, then improves by GRPO with d2-StepMerge.

    make demo SEED=0

Runs the same entry points and recipes that the command line runs, one after the other, and writes to the output folder
the trained model, `reward_vs_flops.png` and `summary.json`.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch

from trl_dllm.reports.plots import plot_reward
from trl_dllm.scripts import eval as evaluation
from trl_dllm.scripts import grpo, init_tiny, sft


RECIPES = Path(__file__).parents[2] / "recipes" / "tiny_llada"
HELD_OUT = 1000  # puzzles, whose solutions appear in no training puzzle


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, data and draws.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="Folder to write to; emptied first."
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    start, folder, seed = time.time(), args.output_dir, str(args.seed)
    for name in ("init", "sft", "grpo", "before", "after"):
        shutil.rmtree(folder / name, ignore_errors=True)

    def train(script, recipe: str, model: str):
        overrides = [
            "--model_name_or_path",
            str(folder / model),
            "--output_dir",
            str(folder / script.__name__.split(".")[-1]),
        ]
        argv = ["--config", str(RECIPES / recipe), "--seed", seed, *overrides]
        return script.main(*script.make_parser().parse_args_and_config(argv))

    def solve_rate(model: str, name: str) -> dict:
        argv = [
            "--task",
            "sudoku",
            "--task_kwargs",
            '{"min_blanks": 6, "max_blanks": 10}',
            "--num_examples",
            str(HELD_OUT),
        ]
        argv += ["--model_name_or_path", str(folder / model), "--output_dir", str(folder / name), "--seed", seed]
        argv += ["--max_new_tokens", "17", "--block_length", "17", "--diffusion_steps", "8", "--temperature", "1.0"]
        return evaluation.main(evaluation.make_parser().parse_args([*argv, "--batch_size", "250", "--no_stop_at_eos"]))

    _headline("1/5  a tiny LLaDA")
    init_tiny.main(init_tiny.make_parser().parse_args([str(folder / "init"), "--seed", seed]))
    _headline("2/5  masked-diffusion SFT on Sudoku")
    train(sft, "sft/config_sudoku.yaml", "init")
    _headline("3/5  held-out puzzles before RL")
    before = solve_rate("sft", "before")
    _headline("4/5  GRPO with d2-StepMerge")
    trainer = train(grpo, "grpo/config_sudoku.yaml", "sft")
    _headline("5/5  held-out puzzles after RL")
    after = solve_rate("grpo", "after")

    figure = plot_reward(
        trainer.state.log_history, folder / "reward_vs_flops.png", f"4x4 Sudoku, d2-StepMerge (seed {seed})"
    )
    keep = ("solve_rate", "low", "high", "n")
    summary = {
        "before": {key: before[key] for key in keep},
        "after": {key: after[key] for key in keep},
        "seconds": round(time.time() - start, 1),
        "seed": args.seed,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _headline("Solve rate on held-out puzzles (sampled at temperature 1, two tokens a step)")
    for name in ("before", "after"):
        row = summary[name]
        print(
            f"{name:>7}: {row['solve_rate']:6.1%}   95 % interval {row['low']:.1%} to {row['high']:.1%}   n = "
            f"{row['n']}"
        )
    print(
        f"\n{summary['seconds']:.0f} seconds. Model: {folder / 'grpo'}   Figure: {figure}   Summary: "
        f"{folder / 'summary.json'}"
    )
    return summary


def _headline(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("DEMO_THREADS", "1")))
    main(make_parser().parse_args())
