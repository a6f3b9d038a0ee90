"""Fine-tune a masked diffusion model on prompts and answers.

trl-dllm sft --config tiny_llada/sft/sudoku
accelerate launch --config_file recipes/accelerate_configs/zero2.yaml trl_dllm/scripts/sft.py --config …
"""

import sys

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
from trl_dllm.trainer.sft_config import DiffusionSFTConfig


_COLUMNS = ("prompt", "completion", "messages", "text")


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser((TaskArguments, DiffusionSFTConfig, ModelArguments), prog=prog)


def main(
    script_args: TaskArguments,
    training_args: DiffusionSFTConfig,
    model_args: ModelArguments,
    callbacks: list | None = None,
    sharding: Sharding | None = None,
):
    check_named(script_args, model_args)
    if script_args.dry_run:
        return dry_run("sft", training_args, model_args, sharding)
    from trl import get_peft_config, get_quantization_config

    from trl_dllm import DiffusionSFTTrainer

    def prepared(split: str, num_examples: int):
        dataset = load_split(script_args, split, num_examples, training_args.seed)
        columns = dataset.column_names or []
        return dataset.select_columns([name for name in _COLUMNS if name in columns]) if columns else dataset

    train = prepared("train", script_args.num_train_examples)
    fingerprint = begin_run("sft", script_args, training_args, model_args, train)
    if fingerprint is None:
        return None
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        training_args.model_init_kwargs["quantization_config"] = quantization
    trainer = DiffusionSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=prepared("validation", script_args.num_eval_examples)
        if training_args.eval_strategy != "no"
        else None,
        peft_config=get_peft_config(model_args),
        callbacks=callbacks,
    )
    trainer.fingerprint = fingerprint
    train_and_save(trainer, script_args)
    return trainer


if __name__ == "__main__":
    run_launched("trl-dllm sft", make_parser, main, sys.argv[1:])
