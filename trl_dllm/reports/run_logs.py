"""Training runs as they lie in their folders: their logs, and which of them are seeds of one run.

A *group* is runs that differ in nothing but their seed, and in what follows from it: the rows that were generated with
it, the weights that were trained on them.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..fingerprint import Difference, Fingerprint, differences, in_a_line


STATE = "trainer_state.json"
AXES = ("steps", "flops", "time")
METRICS = ("reward", "rewards/accuracies", "loss")  # of GRPO, DPO and SFT: the first that a run has is drawn

_SEEDS = ("seed", "data_seed", "puzzle_seed")
_OF_SEEDS = ("rows", "weights", "adapter_weights")
_SCALE = ("task", "dataset_name", "reward_funcs", "reward_weights", "reward_model_name_or_path", "reward_model_label")


@dataclass(frozen=True, eq=False)
class Run:
    """A training run that was read from its folder.

    Args:
        folder (`Path`): its output_dir.
        log (`list[dict]`): the log history of its trainer's state.
        label (`str`, *optional*): the group that the user has put it into.
        fingerprint (`Fingerprint`, *optional*): what it belongs to, if the folder says so.
    """

    folder: Path
    log: list[dict]
    label: str | None = None
    fingerprint: Fingerprint | None = None

    @property
    def meaning(self) -> dict[str, Any]:
        return self.fingerprint.meaning if self.fingerprint else {}

    @property
    def seed(self) -> Any:
        return self.meaning.get("seed")

    def points(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a column of the log; empty where it has none."""
        found = {e["step"]: e[column] for e in self.log if _is_number(e.get(column)) and "step" in e}
        steps = sorted(found)
        return np.array(steps, dtype=float), np.array([found[step] for step in steps], dtype=float)

    def at(self, against: str, steps: np.ndarray) -> np.ndarray:
        """Where on an axis these steps are: `steps`, operations (`flops`) or seconds of training (`time`).

        Between two entries of the log it is interpolated; behind the last one it goes on at the run's mean rate.

        Raises:
            ValueError: a log that does not say so.
        """
        if against == "steps":
            return steps
        known, values = self.points("flops") if against == "flops" else self._seconds()
        if not len(known):
            missing, of = ("flops", "flops") if against == "flops" else ("step_time", "seconds a step")
            others = " ".join(axis for axis in AXES if axis != against and self.knows(axis))
            raise ValueError(
                f"RUN={str(self.folder)!r}: its log has no `{missing}`, so it cannot be drawn against {against} "
                f"(GRPO logs {of}; SFT, DPO and other trainers do not). Pass --against {others}."
            )
        inside = np.interp(steps, np.append(0.0, known), np.append(0.0, values))
        return np.where(steps > known[-1], values[-1] * steps / known[-1], inside)

    def knows(self, against: str) -> bool:
        """Whether the log says where on this axis its steps are."""
        return against == "steps" or len((self.points("flops") if against == "flops" else self._seconds())[0]) > 0

    def _seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and seconds of training until then: without evaluation and saving, and without what was lost."""
        steps, means = [], []
        for entry in self.log:
            parts = [value for name, value in entry.items() if re.fullmatch(r"profile/\w+_seconds", name)]
            seconds = sum(parts) if parts else entry.get("step_time")  # older versions, and TRL's own trainers
            if _is_number(seconds) and "step" in entry:
                steps.append(entry["step"])
                means.append(seconds)
        return np.array(steps, dtype=float), np.cumsum(np.array(means) * np.diff(steps, prepend=0))


@dataclass(frozen=True)
class Group:
    """Runs that are one line."""

    label: str
    runs: list[Run]


def read_run(folder: str | Path, label: str | None = None) -> Run | None:
    """The run in a folder: its log is in the folder, or, of an unfinished run, in its newest checkpoint.

    A run that was finished and then resumed to go further is unfinished. None where there is no log.

    Raises:
        ValueError: a log that cannot be read.
    """
    folder = Path(folder)
    numbered = [
        (int(path.name.split("-")[-1]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()
    ]
    saved = next(((n, path) for n, path in sorted(numbered, reverse=True) if (path / STATE).is_file()), None)
    place, log = None, []
    if (folder / STATE).is_file():
        place, log = folder, _read_log(folder)
    if saved is not None and saved[0] > max((entry.get("step", 0) for entry in log), default=-1):
        further = _read_log(saved[1])
        if place is None or further[:1] == log[:1]:  # else an older run's, in the folder of another
            place, log = saved[1], further
    return Run(folder, log, label, Fingerprint.read(folder) or Fingerprint.read(place)) if place else None


def _read_log(place: Path) -> list[dict]:
    try:
        return json.loads((place / STATE).read_text())["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place / STATE} cannot be read ({error}). Delete the file, or name other runs.") from error


def read_runs(words: Sequence[str]) -> list[Run]:
    """The runs that the user names: output folders, folders of several, and `LABEL=FOLDER`, which names the line.

    Raises:
        ValueError: a name that is no folder, or a folder without a log.
    """
    runs: dict[tuple, Run] = {}
    for word in words:
        label, path = None, Path(word)
        if not path.exists() and "=" in word:
            label, _, rest = word.partition("=")
            path = Path(rest)
        if not path.is_dir():
            raise ValueError(f"RUN={word!r} is not a folder. Name the output_dir of a run, or LABEL=FOLDER.")
        one = read_run(path, label)
        found = [one] if one else [run for folder in _run_folders(path) if (run := read_run(folder, label))]
        if not found:
            raise ValueError(
                f"RUN={word!r} has no log: neither {STATE}, nor a checkpoint with one, nor a folder with a run. Name "
                "the output_dir of a run that has saved a checkpoint, or a folder of several."
            )
        for run in found:
            runs[label, run.folder.resolve()] = run
    return list(runs.values())


def _run_folders(folder: Path) -> list[Path]:
    """The folders below with a log, without those that were moved aside (`_replaced-1`)."""
    found = set()
    for path in folder.rglob(STATE):
        place = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
        if not any(part.startswith("_") for part in place.relative_to(folder).parts):
            found.add(place)
    return sorted(found)


def choose_metric(
    runs: Sequence[Run], metric: str | None = None, folders: Sequence[str] = ()
) -> tuple[str, list[Run]]:
    """The column to draw, and the runs that have it.

    A run that lacks it is left out if it was only found below a folder, and an error if it was named.

    Args:
        metric (`str`, *optional*): a column of the log; None takes the first of `METRICS` that a run has.
        folders: what the user has named.
    """
    name = metric or next((m for m in METRICS if any(len(run.points(m)[0]) for run in runs)), None)
    if name is None:
        raise ValueError(f"No run has one of {', '.join(METRICS)} in its log. Name a column of it with --metric.")
    named = {Path(word.partition("=")[2] if not Path(word).exists() else word).resolve() for word in folders}
    chosen = []
    for run in runs:
        if len(run.points(name)[0]):
            chosen.append(run)
        elif not folders or run.folder.resolve() in named:
            columns = sorted(
                {key for e in run.log for key, value in e.items() if _is_number(value)} - {"step", "epoch"}
            )
            raise ValueError(
                f"RUN={str(run.folder)!r} has no {name!r} in its log. Leave it out, or name a column that all runs "
                f"have with --metric; it has {', '.join(columns) or 'none'}."
            )
    if not chosen:
        raise ValueError(f"--metric {name!r} is in no run's log. Name another column.")
    return name, chosen


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put the runs that differ in nothing but their seed into one group, and those that the user has put there.

    A run without a fingerprint, of a trainer that was used from Python, is a group of its own unless it has a label.

    Raises:
        ValueError: a label over runs that differ in more than the seed; a run that is there twice.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if run.label is not None or group[0].label is not None:
                same = run.label == group[0].label
            else:
                same = bool(run.meaning and group[0].meaning) and not beyond_seed(group[0], run)
            if same:
                group.append(run)
                break
        else:
            groups.append([run])
    groups = [part for group in groups for part in _of_one_start(group)]
    for group in groups:
        _check_group(group)
    return [Group(label, group) for label, group in zip(_labels(groups), groups, strict=True)]


def beyond_seed(was: Run, now: Run) -> list[Difference]:
    """Where two runs differ in more than their seed and what follows from it."""
    found = differences(was.meaning, now.meaning)
    return [fact for fact in found if fact[0] not in (*_SEEDS, *_OF_SEEDS)]


def _of_one_start(group: list[Run]) -> list[list[Run]]:
    """A group by the weights and rows of its runs, where two of one seed differ in them: they are not the seed's."""
    by_start: dict[str, list[Run]] = {}
    for run in group:
        by_start.setdefault(json.dumps([run.meaning.get(name) for name in _OF_SEEDS]), []).append(run)
    seeds = [run.seed for run in group]
    repeated = len(set(map(str, seeds))) < len(seeds) and len(by_start) > 1
    return list(by_start.values()) if repeated and group[0].label is None and group[0].meaning else [group]


