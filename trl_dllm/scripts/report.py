"""Compare likelihood estimates with the trajectories that a model draws, or that a file has.

trl-dllm report --model_name_or_path runs/demo/grpo --task sudoku --num_examples 64 --max_new_tokens 16 --temperature 1
trl-dllm report --model_name_or_path runs/demo/grpo --rollouts theirs.jsonl
"""

import argparse
import sys
from dataclasses import asdict

from trl_dllm.command import Parser, count, run_script
from trl_dllm.reports.dry_run import dry_run_decoding
from trl_dllm.scripts.generate import generation_parser
from trl_dllm.scripts.trajectories import add_source, draw, load_task, read_stored, scored_config


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    other = "`trl-dllm report curves RUN …` draws what training runs have learned: report curves --help says more."
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], epilog=other, parents=[generation_parser()])
    add_source(parser, num_examples=64)
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

    from trl_dllm.models import MaskedDiffusionSpec
    from trl_dllm.reports.likelihood import (
        default_estimators,
        exact_estimator,
        likelihood_report,
        print_report,
        save_report,
    )

    if (args.task is None) == (args.rollouts is None):
        raise ValueError("Name a task (--task) to draw trajectories for, or a file (--rollouts) that has some.")
    if args.dry_run and not args.rollouts:
        config, (_, dataset) = scored_config(args), load_task(args)
        dry_run_decoding("report", args.model_name_or_path, config, len(dataset), args.batch_size, args.dtype)
        return []
    model, rollout, facts = _stored(args) if args.rollouts else _drawn(args)
    if args.loss_tokens == "canvas":
        rollout = replace(rollout, counted=rollout.revealed)
    estimators = default_estimators(rollout, MaskedDiffusionSpec.from_model(model), args.block_size)
    exact = exact_estimator(facts["generation"]["decoding"])
    lines = likelihood_report(model, rollout, estimators, exact=exact, batch_size=args.batch_size)
    mean, steps = (number.float().mean() for number in (rollout.counted.sum(dim=1), rollout.num_steps))
    name = facts.get("task") or facts["rollouts"]
    print_report(lines, f"{name}: {len(rollout)} completions, {mean:.1f} tokens and {steps:.1f} steps each; nats")
    if args.rollouts:
        _compare(model, rollout, exact, args.batch_size)
    if args.output_dir:
        settings = {
            "model": args.model_name_or_path,
            "n": len(rollout),
            "loss_tokens": args.loss_tokens,
            **facts,
        }
        table, picture = save_report(lines, settings, args.output_dir)
        print(f"Written to {table} and {picture}.")
    return lines


def _drawn(args: argparse.Namespace) -> tuple:
    """Model, trajectories that it draws for a task's prompts, and what the report says of them."""
    config = scored_config(args)
    task, dataset = load_task(args)
    model, _, rollout = draw(args, list(dataset["prompt"]), config)
    facts = {"task": task.name, "split": args.split, "task_kwargs": args.task_kwargs, "seed": args.seed}
    return model, rollout, {**facts, "generation": asdict(config)}


def _stored(args: argparse.Namespace) -> tuple:
    """Model, trajectories of a file, and what the report says of them."""
    model, _, rollout, lines = read_stored(args)
    return model, rollout, {"rollouts": args.rollouts, "generation": {"decoding": lines[0]["decoding"]}}


def _compare(model, rollout, exact, batch_size: int) -> None:
    """Say how far the log-probs that a file has are from this model's for the same trajectories."""
    import torch

    from trl_dllm.likelihood import token_logps

    known = rollout.counted & rollout.logps.isfinite()
    if not known.any():
        print("The file has no log-probs to compare with this model's.")
        return
    with torch.no_grad():
        ours = token_logps(model, rollout, exact, batch_size=batch_size).logps[known]
    theirs = rollout.logps[known]
    print(
        f"Log-probs of {int(known.sum())} tokens: mean {theirs.mean():.4f} in the file, {ours.mean():.4f} under this "
        f"model; the largest difference is {(ours - theirs).abs().max():.2e} nats."
    )


if __name__ == "__main__":
    run_script("trl-dllm report", make_parser, main, sys.argv[1:])
