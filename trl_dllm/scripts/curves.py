"""Draw what training runs have learned: reward and held-out score against steps, operations and time, over seeds.

trl-dllm report curves runs/tiny_llada/grpo
trl-dllm report curves runs/step_merge runs/mean_field --against flops
trl-dllm report curves StepMerge=runs/a StepMerge=runs/b PKL=runs/c
"""

import argparse
import sys
from pathlib import Path

from trl_dllm.command import Parser, count, run_script


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    from trl_dllm.reports.run_logs import AXES

    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="An output_dir, or a folder of several. Runs that differ only in their seed are one line; LABEL=FOLDER "
        "puts a run into the line of that label.",
    )
    parser.add_argument("--metric", help="Column of the log; default: reward, rewards/accuracies (DPO) or loss (SFT).")
    parser.add_argument("--against", nargs="+", choices=AXES, default=list(AXES), help="Axes to draw against.")
    parser.add_argument(
        "--smooth", type=count, default=5, help="Logged values in the trailing mean of training's line."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/curves"), help="Where curves.png and curves.json are written."
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    from trl_dllm.reports.curves import draw_runs
    from trl_dllm.reports.run_logs import read_runs

    return draw_runs(read_runs(args.runs), args.output_dir, args.metric, args.against, args.smooth, args.runs)


if __name__ == "__main__":
    run_script("trl-dllm report curves", make_parser, main, sys.argv[1:])
