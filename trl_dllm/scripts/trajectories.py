"""What `report` and `trace` share: trajectories that a model draws for a task, or that a file has."""

import argparse
from dataclasses import fields
from typing import Any

from trl_dllm.command import count
from trl_dllm.fields import check_choice
from trl_dllm.generation import DecodingArguments, DiffusionGenerationConfig
from trl_dllm.rollout import Rollout
from trl_dllm.scripts.generate import generation_config, load_model
from trl_dllm.scripts.task_data import check_data_dir, check_task_kwargs, find_task, json_mapping
from trl_dllm.tasks import Task


def add_source(parser: argparse.ArgumentParser, num_examples: int) -> None:
    """The flags that say whose trajectories are looked at."""
    parser.add_argument("--rollouts", help="File of JSON lines with trajectories to score, instead of drawing some.")
    parser.add_argument("--task", help="Whose prompts are completed: a name, or my_module.TASK.")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"], help="Split of the task.")
    parser.add_argument("--num_examples", type=count, default=num_examples, help="Prompts, one completion each.")
    parser.add_argument(
        "--task_kwargs", type=json_mapping, default={}, help="Further arguments of the task's load, as JSON."
    )
    parser.add_argument("--data_dir", help="Local folder with the task's data.")


def scored_config(args: argparse.Namespace) -> DiffusionGenerationConfig:
    """The decoding settings of what is drawn and scored; ValueError for guidance."""
    config = generation_config(args)
    if config.cfg_scale:
        raise ValueError(f"cfg_scale={config.cfg_scale}: the estimators do not follow guidance; leave it at 0.")
    return config


def load_task(args: argparse.Namespace) -> tuple[Task, Any]:
    """The task and the rows of it that the flags name."""
    task = find_task(args.task)
    check_task_kwargs(task, args.task_kwargs)
    check_data_dir(args.data_dir)
    return task, task.load(args.split, args.num_examples, seed=args.seed, data_dir=args.data_dir, **args.task_kwargs)


def draw(args: argparse.Namespace, prompts: list, config: DiffusionGenerationConfig) -> tuple[Any, Any, Rollout]:
    """Model, tokenizer, and a completion of each prompt; the same prompts and seed draw with the same numbers."""
    import torch

    from trl_dllm.evaluation import tokenize_prompts
    from trl_dllm.generation import generate
    from trl_dllm.noise import Purpose, hash64

    model, tokenizer = load_model(args)
    ids, mask = (table.to(model.device) for table in tokenize_prompts(tokenizer, prompts))
    seeds = hash64(args.seed, Purpose.EVALUATION, torch.arange(len(ids))).to(model.device)
    return model, tokenizer, generate(model, ids, mask, config, seeds, batch_size=args.batch_size)


def read_stored(args: argparse.Namespace) -> tuple[Any, Any, Rollout, list[dict[str, Any]]]:
    """Model, tokenizer, the trajectories of a file, which is read first, and its lines, whose `decoding` is filled in.

    Raises:
        ValueError: a file or a line that is no trajectory of the model's vocabulary, lines of several decodings,
            trajectories that were drawn with guidance, and a dry run.
    """
    from transformers import AutoConfig

    import trl_dllm  # noqa: F401  registers the model families
    from trl_dllm.step_maps import read_lines, read_rollout

    if args.dry_run:
        raise ValueError(
            f"dry_run=True with rollouts={args.rollouts!r}: it says what decoding costs, and the file's are decoded. "
            "Leave out one of both."
        )
    vocabulary = AutoConfig.from_pretrained(args.model_name_or_path).get_text_config().vocab_size
    rollout = read_rollout(args.rollouts, vocab_size=vocabulary)
    lines = read_lines(args.rollouts)
    where, first = lines[0]
    decoding = first.setdefault("decoding", "denoising")
    (choices,) = (f.metadata["choices"] for f in fields(DecodingArguments) if f.name == "decoding")
    check_choice(f"{where}decoding", decoding, choices)
    for where, line in lines:
        if (found := line.get("decoding", "denoising")) != decoding:
            raise ValueError(f"{where}decoding={found!r} differs from the first line's, {decoding!r}. Split the file.")
        if line.get("cfg_scale"):
            raise ValueError(
                f"{where}cfg_scale={line['cfg_scale']!r}: the estimators do not follow guidance; draw without it."
            )
    model, tokenizer = load_model(args)
    return model, tokenizer, rollout.to(model.device), [line for _, line in lines]
