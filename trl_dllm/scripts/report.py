"""Compare likelihood estimates with the trajectories that a model draws.

trl-dllm report --model_name_or_path runs/demo/grpo --task sudoku --num_examples 64 --max_new_tokens 16 --temperature 1
"""

import argparse
import sys
from dataclasses import asdict

from trl_dllm.command import Parser, count, run_script
from trl_dllm.scripts.generate import generation_config, generation_parser, load_model
from trl_dllm.scripts.task_data import check_data_dir, check_task_kwargs, json_mapping
from trl_dllm.tasks import TASKS, get_task


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], parents=[generation_parser()])
    parser.add_argument("--task", required=True, choices=sorted(TASKS), help="Whose prompts are completed.")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"], help="Split of the task.")
    parser.add_argument("--num_examples", type=count, default=64, help="Prompts, one completion each.")
    parser.add_argument(
        "--task_kwargs", type=json_mapping, default={}, help="Further arguments of the task's load, as JSON."
    )
    parser.add_argument("--data_dir", help="Local folder with the task's data.")
    parser.add_argument("--block_size", type=count, default=4, help="Positions masked at once by PKL-U.")
    parser.add_argument(
        "--loss_tokens",
        default="eos",
        choices=["eos", "canvas"],
        help="Tokens that are compared: up to the first EOS, or all.",
    )
    parser.add_argument("--output_dir", help="Where likelihood.json and likelihood.png are written; default: nowhere.")
    parser.set_defaults(temperature=1.0)
    return parser


def main(args: argparse.Namespace) -> list:
    from dataclasses import replace

    import torch

    from trl_dllm.evaluation import tokenize_prompts
    from trl_dllm.generation import generate
    from trl_dllm.models import MaskedDiffusionSpec
    from trl_dllm.noise import Purpose, hash64
    from trl_dllm.reports.likelihood import (
        default_estimators,
        exact_estimator,
        likelihood_report,
        print_report,
        save_report,
    )

    config = generation_config(args)
    if config.cfg_scale:
        raise ValueError(f"cfg_scale={config.cfg_scale}: the estimators do not follow guidance; leave it at 0.")
    task = get_task(args.task)
    check_task_kwargs(task, args.task_kwargs)
    check_data_dir(args.data_dir)
    dataset = task.load(args.split, args.num_examples, seed=args.seed, data_dir=args.data_dir, **args.task_kwargs)
    model, tokenizer = load_model(args)
    ids, mask = tokenize_prompts(tokenizer, list(dataset["prompt"]))
    seeds = hash64(args.seed, Purpose.EVALUATION, torch.arange(len(ids)))
    rollout = generate(
        model, ids.to(model.device), mask.to(model.device), config, seeds.to(model.device), batch_size=args.batch_size
    )
    if args.loss_tokens == "canvas":
        rollout = replace(rollout, counted=rollout.revealed)
    estimators = default_estimators(rollout, MaskedDiffusionSpec.from_model(model), args.block_size)
    lines = likelihood_report(
        model, rollout, estimators, exact=exact_estimator(config.decoding), batch_size=args.batch_size
    )
    mean = rollout.counted.sum(dim=1).float().mean().item()
    print_report(
        lines,
        f"{task.name}: {len(rollout)} completions, {mean:.1f} tokens and {rollout.num_steps.float().mean():.1f} steps "
        "each; nats",
    )
    if args.output_dir:
        settings = {
            "model": args.model_name_or_path,
            "task": task.name,
            "split": args.split,
            "task_kwargs": args.task_kwargs,
            "n": len(rollout),
            "loss_tokens": args.loss_tokens,
            "seed": args.seed,
            "generation": asdict(config),
        }
        table, picture = save_report(lines, settings, args.output_dir)
        print(f"Written to {table} and {picture}.")
    return lines


if __name__ == "__main__":
    run_script("trl-dllm report", make_parser, main, sys.argv[1:])
