"""Whose run an output_dir holds: checked before any weight is loaded."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

from trl_dllm.fingerprint import FINGERPRINT, Fingerprint, refuse
from trl_dllm.identity import dataset_hash, model_identity
from trl_dllm.processes import on_main_process, say
from trl_dllm.scripts.common import TaskArguments, last_checkpoint
from trl_dllm.scripts.rewards import Reward
from trl_dllm.trainer.classifier import ClassifierReward
from trl_dllm.trainer.completions import ROLLOUTS, TRACES
from trl_dllm.trainer.meaning import meaning_differences, run_fingerprint, same_end, schedule_line
from trl_dllm.trainer.records import is_complete, model_files


def begin_run(
    command: str,
    script_args: TaskArguments,
    args,
    model_args: ModelConfig,
    dataset,
    rewards: list[Reward] | None = None,
) -> Fingerprint | None:
    """The fingerprint of a run that begins or goes on in its output_dir; None for one that is finished there.

    Content is hashed on the first process alone.

    Args:
        command (`str`): "grpo", "sft" or "dpo".
        script_args, args, model_args: the settings, as they were parsed.
        dataset: the rows to train on.
        rewards (`list`, *optional*): the resolved reward functions and models.

    Raises:
        OSError: a model that cannot be read.
        ValueError: on every process, an output_dir or a checkpoint of another run, with a table of what differs.
    """
    name = model_args.model_name_or_path
    assert name is not None  # `check_named` has seen to it

    def begin() -> Fingerprint | None:
        weights = _read_identity("model_name_or_path", name, model_args.model_revision)
        facts: dict[str, Any] = {**weights, "rows": dataset_hash(dataset)}
        if rewards is not None:
            facts["reward_funcs"] = [_reward_name(reward) for reward in rewards]
        fingerprint = run_fingerprint(command, args, [script_args, model_args], facts)
        if script_args.start_over:
            _move_aside(args, name)
        elif _is_finished(args, fingerprint, [args, script_args, model_args]):
            return None
        return fingerprint

    return on_main_process(begin)


def _reward_name(reward: Reward) -> Any:
    """A reward function by its name, a reward model by its content."""
    if isinstance(reward, str):
        return _read_identity("reward_model_name_or_path", reward)
    if isinstance(reward, ClassifierReward):
        return {**_read_identity("reward_model_name_or_path", reward.name), "label": reward.label}
    return f"{reward.__module__}.{reward.__qualname__}"


def _read_identity(field: str, name: str, revision: str | None = None) -> dict[str, Any]:
    try:
        return model_identity(name, revision)
    except OSError as error:
        raise OSError(f"{field}={name!r} cannot be read: {error}") from error


def _is_finished(args, fingerprint: Fingerprint, configs: list) -> bool:
    """Whether output_dir holds the finished model of this run; refuses one, or a checkpoint, that is another run's."""
    folder, checkpoint = Path(args.output_dir), last_checkpoint(args)
    newest = get_last_checkpoint(folder) if folder.is_dir() else None
    for place in dict.fromkeys(Path(path) for path in (folder, checkpoint, newest) if path):
        was = Fingerprint.read(place)
        if was is not None:
            refuse(f"{place} holds a run", meaning_differences(was, fingerprint, configs), _remedies(place, folder))
    held = Fingerprint.read(folder)
    resumes = args.resume_from_checkpoint not in (None, False, "false", "False")
    if resumes and held is not None and held.finished and is_complete(folder, held):
        done = held.finished["global_step"]
        if same_end(args, held) or 0 < args.max_steps <= done:
            planned = args.max_steps if args.max_steps > 0 else held.finished["max_steps"]
            say(f"{folder} is already trained: {done} of {planned} steps.")
            return True
    if checkpoint:
        was = Fingerprint.read(checkpoint)
        line = (
            schedule_line(was, fingerprint)
            if was
            else f"{checkpoint} has no {FINGERPRINT}, so whose it is, is not known."
        )
        if line:
            say(line)
    return False


def _remedies(place: Path, folder: Path) -> str:
    if place != folder and place.parent != folder:
        return "Nothing was changed. Resume from a checkpoint of this run, or leave resume_from_checkpoint out."
    return (
        f"Nothing was changed. Choose another output_dir, or pass --start_over true: what {folder} holds is then "
        f"moved to {_aside(folder)}, and training begins anew."
    )


def _aside(folder: Path) -> Path:
    """A folder that does not exist yet; its name keeps it from the Hub, where Trainer uploads output_dir."""
    number = 1
    while (folder / f"_replaced-{number}").exists():
        number += 1
    return folder / f"_replaced-{number}"


def _move_aside(args, model: str) -> None:
    """Move the checkpoints and the model of output_dir into a folder of it."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint not in (None, True, False, "true", "True", "false", "False"):
        raise ValueError(
            f"start_over=True and resume_from_checkpoint={args.resume_from_checkpoint!r} contradict each other; "
            "give one of them."
        )
    if folder.resolve() == Path(model).resolve():
        raise ValueError(f"start_over=True: output_dir={str(folder)!r} is the model to start from; choose another.")
    left: tuple[str, ...] = ("trainer_state.json", "training_args.bin", "README.md", "curves.png")
    left += (FINGERPRINT, ROLLOUTS, TRACES)
    found = [*folder.glob("checkpoint-*"), *model_files(folder), *(folder / name for name in left)]
    found = [path for path in found if path.exists()]
    if not found:
        return
    aside = _aside(folder)
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    say(f"What {folder} held is in {aside}.")
