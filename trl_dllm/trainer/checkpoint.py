"""Complete checkpoints, and what a run needs beside Trainer's own files to go on exactly where it stopped.

Trainer writes a checkpoint file by file under its final name, and `trainer_state.json` last. Just before that, when
every process is done, a manifest of all files is written here. So a checkpoint is complete when its trainer state can
be read and its files are those of the manifest. A kill or a full disk while saving leaves one that is not: it is
skipped when a run is resumed, and said to be.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


MANIFEST = "manifest.json"

# Where any of these is found, a checkpoint that has no manifest has its weights.
_WEIGHTS = ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp*", "global_step*")

Number = int | float


# ----------------------------------------------------------------------------------------------------- completeness


def find_defect(folder: str | Path) -> str | None:
    """What keeps a checkpoint from being complete, in a few words; None for a complete one.

    One without a manifest is not of this version (or of `save_only_model`): it needs a readable trainer state, which
    Trainer writes last, and its weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not isinstance(_read_json(folder / TRAINER_STATE_NAME), dict):
        return f"{TRAINER_STATE_NAME} is missing or cut off"
    if not (folder / MANIFEST).exists():
        if any(folder.glob(_process_state("*"))):
            return f"{MANIFEST} is missing"
        return None if any(_found(folder, pattern) for pattern in _WEIGHTS) else "its weights are missing"
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is cut off"
    for name, size in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def _read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is missing or cannot be parsed."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _found(folder: Path, pattern: str) -> bool:
    return next(folder.rglob(pattern), None) is not None


def _checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {path: name.fullmatch(path.name) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=found.__getitem__, reverse=True)


def find_checkpoint(wanted: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for.

    Args:
        wanted (`str` or `bool`, *optional*): True takes the newest complete one of `output_dir`, and warns of those
            that it had to skip; a path is that checkpoint.
        output_dir (`str`): the run's folder, which need not exist.

    Returns:
        A path, or None: nothing is asked for, or there is no complete checkpoint.

    Raises:
        ValueError: a path to a checkpoint that is not complete.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        if defect := find_defect(wanted):
            others = [path for path in _checkpoints(Path(wanted).parent) if find_defect(path) is None]
            beside = f"{others[0]} is complete" if others else "there is no complete one beside it"
            raise ValueError(
                f"resume_from_checkpoint={str(wanted)!r} is not a complete checkpoint: {defect}. It may have been cut "
                f"off while it was saved; {beside}. Name another one, or set resume_from_checkpoint=True, which takes "
                "the newest complete checkpoint of output_dir."
            )
        return str(wanted)
    skipped = {}
    for path in _checkpoints(output_dir):
        defect = find_defect(path)
        if defect is None:
            break
        skipped[path.name] = defect
    else:
        path = None
    if skipped and PartialState().is_main_process:
        warnings.warn(
            f"{output_dir}: incomplete checkpoints are skipped, as they were cut off while they were saved: "
            + "; ".join(f"{name} ({defect})" for name, defect in skipped.items())
            + f". {f'The run goes on from {path.name}' if path else 'None of the others is complete'}."
        )
    return None if path is None else str(path)


# ----------------------------------------------------------------------------------------------------------- saving


def make_way(run_dir: str | Path, step: int, limited: bool) -> None:
    """Remove what a checkpoint of `step` must not meet, before it is saved.

    That is an older save of the same step, whose files would be taken for the new one's; and, where the number of
    checkpoints is `limited`, incomplete ones, for which complete ones would be deleted.
    """
    for path in _checkpoints(run_dir):
        if path.name == f"{PREFIX_CHECKPOINT_DIR}-{step}" or (limited and find_defect(path)):
            (path / TRAINER_STATE_NAME).unlink(missing_ok=True)  # first, so that what a kill leaves is incomplete
            shutil.rmtree(path, ignore_errors=True)


def save_process_state(trainer, folder: str | Path, state: dict[str, Any]) -> None:
    """Write what this process needs to go on, and when all processes have, the manifest.

    To be called by every process when nothing but the trainer state remains to be written.
    """
    folder = Path(folder)
    path = folder / _process_state(trainer.accelerator.process_index)
    torch.save({"num_processes": trainer.accelerator.num_processes, **state, **_log_window(trainer)}, path)
    written = gather_object([(path.name, path.stat().st_size)])  # waits for every process
    if trainer.args.should_save:
        files = {str(f.relative_to(folder).as_posix()): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
        if not trainer.args.save_on_each_node:  # one folder for all, even where it shows new files late
            files.update(written)
        (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2))


def _process_state(process: int | str) -> str:
    return f"process_state_{process}.pt"


# ---------------------------------------------------------------------------------------------------------- resuming


def load_process_states(trainer, folder: str | Path) -> list[dict[str, Any]]:
    """What processes had saved, as this one needs it: its own state and, if there were more processes than now, those
    of every n-th one behind it. Empty for a checkpoint without any, or if there are more processes now."""
    accelerator, states = trainer.accelerator, []
    process = accelerator.process_index
    # On the CPU first: torch.load knows no device "cpu:0", which is what accelerate's is called under torchrun.
    while (path := Path(folder) / _process_state(process)).is_file():
        states.append(torch.load(path, map_location="cpu", weights_only=True))
        process += accelerator.num_processes
    if states and states[0]["num_processes"] == accelerator.num_processes:
        _restore_log_window(trainer, states[0])
    return states


def _log_window(trainer) -> dict[str, Any]:
    """What was measured since the last log, which the next one is to be the mean of."""
    metrics = {
        mode: {name: [float(value) for value in values] for name, values in found.items()}
        for mode, found in trainer._metrics.items()
    }
    return {"metrics": metrics, "loss": trainer._tr_loss, "last_logged": trainer._globalstep_last_logged}


def _restore_log_window(trainer, state: dict[str, Any]) -> None:
    for mode, found in state["metrics"].items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(found)
    trainer._tr_loss = state["loss"].to(trainer.args.device)
    trainer._globalstep_last_logged = state["last_logged"]
    # `train_loss` is the mean over the steps of this call.
    trainer._total_loss_scalar -= trainer.accelerator.gather(trainer._tr_loss).mean().item()
