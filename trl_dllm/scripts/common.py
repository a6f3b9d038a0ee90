"""What the scripts share: reading a recipe, and finding the data and the rewards that it names."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, cast

from transformers.utils import is_torch_bf16_gpu_available
from trl import ScriptArguments, TrlParser

from trl_dllm.processes import say
from trl_dllm.recipe import find_recipe, load_recipe
from trl_dllm.tasks import get_task
from trl_dllm.trainer.meaning import nothing_left


Reward = str | Callable[..., list[float]]  # the name of a reward model, or a function

# Keys of older recipes that TRL or transformers have renamed or removed, and what to do about them.
_MIGRATION = {
    "torch_dtype": "it is called dtype now",
    "max_prompt_length": "TRL removed it; cut the prompts in the dataset",
    "warmup_ratio": "transformers 5 removed it; use warmup_steps",
    "overwrite_output_dir": "transformers 5 removed it; start_over moves what is there aside",
    "logging_dir": "transformers 5 removed it",
    "model_path": "it is called model_name_or_path here",
    "dataset": "name a task, or a dataset with dataset_name",
    "random_masking": "it is called redraw_views here",
    "generation_temperature": "it is called temperature",
    "mask_id": "the mask token is read from the model's config",
    "num_processes": "it belongs to accelerate: pass --num_processes or an accelerate config",
}


class RecipeParser(TrlParser):
    """
    TRL's parser of a YAML recipe with command-line overrides.

    `--config` also takes the name of a recipe of this library, a recipe may name a base ([`~trl_dllm.recipe`]), and an
    unknown key is an error with a hint.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        super().__init__(cast(Any, dataclass_types), **kwargs)  # whose type for a dataclass no class satisfies

    def parse_args_and_config(self, args: Iterable[str] | None = None, *flags: Any, **kwargs: Any) -> tuple[Any, ...]:
        args = list(sys.argv[1:] if args is None else args)
        if "--config" in args:
            i = args.index("--config")
            if i + 1 == len(args):
                raise ValueError("--config needs a value: a file, or the name of a recipe.")
            settings = load_recipe(find_recipe(args[i + 1]))
            env = settings.pop("env", {})
            if not isinstance(env, dict):
                raise ValueError(f"env={env!r} in the recipe must be a mapping of environment variables.")
            os.environ.update({key: str(value) for key, value in env.items()})
            self.set_defaults_with_config(**settings)
            del args[i : i + 2]
        return super().parse_args_and_config(args, *flags, **kwargs)

    def known(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        unknown = [key for key in kwargs if key not in self.known()]
        if unknown:
            raise ValueError(
                "Unknown key in the recipe or its base: " + "; ".join(self._hint(key, kwargs[key]) for key in unknown)
            )
        return super().set_defaults_with_config(**kwargs)

    def parse_args_into_dataclasses(self, args=None, return_remaining_strings=False, **kwargs):
        *parsed, remaining = super().parse_args_into_dataclasses(args=args, return_remaining_strings=True, **kwargs)
        unknown = [word.removeprefix("--").split("=")[0] for word in remaining if word.startswith("--")]
        if not return_remaining_strings and remaining:
            hints = "; ".join(self._hint(key) for key in unknown) or f"stray words {remaining}"
            raise ValueError(f"Unknown argument: {hints}")
        return (*parsed, remaining) if return_remaining_strings else tuple(parsed)

    def parse_known_args(self, args=None, namespace=None):
        namespace, remaining = super().parse_known_args(args, namespace)
        # A dry run loads no weights, so a bf16 recipe needs no GPU for it.
        if namespace.dry_run and not is_torch_bf16_gpu_available():
            namespace.use_cpu = True
        return namespace, remaining

    def _hint(self, key: str, value: Any = None) -> str:
        shown = key if value is None else f"{key}={value!r}"
        if key in _MIGRATION:
            return f"{shown} ({_MIGRATION[key]})"
        near = get_close_matches(key, self.known(), n=1, cutoff=0.5)
        return f"{shown} (did you mean {near[0]!r}?)" if near else shown


@dataclass
class TaskArguments(ScriptArguments):
    """
    What to train or evaluate on: a task of this library, or any dataset of the Hub.

    Args:
        task (`str`, *optional*): name of a task, e.g. "sudoku" or "countdown"; brings its dataset and rewards.
        task_kwargs (`dict[str, Any]`, *optional*): further arguments of the task's `load`, e.g. {min_blanks: 6}.
        num_train_examples (`int`): training examples to generate or take.
        num_eval_examples (`int`): evaluation examples to generate or take.
        data_dir (`str`, *optional*): local folder with the task's data, instead of the Hub.
        dry_run (`bool`): load no weights; print the batch arithmetic, FLOPs and a memory estimate a GPU, and stop.
        puzzle_seed (`int`, *optional*): seed of generated data; `None` takes the run's.
        start_over (`bool`): begin anew in an output_dir that holds another run, whose files are moved aside.
    """

    task: str | None = field(default=None, metadata={"help": "Name of a task; brings its dataset and rewards."})
    task_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the task's load, as a mapping or as JSON."}
    )
    num_train_examples: int = field(default=4096, metadata={"help": "Training examples to generate or take."})
    num_eval_examples: int = field(default=512, metadata={"help": "Evaluation examples to generate or take."})
    data_dir: str | None = field(default=None, metadata={"help": "Local folder with the task's data."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load no weights: print the batch arithmetic, FLOPs and a memory estimate, and stop."},
    )
    puzzle_seed: int | None = field(
        default=None, metadata={"help": "Seed of generated data. None takes the run's seed."}
    )

    start_over: bool = field(
        default=False,
        metadata={"help": "Begin anew in an output_dir that holds a run: its files are moved to a folder in it."},
    )

    def __post_init__(self):
        if isinstance(self.task_kwargs, str):
            self.task_kwargs = json.loads(self.task_kwargs)
        if self.task is not None:
            get_task(self.task)  # an unknown name is an error now, not after the model has loaded


def load_split(args: TaskArguments, split: str, num_examples: int, seed: int):
    """A split of the task or dataset that the arguments name."""
    if args.task is not None:
        seed = args.puzzle_seed if args.puzzle_seed is not None else seed
        kwargs = cast("dict[str, Any]", args.task_kwargs or {})  # a mapping since __post_init__
        return get_task(args.task).load(split, num_examples, seed=seed, data_dir=args.data_dir, **kwargs)
    if args.dataset_name is None:
        raise ValueError("Nothing to train on: set `task` (e.g. sudoku) or `dataset_name`.")
    from datasets import load_dataset

    name = args.dataset_train_split if split == "train" else args.dataset_test_split
    return load_dataset(args.dataset_name, args.dataset_config, split=name, streaming=args.dataset_streaming)


def resolve_rewards(task: str | None, names: list[str] | None, reward_model: str | None) -> list[Reward]:
    """Reward functions by name: the task's, TRL's, or a dotted import path; the task's default if none is named."""
    rewards: list[Reward] = [reward_model] if reward_model else []
    own = get_task(task).rewards if task else {}
    if not names and not rewards:
        return [next(iter(own.values()))] if own else []
    for name in names or []:
        if name in own:
            rewards.append(own[name])
        elif "." in name:
            module, _, attribute = name.rpartition(".")
            sys.path.insert(0, os.getcwd())
            rewards.append(getattr(importlib.import_module(module), attribute))
        else:
            import trl.rewards

            if not hasattr(trl.rewards, name):
                raise ValueError(
                    f"reward_funcs: {name!r} is neither a reward of task {task!r} ({', '.join(own) or 'none'}), nor "
                    "one of trl.rewards, nor a dotted import path."
                )
            rewards.append(getattr(trl.rewards, name))
    return rewards


def last_checkpoint(training_args) -> str | None:
    """Where to resume from: `resume_from_checkpoint: true` takes the newest complete one in output_dir, if any."""
    from trl_dllm.trainer.checkpoint import find_checkpoint

    wanted = training_args.resume_from_checkpoint
    if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # as the command line gives it
        wanted = wanted.lower() == "true"
    return find_checkpoint(wanted, training_args.output_dir)


def train_and_save(trainer, script_args) -> None:
    """Train (from the last checkpoint if the recipe says so), save, and push where asked."""
    args = trainer.args
    checkpoint = last_checkpoint(args)
    if checkpoint and nothing_left(args, checkpoint):
        say(f"All steps are taken: the model is saved from {checkpoint}.")
        trainer.load_checkpoint(checkpoint)
    else:
        if checkpoint:
            say(f"Resuming from {checkpoint}.")
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_finished()
    say(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name or script_args.task)
    trainer.end()


def model_init_kwargs(training_args, model_args) -> dict:
    """Arguments of `from_pretrained` from a recipe's model section."""
    own = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return {**own, **(training_args.model_init_kwargs or {})}
