"""Compare likelihood estimates with the trajectories that a model draws, or that a file has.

trl-dllm report --model_name_or_path runs/demo/grpo --task sudoku --num_examples 64 --max_new_tokens 16 --temperature 1
trl-dllm report --model_name_or_path runs/demo/grpo --rollouts theirs.jsonl
"""

import argparse
import sys
from dataclasses import asdict, fields

from trl_dllm.command import Parser, count, run_script
from trl_dllm.fields import check_choice
from trl_dllm.generation import DecodingArguments
from trl_dllm.scripts.generate import generation_config, generation_parser, load_model
from trl_dllm.scripts.task_data import check_data_dir, check_task_kwargs, find_task, json_mapping


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    other = "`trl-dllm report curves RUN …` draws what training runs have learned: report curves --help says more."
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], epilog=other, parents=[generation_parser()])
    parser.add_argument("--rollouts", help="File of JSON lines with trajectories to score, instead of drawing some.")
    parser.add_argument("--task", help="Whose prompts are completed: a name, or my_module.TASK.")
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
    import torch

    from trl_dllm.evaluation import tokenize_prompts
    from trl_dllm.generation import generate
    from trl_dllm.noise import Purpose, hash64

    config = generation_config(args)
    if config.cfg_scale:
        raise ValueError(f"cfg_scale={config.cfg_scale}: the estimators do not follow guidance; leave it at 0.")
    task = find_task(args.task)
    check_task_kwargs(task, args.task_kwargs)
    check_data_dir(args.data_dir)
    dataset = task.load(args.split, args.num_examples, seed=args.seed, data_dir=args.data_dir, **args.task_kwargs)
    model, tokenizer = load_model(args)
    ids, mask = tokenize_prompts(tokenizer, list(dataset["prompt"]))
    seeds = hash64(args.seed, Purpose.EVALUATION, torch.arange(len(ids)))
    rollout = generate(
        model, ids.to(model.device), mask.to(model.device), config, seeds.to(model.device), batch_size=args.batch_size
    )
    facts = {"task": task.name, "split": args.split, "task_kwargs": args.task_kwargs, "seed": args.seed}
    return model, rollout, {**facts, "generation": asdict(config)}


def _stored(args: argparse.Namespace) -> tuple:
    """Model, trajectories of a file, which is read first, and what the report says of them."""
    from transformers import AutoConfig

    import trl_dllm  # noqa: F401  registers the model families
    from trl_dllm.step_maps import read_lines, read_rollout

    vocabulary = AutoConfig.from_pretrained(args.model_name_or_path).get_text_config().vocab_size
    rollout = read_rollout(args.rollouts, vocab_size=vocabulary)
    where, first = read_lines(args.rollouts)[0]
    decoding = first.get("decoding", "denoising")
    (choices,) = (f.metadata["choices"] for f in fields(DecodingArguments) if f.name == "decoding")
    check_choice(f"{where}decoding", decoding, choices)
    model, _ = load_model(args)
    return model, rollout.to(model.device), {"rollouts": args.rollouts, "generation": {"decoding": decoding}}


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
