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
from trl_dllm.scripts.task_data import find_task
from trl_dllm.trainer.classifier import ClassifierReward
from trl_dllm.trainer.grpo_config import DiffusionGRPOConfig


@dataclass
class DiffusionGRPOScriptArguments(TaskArguments):
    """
    Arguments of the GRPO script.

    Args:
        reward_funcs (`list[str]`, *optional*): names of the task's rewards, of `trl.rewards`, or dotted import paths;
            `None` takes the task's default.
        reward_model_name_or_path (`str`, *optional*): a sequence-classification reward model.
        reward_model_label (`str`, *optional*): one of the labels of a classifier with several, e.g. "toxic": the
            reward is its log-probability (`ClassifierReward`). `None` takes the only output of a reward model.
        prompt (`str`, *optional*): one prompt for all rows, instead of a task or a dataset: for generation without a
            prompt the beginning-of-text token, or "" for none at all.
    """

    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards of the task, of trl.rewards, or dotted import paths."}
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A sequence-classification reward model."}
    )
    reward_model_label: str | None = field(
        default=None, metadata={"help": "The label of a classifier whose log-probability is the reward."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": 'One prompt for all rows, instead of a task or a dataset; "" is none.'}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("task", "dataset_name", "task_kwargs", "data_dir", "puzzle_seed"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"prompt={self.prompt!r} and {name}={getattr(self, name)!r}: all rows are the one prompt, or the "
                    "data's. Leave out one of both."
                )

    def load(self, split: str, num_examples: int, seed: int):
        """A split of what is trained on: the one prompt in each row, or the task's or the dataset's rows."""
        if self.prompt is None:
            return load_split(self, split, num_examples, seed)
        from datasets import Dataset

        return Dataset.from_dict({"prompt": [self.prompt] * num_examples})


def make_parser(prog: str | None = None) -> RecipeParser:
    return RecipeParser((DiffusionGRPOScriptArguments, DiffusionGRPOConfig, ModelArguments), prog=prog)


def main(
    script_args: DiffusionGRPOScriptArguments,
    training_args: DiffusionGRPOConfig,
    model_args: ModelArguments,
    callbacks: list | None = None,
    sharding: Sharding | None = None,
):
    check_named(script_args, model_args)
    rewards = resolve_rewards(
        script_args.task,
        script_args.reward_funcs,
        script_args.reward_model_name_or_path,
        script_args.reward_model_label,
    )
    if script_args.dry_run:
        return dry_run("grpo", training_args, model_args, sharding)
    from trl import get_peft_config, get_quantization_config

    from trl_dllm import DiffusionGRPOTrainer

    for reward in rewards:
        if isinstance(reward, ClassifierReward):
            reward.check()
    train = script_args.load("train", script_args.num_train_examples, training_args.seed)
    fingerprint = begin_run("grpo", script_args, training_args, model_args, train, rewards)
    if fingerprint is None:
        return None
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    evaluation = None
    if training_args.eval_strategy != "no":
        evaluation = script_args.load("validation", script_args.num_eval_examples, training_args.seed)
    trainer = DiffusionGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=callbacks,
    )
    trainer.fingerprint = fingerprint
    trainer.layout = find_task(script_args.task).layout if script_args.task else None
    train_and_save(trainer, script_args)
    return trainer


if __name__ == "__main__":
    run_launched("trl-dllm grpo", make_parser, main, sys.argv[1:])
