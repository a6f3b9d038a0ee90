"""Train a masked diffusion model on preferences: VRPO.

trl-dllm dpo --config tiny_llada/dpo/sudoku_vrpo
accelerate launch --config_file recipes/accelerate_configs/zero2.yaml trl_dllm/scripts/dpo.py --config …
"""

import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass, field, replace
from typing import Any

from trl_dllm.reports.dry_run import dry_run
from trl_dllm.reports.memory import Sharding
from trl_dllm.scripts.common import (
    ModelArguments,
    RecipeParser,
    TaskArguments,
    check_named,
    load_split,
    model_init_kwargs,
    train_and_save,
)
from trl_dllm.scripts.dry import run_launched
from trl_dllm.scripts.runs import begin_run
from trl_dllm.scripts.task_data import check_task_kwargs, find_task, json_mapping
from trl_dllm.trainer.dpo_config import DiffusionDPOConfig


_COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class DiffusionDPOScriptArguments(TaskArguments):
    """
    What to train on: a dataset of preferences, or a task whose demonstrations can be made worse.

    Args:
        rejected_kwargs (`dict[str, Any]`, *optional*): with `task`, further arguments of its `load`, with which its
            answers are the rejected ones, e.g. {answer_noise: 0.3}; the chosen ones are those without. Pairs of equal
            answers are left out.
    """

    rejected_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "With a task: further arguments of its load, with which its answers are the rejected ones."},
    )

    def __post_init__(self):
        if isinstance(self.rejected_kwargs, str):
            try:
                self.rejected_kwargs = json_mapping(self.rejected_kwargs)
            except ArgumentTypeError as error:
                raise ValueError(f"rejected_kwargs={error}.") from error
        super().__post_init__()
        if self.task is None and self.rejected_kwargs is not None:
            raise ValueError(
                f"rejected_kwargs={self.rejected_kwargs!r} without task: a dataset has its rejected answers in a "
                "column. Leave it out, or name a task."
            )
        if self.task is None:
            return
        if not self.rejected_kwargs:
            raise ValueError(
                f"rejected_kwargs={self.rejected_kwargs!r} with task={self.task!r}: say with which arguments the task "
                "gives worse answers, such as {answer_noise: 0.3}, or name a dataset_name with the columns "
                f"{', '.join(_COLUMNS)}."
            )
        check_task_kwargs(find_task(self.task), self.rejected_kwargs, "rejected_kwargs")


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser((DiffusionDPOScriptArguments, DiffusionDPOConfig, ModelArguments), prog=prog)


def load_pairs(args: DiffusionDPOScriptArguments, split: str, num_examples: int, seed: int):
    """A split's preferences: the dataset's, or a task's answers as they are and made worse.

    Raises:
        ValueError: a task without demonstrations, or whose prompts change with `rejected_kwargs` or whose answers do
            not.
    """
    chosen = load_split(args, split, num_examples, seed)
    if args.task is None:
        return chosen
    worse = {**(args.task_kwargs or {}), **args.rejected_kwargs}  # type: ignore[dict-item]  # mappings by now
    rejected = load_split(replace(args, task_kwargs=worse), split, num_examples, seed)
    if "completion" not in chosen.column_names:
        raise ValueError(
            f"task={args.task!r} has no demonstrations to prefer or reject. Name a dataset_name with the columns "
            f"{', '.join(_COLUMNS)}."
        )
    if list(chosen["prompt"]) != list(rejected["prompt"]):
        raise ValueError(
            f"rejected_kwargs={args.rejected_kwargs!r} changes the prompts of task={args.task!r}, so that the answers "
            "are not to one question. Name arguments that change answers alone, such as answer_noise."
        )
    pairs = chosen.select_columns(["prompt", "completion"]).rename_column("completion", "chosen")
    pairs = pairs.add_column("rejected", list(rejected["completion"]))
    pairs = pairs.filter(lambda row: row["chosen"] != row["rejected"])
    if len(pairs) == 0:
        raise ValueError(
            f"rejected_kwargs={args.rejected_kwargs!r} leaves the answers of task={args.task!r} as they are, so there "
            "is nothing to prefer. Name arguments that make them worse."
        )
    return pairs


def main(
    script_args: DiffusionDPOScriptArguments,
    training_args: DiffusionDPOConfig,
    model_args: ModelArguments,
    callbacks: list | None = None,
    sharding: Sharding | None = None,
):
    check_named(script_args, model_args)
    if script_args.dry_run:
        return dry_run("dpo", training_args, model_args, sharding)
    from trl import get_peft_config, get_quantization_config

    from trl_dllm import DiffusionDPOTrainer

    train = load_pairs(script_args, "train", script_args.num_train_examples, training_args.seed)
    fingerprint = begin_run("dpo", script_args, training_args, model_args, train)
    if fingerprint is None:
        return None
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    evaluated = None
    if training_args.eval_strategy != "no":
        evaluated = load_pairs(script_args, "validation", script_args.num_eval_examples, training_args.seed)
    trainer = DiffusionDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluated,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=callbacks,
    )
    trainer.fingerprint = fingerprint
    train_and_save(trainer, script_args)
    return trainer


if __name__ == "__main__":
    run_launched("trl-dllm dpo", make_parser, main, sys.argv[1:])
