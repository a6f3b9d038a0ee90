"""Show on one HTML page how completions were filled in, step by step.

trl-dllm trace --model_name_or_path runs/demo/grpo --task sudoku
trl-dllm trace --model_name_or_path runs/demo/sft --compare runs/demo/grpo --task sudoku --num_examples 8
trl-dllm trace --model_name_or_path runs/demo/grpo --rollouts drawn.jsonl --task sudoku
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trl_dllm.command import Parser, run_script
from trl_dllm.reports.dry_run import dry_run_decoding
from trl_dllm.scripts.generate import generation_parser
from trl_dllm.scripts.task_data import find_task
from trl_dllm.scripts.trajectories import add_source, draw, load_task, read_stored, scored_config


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], parents=[generation_parser()])
    add_source(parser, num_examples=4)
    parser.add_argument("--prompt", action="append", help="A prompt, instead of a task's; may be given several times.")
    parser.add_argument("--chat", action="store_true", help="Wrap each --prompt in the tokenizer's chat template.")
    parser.add_argument("--compare", help="Another model, whose completions of the same prompts stand beside these.")
    parser.add_argument("--compare_adapter", help="An adapter for it; without --compare, on the first model.")
    parser.add_argument("--no_estimates", action="store_true", help="Score nothing: leave out the estimators' table.")
    parser.add_argument("--output", default="trace.html", help="File that is written.")
    parser.set_defaults(temperature=1.0)
    return parser


def main(args: argparse.Namespace) -> Path:
    from trl_dllm.trace import page_data, write_page

    path = Path(args.output)
    if path.is_dir():
        raise ValueError(f"output={args.output!r} is a folder; name the file to write, such as {path / 'trace.html'}.")
    if args.rollouts:
        for name in ("prompt", "compare", "compare_adapter"):
            if getattr(args, name):
                raise ValueError(
                    f"{name}={getattr(args, name)!r} with rollouts={args.rollouts!r}: the file has its completions "
                    "already. Leave out one of both."
                )
        models, what = [_stored(args)], args.rollouts
    elif (args.task is None) == (args.prompt is None):
        raise ValueError("Name a task (--task), prompts (--prompt) or a file of trajectories (--rollouts).")
    else:
        compared = [args]
        if args.compare or args.compare_adapter:
            other = {"model_name_or_path": args.compare or args.model_name_or_path, "adapter": args.compare_adapter}
            compared.append(argparse.Namespace(**{**vars(args), **other}))
            _check_compared(args)
        configs = [scored_config(one) for one in compared]  # before a model loads
        task, rows, prompts = _prompts(args)
        if args.dry_run:
            for one, config in zip(compared, configs, strict=True):
                name = one.model_name_or_path
                dry_run_decoding("trace", name, config, len(prompts), args.batch_size, args.dtype)
            return path
        models = [_drawn(*pair, task, rows, prompts) for pair in zip(compared, configs, strict=True)]
        what = args.task or "prompts"
    data = page_data(f"How completions were filled in: {what}", models)
    shown = write_page(path, data)
    left = f"; {len(data['examples']) - shown} more would make it too large" if shown < len(data["examples"]) else ""
    print(f"{shown} completions{left}: open {path} in a browser.")
    return path


def _check_compared(args: argparse.Namespace) -> None:
    """Raise OSError or ValueError, before the first model has drawn, where the other one is not there."""
    if args.compare:
        from transformers import AutoConfig

        import trl_dllm  # noqa: F401  registers the model families

        try:
            AutoConfig.from_pretrained(args.compare)
        except OSError as error:
            raise OSError(f"compare={args.compare!r} cannot be read: {error}") from error
    if args.compare_adapter:
        from peft import PeftConfig

        try:
            PeftConfig.from_pretrained(args.compare_adapter)
        except (OSError, ValueError) as error:
            raise ValueError(f"compare_adapter={args.compare_adapter!r} cannot be read: {error}") from error


def _prompts(args: argparse.Namespace) -> tuple:
    """Task, its rows, and the prompts to complete; those of the command line have neither task nor columns."""
    if args.task is None:
        prompts = [[{"role": "user", "content": prompt}] if args.chat else prompt for prompt in args.prompt]
        return None, None, prompts
    task, dataset = load_task(args)
    return task, list(dataset), list(dataset["prompt"])


def _name(args: argparse.Namespace) -> str:
    return f"{args.model_name_or_path} + {args.adapter}" if args.adapter else args.model_name_or_path


def _drawn(args: argparse.Namespace, config, task, rows, prompts: list):
    """What one model makes of the prompts."""
    from trl_dllm.trace import Traced

    model, tokenizer, rollout = draw(args, prompts, config)
    source = {"task": args.task, "split": args.split, **args.task_kwargs} if task else {}
    return Traced(
        name=_name(args),
        rollout=rollout,
        tokenizer=tokenizer,
        block_length=config.block_length,
        facts={**source, "seed": args.seed, **{k: v for k, v in asdict(config).items() if v is not None}},
        rewards=None if task is None else _rewards(task, rows, tokenizer, rollout),
        layout=None if task is None else task.layout,
        rows=rows,
        estimates=_estimates(args, model, rollout, config.decoding),
    )


def _rewards(task, rows: list[dict[str, Any]], tokenizer, rollout) -> list[dict[str, Any]]:
    """The task's default reward of each completion, and whether it is right."""
    completions = [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.counted, strict=True)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found: list[dict[str, Any]] = [{} for _ in texts]
    for name, reward in list(task.rewards.items())[:1]:
        for values, value in zip(found, reward(completions=texts, **columns), strict=True):
            values[name] = value
    for values, text, row in zip(found, texts, rows, strict=True):
        values["correct"] = task.score(text, row)["correct"]
    return found


def _stored(args: argparse.Namespace):
    """The trajectories of a file, and what the model makes of them."""
    from trl_dllm.trace import Traced

    task = find_task(args.task) if args.task else None
    model, tokenizer, rollout, lines = read_stored(args)
    rollout, lines = rollout[: args.num_examples], lines[: args.num_examples]
    decoding, block_length = lines[0]["decoding"], lines[0].get("block_length")
    estimates = _estimates(args, model, rollout, decoding)
    known, facts = rollout.logps.isfinite(), {"rollouts": args.rollouts, "decoding": decoding}
    if estimates and not known.all():
        rollout = replace(rollout, logps=rollout.logps.where(known, estimates[0].logps))
        facts["probabilities"] = "the model's, where the file has none"
    prompts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    return Traced(
        name=_name(args),
        rollout=rollout,
        tokenizer=tokenizer,
        block_length=block_length if type(block_length) is int and block_length > 0 else None,
        facts={**facts, "temperature": rollout.temperature},
        rewards=[_numbers_of(line.get("rewards")) for line in lines],
        layout=None if task is None else task.layout,
        rows=[{**line, "prompt": prompt} for line, prompt in zip(lines, prompts, strict=True)],
        estimates=estimates,
    )


def _numbers_of(rewards: object) -> dict[str, Any]:
    """The rewards of a line, which says whatever its writer liked."""
    if not isinstance(rewards, Mapping):
        return {}
    return {name: value for name, value in rewards.items() if value is None or isinstance(value, int | float)}


def _estimates(args: argparse.Namespace, model, rollout, decoding: str) -> list:
    if args.no_estimates:
        return []
    from trl_dllm.reports.gaps import estimate_all
    from trl_dllm.reports.likelihood import exact_estimator

    return estimate_all(model, rollout, exact_estimator(decoding), batch_size=args.batch_size)


if __name__ == "__main__":
    run_script("trl-dllm trace", make_parser, main, sys.argv[1:])
