"""What the scripts share: reading a recipe, and finding the data and the rewards that it names."""

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, NoReturn, cast

from trl import ModelConfig, ScriptArguments, TrlParser

from trl_dllm.fields import check_choice, check_fields, check_kind
from trl_dllm.processes import say
from trl_dllm.recipe import find_recipe, load_recipe
from trl_dllm.scripts.task_data import check_data_dir, check_task_kwargs, find_task, json_mapping
from trl_dllm.trainer.meaning import nothing_left


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

# Fields of `TaskArguments` that only data of the Hub have, or only tasks.
_OF_DATASETS = ("dataset_name", "dataset_config", "dataset_streaming", "dataset_train_split", "dataset_test_split")
_OF_TASKS = ("task_kwargs", "num_train_examples", "num_eval_examples", "data_dir", "puzzle_seed")


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
        args = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        settings: dict[str, Any] = {}
        if "--config" in args:
            i = args.index("--config")
            if i + 1 == len(args):
                raise ValueError("--config needs a value: a file, or the name of a recipe.")
            settings = load_recipe(find_recipe(args[i + 1]))
            env = settings.pop("env", {})
            if not isinstance(env, dict):
                raise ValueError(f"env={env!r} in the recipe must be a mapping of environment variables.")
            try:
                os.environ.update({str(key): str(value) for key, value in env.items()})
            except ValueError as error:
                raise ValueError(f"env={env!r} in the recipe: {error}.") from error
            self.set_defaults_with_config(**settings)
            del args[i : i + 2]
        given = {key for key, value in settings.items() if value is not None}
        given |= {word.removeprefix("--").split("=")[0].replace("-", "_") for word in args if word.startswith("--")}
        adapter = sorted(key for key in given if key.startswith("lora_") or key in ("use_dora", "use_rslora"))
        if adapter and "use_peft" not in given:
            raise ValueError(
                f"{', '.join(adapter)} without use_peft: say use_peft: true to train an adapter, or use_peft: false "
                "to train the whole model all the same."
            )
        return super().parse_args_and_config(args, *flags, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # where argparse would print every flag and exit

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
        try:
            *parsed, remaining = super().parse_args_into_dataclasses(args, return_remaining_strings=True, **kwargs)
        except TypeError as error:  # of a value that a config is made with, such as accelerator_config's keys
            raise ValueError(str(error)) from error
        unknown = [word.removeprefix("--").split("=")[0] for word in remaining if word.startswith("--")]
        if not return_remaining_strings and remaining:
            hints = "; ".join(self._hint(key) for key in unknown) or f"stray words {remaining}"
            raise ValueError(f"Unknown argument: {hints}")
        return (*parsed, remaining) if return_remaining_strings else tuple(parsed)

    def parse_known_args(self, args=None, namespace=None):
        namespace, remaining = super().parse_known_args(args, namespace)
        if namespace.dry_run:  # its tensors are fake, and stand nowhere
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
        task (`str`, *optional*): name of a task, e.g. "sudoku" or "countdown", or the path of your own,
            "my_module.TASK"; brings its dataset and rewards.
        task_kwargs (`dict[str, Any]`, *optional*): further arguments of the task's `load`, e.g. {min_blanks: 6}.
        num_train_examples (`int`): training examples to generate or take.
        num_eval_examples (`int`): evaluation examples to generate or take.
        data_dir (`str`, *optional*): local folder with the task's data, instead of the Hub.
        dry_run (`bool`): load no weights; run a step on fake tensors, print its batches, FLOPs and memory, and stop.
        puzzle_seed (`int`, *optional*): seed of generated data; `None` takes the run's.
        start_over (`bool`): begin anew in an output_dir that holds another run, whose files are moved aside.
        print_all_metrics (`bool`): print every metric of a log in the terminal, as transformers does, and not the five
            that matter most. The log and `report_to` have all of them either way.
    """

    task: str | None = field(
        default=None, metadata={"help": "Name of a task, or the path of your own (my_module.TASK)."}
    )
    task_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the task's load, as a mapping or as JSON."}
    )
    num_train_examples: int = field(default=4096, metadata={"help": "Training examples to generate or take."})
    num_eval_examples: int = field(default=512, metadata={"help": "Evaluation examples to generate or take."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Local folder with the task's data, instead of the Hub. None takes that of TRL_DLLM_DATA."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load no weights: run a step on fake tensors, print batches, FLOPs and memory, and stop."},
    )
    puzzle_seed: int | None = field(
        default=None, metadata={"help": "Seed of generated data. None takes the run's seed."}
    )

    start_over: bool = field(
        default=False,
        metadata={"help": "Begin anew in an output_dir that holds a run: its files are moved to a folder in it."},
    )
    print_all_metrics: bool = field(
        default=False, metadata={"help": "Print every metric of a log in the terminal, and not only the main five."}
    )

    def __post_init__(self):
        if isinstance(self.task_kwargs, str):
            try:
                self.task_kwargs = json_mapping(self.task_kwargs)
            except ArgumentTypeError as error:
                raise ValueError(f"task_kwargs={error}.") from error
        check_fields(self, [f.name for f in fields(self)])
        for name in ("num_train_examples", "num_eval_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        check_data_dir(self.data_dir)
        self._refuse_ignored()
        if self.task is not None:
            check_task_kwargs(find_task(self.task), cast("dict[str, Any]", self.task_kwargs or {}))

    def _refuse_ignored(self) -> None:
        """Raise ValueError for a field of the Hub's data beside a task, or of a task beside the Hub's data."""
        if self.task is not None:
            ignored, why = _OF_DATASETS, f"task={self.task!r} brings its own data"
        elif self.dataset_name is not None:
            rows = "dataset_train_split: 'train[:100]' takes some of its rows"
            ignored, why = _OF_TASKS, f"dataset_name={self.dataset_name!r} is no task ({rows})"
        else:
            return
        for f in fields(self):
            if f.name in ignored and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} would be ignored: {why}. Leave out one of both.")


@dataclass
class ModelArguments(ModelConfig):
    """TRL's arguments of the model and its adapter, checked."""

    def __post_init__(self):
        check_kind("lora_target_modules", self.lora_target_modules, list[str] | str | None)
        check_fields(self, [f.name for f in fields(self) if f.name != "lora_target_modules"])
        for name, fits, right in (
            ("lora_r", self.lora_r >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha >= 1, "at least 1"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {right}.")
        if self.use_peft:
            from peft import TaskType

            check_choice("lora_task_type", self.lora_task_type, [kind.value for kind in TaskType])
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_peft:
                raise ValueError(
                    f"{name}=True without use_peft: quantised weights cannot be trained. Say use_peft: true, or "
                    f"{name}: false."
                )
            if getattr(self, name) and find_spec("bitsandbytes") is None:
                raise ValueError(
                    f"{name}=True needs bitsandbytes, which is not installed: pip install bitsandbytes, or "
                    f"say {name}: false and use_bnb_nested_quant: false."
                )
        super().__post_init__()


def check_named(script_args: TaskArguments, model_args: ModelArguments) -> None:
    """Raise ValueError where no model or no data are named."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name a model's folder, or one of the Hub.")
    if script_args.task is None and script_args.dataset_name is None and getattr(script_args, "prompt", None) is None:
        raise ValueError("Nothing to train on: set task (e.g. sudoku) or dataset_name.")


def load_split(args: TaskArguments, split: str, num_examples: int, seed: int):
    """A split of the task or dataset that the arguments name."""
    if args.task is not None:
        seed = args.puzzle_seed if args.puzzle_seed is not None else seed
        kwargs = cast("dict[str, Any]", args.task_kwargs or {})  # a mapping since __post_init__
        return find_task(args.task).load(split, num_examples, seed=seed, data_dir=args.data_dir, **kwargs)
    from datasets import load_dataset

    name = args.dataset_train_split if split == "train" else args.dataset_test_split
    return load_dataset(args.dataset_name, args.dataset_config, split=name, streaming=args.dataset_streaming)


def last_checkpoint(training_args) -> str | None:
    """Where to resume from: `resume_from_checkpoint: true` takes the newest complete one in output_dir, if any."""
    from trl_dllm.trainer.checkpoint import find_checkpoint

    wanted = training_args.resume_from_checkpoint
    if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # as the command line gives it
        wanted = wanted.lower() == "true"
    return find_checkpoint(wanted, training_args.output_dir)


def train_and_save(trainer, script_args) -> None:
    """Train (from the last checkpoint if the recipe says so), save, push where asked, and sum up."""
    from trl_dllm.scripts.terminal import print_summary, shorten_log

    args = trainer.args
    if not script_args.print_all_metrics:
        shorten_log(trainer)
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
    print_summary(trainer, script_args)


def model_init_kwargs(training_args, model_args) -> dict:
    """Arguments of `from_pretrained` from a recipe's model section."""
    own = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return {**own, **(training_args.model_init_kwargs or {})}
