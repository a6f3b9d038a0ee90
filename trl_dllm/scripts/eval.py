"""Evaluate a model on a task.

trl-dllm eval --model_name_or_path runs/demo/grpo --task sudoku --num_examples 256 --max_new_tokens 16 --output_dir
runs/eval
"""

import argparse
import json
from pathlib import Path

from trl_dllm.evaluation import evaluate
from trl_dllm.scripts.generate import add_generation_arguments, generation_config, load_model
from trl_dllm.tasks import TASKS, get_task


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=sorted(TASKS), help="What to evaluate on.")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"], help="Split of the task.")
    parser.add_argument("--num_examples", type=int, default=256, help="Examples to evaluate.")
    parser.add_argument(
        "--task_kwargs", type=json.loads, default={}, help="Further arguments of the task's load, as JSON."
    )
    parser.add_argument("--data_dir", help="Local folder with the task's data.")
    parser.add_argument("--output_dir", required=True, help="Where generations.jsonl and summary.json are written.")
    add_generation_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> dict:
    config = generation_config(args)
    task = get_task(args.task)
    dataset = task.load(args.split, args.num_examples, seed=args.seed, data_dir=args.data_dir, **args.task_kwargs)
    model, tokenizer = load_model(args)
    summary = evaluate(
        model,
        tokenizer,
        task,
        dataset,
        config,
        args.output_dir,
        batch_size=args.batch_size,
        seed=args.seed,
        settings={"model": args.model_name_or_path, "split": args.split, "task_kwargs": args.task_kwargs},
    )
    print(
        f"{task.name}: {summary['solve_rate']:.1%} of {summary['total']} solved "
        f"(95 % interval {summary['low']:.1%} to {summary['high']:.1%}); settings in "
        f"{Path(args.output_dir) / 'summary.json'}"
    )
    return summary


if __name__ == "__main__":
    main(make_parser().parse_args())