def _check_group(group: list[Run]) -> None:
    known = [run for run in group if run.meaning]
    for i, run in enumerate(known):
        for other in known[:i]:
            found = differences(other.meaning, run.meaning)
            common = [fact for fact in beyond_seed(other, run) if fact[0] in run.meaning and fact[0] in other.meaning]
            if common:  # a field that one of two versions lacks says nothing
                raise ValueError(
                    f"{run.label}={str(run.folder)!r} differs from {str(other.folder)!r} in more than the seed "
                    f"({in_a_line(common)}). Give it another label."
                )
            if not found:
                raise ValueError(
                    f"RUN={str(other.folder)!r} and {str(run.folder)!r} are the same run twice (seed {run.seed}, the "
                    "same settings): they tell nothing of other seeds. Leave one of them out."
                )


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The given label of each group, or what its folders have in common and the others' have not."""
    folders = [run.folder.resolve() for group in groups for run in group if run.label is None]
    base = Path(os.path.commonpath(folders)) if len(folders) > 1 else folders[0].parent if folders else Path()
    labels: list[str] = []
    for group in groups:
        names = [str(run.folder.resolve().relative_to(base)) for run in group] if group[0].label is None else []
        label = group[0].label or os.path.commonprefix(names)  # noqa: RUF071  letters are meant, not folders
        if len(names) > 1:
            if any(name[len(label) :][:1].isdigit() for name in names):  # of seeds 10 and 11 it would be seed 1
                label = label.rstrip("0123456789")
            label = re.sub(r"(^|[-_./]+)(seed|s)?[-_./=]*$", "", label) or base.name
        number = next(n for n in range(1, len(groups) + 1) if _numbered(label, n) not in labels)
        labels.append(_numbered(label, number))
    return labels


def _numbered(label: str, number: int) -> str:
    return label if number == 1 else f"{label} ({number})"


def check_scale(groups: Sequence[Group], column: str) -> None:
    """Raise ValueError where rewards are compared that are no one scale: other tasks, or other reward functions."""
    if not column.removeprefix("eval_").startswith("reward"):
        return
    first, *others = (group.runs[0] for group in groups)
    for run in others:
        found = [fact for fact in differences(first.meaning, run.meaning) if fact[0] in _SCALE]
        if found and first.meaning and run.meaning:
            raise ValueError(
                f"RUN={str(run.folder)!r} and {str(first.folder)!r} have rewards that are no one scale "
                f"({in_a_line(found)}). Draw them one by one, or name a column that can be compared with --metric."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
