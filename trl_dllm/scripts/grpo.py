"""Train a masked diffusion model with GRPO.

trl-dllm grpo --config tiny_llada/grpo/sudoku
accelerate launch --config_file recipes/accelerate_configs/zero2.yaml trl_dllm/scripts/grpo.py --config …
"""

import sys
from dataclasses import dataclass, field

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
from trl_dllm.scripts.rewards import resolve_rewards
from trl_dllm.scripts.runs import begin_run
from trl_dllm.trainer.grpo_config import DiffusionGRPOConfig


@dataclass
class DiffusionGRPOScriptArguments(TaskArguments):
    """
    Arguments of the GRPO script.

    Args:
        reward_funcs (`list[str]`, *optional*): names of the task's rewards, of `trl.rewards`, or dotted import paths;
            `None` takes the task's default.
        reward_model_name_or_path (`str`, *optional*): a sequence-classification reward model.
    """

    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards of the task, of trl.rewards, or dotted import paths."}
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A sequence-classification reward model."}
    )


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser((DiffusionGRPOScriptArguments, DiffusionGRPOConfig, ModelArguments), prog=prog)


def main(
    script_args: DiffusionGRPOScriptArguments,
    training_args: DiffusionGRPOConfig,
    model_args: ModelArguments,
    sharding: Sharding | None = None,
):
    check_named(script_args, model_args)
    rewards = resolve_rewards(script_args.task, script_args.reward_funcs, script_args.reward_model_name_or_path)
    if script_args.dry_run:
        return dry_run("grpo", training_args, model_args, sharding)
    from trl import get_peft_config, get_quantization_config

    from trl_dllm import DiffusionGRPOTrainer

    train = load_split(script_args, "train", script_args.num_train_examples, training_args.seed)
    fingerprint = begin_run("grpo", script_args, training_args, model_args, train, rewards)
    if fingerprint is None:
        return None
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    evaluation = None
    if training_args.eval_strategy != "no":
        evaluation = load_split(script_args, "validation", script_args.num_eval_examples, training_args.seed)
    trainer = DiffusionGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.fingerprint = fingerprint
    train_and_save(trainer, script_args)
    return trainer


if __name__ == "__main__":
    run_launched("trl-dllm grpo", make_parser, main, sys.argv[1:])
