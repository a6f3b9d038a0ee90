"""What training runs have learned: a metric and its held-out twin against steps, operations and time, over seeds.

A line is a *group*: runs that differ in nothing but their seed, and in what follows from it (the rows that were
generated with it, the weights that were trained on them). Its band is the 95 % t interval of the mean over the seeds,
drawn from three on: that of two reaches 12.7 standard errors to each side, and the two lines say as much.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..fingerprint import Difference, Fingerprint, differences, in_a_line
from .samples import mean_interval, t_quantile


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


@dataclass(frozen=True)
class Curve:
    """A group's metric against one axis.

    Args:
        group (`str`): label.
        column (`str`): of the log.
        against (`str`): one of `AXES`.
        runs (`list[dict]`): `folder`, `seed`, `x`, `logged` and `y` (smoothed) of each run.
        x, mean (`list[float]`): the mean over the runs, as far as all of them go.
        low, high (`list[float]`, *optional*): the ends of the interval; None for a single run.
    """

    group: str
    column: str
    against: str
    runs: list[dict[str, Any]]
    x: list[float]
    mean: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Line:
    """A group's row of the table. Each of `start`, `best` and `last` has `mean` and, over seeds, `low` and `high`."""

    group: str
    column: str
    seeds: int
    start: dict[str, float]
    best: dict[str, float]
    last: dict[str, float]
    at: dict[str, float] = field(default_factory=dict)  # where the best one is, on each axis


def read_run(folder: str | Path, label: str | None = None) -> Run | None:
    """The run in a folder: its log is in the folder, or, of an unfinished run, in its newest checkpoint.

    None where there is no log.

    Raises:
        ValueError: a log that cannot be read.
    """
    folder = Path(folder)
    numbered = [
        (int(path.name.split("-")[-1]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()
    ]
    for place in (folder, *(path for _, path in sorted(numbered, reverse=True))):
        if (place / STATE).is_file():
            try:
                log = json.loads((place / STATE).read_text())["log_history"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{place / STATE} cannot be read ({error}). Delete the file, or name other runs."
                ) from error
            return Run(folder, log, label, Fingerprint.read(folder) or Fingerprint.read(place))
    return None


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
                same = bool(run.meaning and group[0].meaning) and not _beyond_seed(group[0], run)
            if same:
                group.append(run)
                break
        else:
            groups.append([run])
    groups = [part for group in groups for part in _of_one_start(group)]
    for group in groups:
        _check_group(group)
    return [Group(label, group) for label, group in zip(_labels(groups), groups, strict=True)]


def _beyond_seed(was: Run, now: Run) -> list[Difference]:
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
            common = [fact for fact in _beyond_seed(other, run) if fact[0] in run.meaning and fact[0] in other.meaning]
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
            label = re.sub(r"(^|[-_./]+)(seed|s)?[-_./=]*$", "", label) or base.name
        number = next(n for n in range(1, len(groups) + 1) if _numbered(label, n) not in labels)
        labels.append(_numbered(label, number))
    return labels


def _numbered(label: str, number: int) -> str:
    return label if number == 1 else f"{label} ({number})"


def check_scale(groups: Sequence[Group], column: str) -> None:
    """Raise ValueError where rewards are compared that are no one scale: other tasks, or other reward functions."""
    if not column.startswith("reward"):
        return
    first, *others = (group.runs[0] for group in groups)
    for run in others:
        found = [fact for fact in differences(first.meaning, run.meaning) if fact[0] in _SCALE]
        if found and first.meaning and run.meaning:
            raise ValueError(
                f"RUN={str(run.folder)!r} and {str(first.folder)!r} have rewards that are no one scale "
                f"({in_a_line(found)}). Draw them one by one, or name a column that can be compared with --metric."
            )


def make_curve(group: Group, column: str, against: str, smooth: int = 1) -> Curve | None:
    """A group's curve: each run's trailing mean of `smooth` entries, and their mean and band. None without entries.

    The runs are interpolated to each other's positions on the axis, and averaged as far as all of them go.
    """
    runs = []
    for run in group.runs:
        steps, logged = run.points(column)
        if len(steps):
            x = run.at(against, steps)
            runs.append((run, x, logged, trailing_mean(logged, smooth)))
    if not runs:
        return None
    if len(runs) < len(group.runs):
        lacking = next(run for run in group.runs if not len(run.points(column)[0]))
        raise ValueError(
            f"RUN={str(lacking.folder)!r} has no {column!r} in its log, which another seed of {group.label!r} has. "
            "Leave it out, or train it with the same eval_strategy."
        )
    low, high = max(x[0] for _, x, *_ in runs), min(x[-1] for _, x, *_ in runs)
    grid = np.unique(np.concatenate([x for _, x, *_ in runs]))
    grid = grid[(grid >= low) & (grid <= high)]
    if not len(grid):
        raise ValueError(
            f"{group.label!r}: its runs have no {against} of {column!r} in common. Give them other labels."
        )
    values = np.stack([np.interp(grid, x, y) for _, x, _, y in runs])
    over = [over_seeds(column_of) for column_of in values.T]
    return Curve(
        group.label,
        column,
        against,
        [
            {"folder": str(run.folder), "seed": run.seed, "x": x.tolist(), "logged": raw.tolist(), "y": y.tolist()}
            for run, x, raw, y in runs
        ],
        grid.tolist(),
        [value["mean"] for value in over],
        [value["low"] for value in over] if len(runs) > 1 else None,
        [value["high"] for value in over] if len(runs) > 1 else None,
    )


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """`mean` of one value a seed and, of several, its 95 % t interval, `low` to `high`."""
    values = [float(value) for value in values]
    if len(values) == 1:
        return {"mean": values[0]}
    return mean_interval(values, t_quantile(len(values) - 1))


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each of them, of fewer at the start."""
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(len(values))])


def best_of(column: str, values: Sequence[float] | np.ndarray) -> int:
    """The place of the best value: the smallest of a loss, the largest of anything else."""
    return int(np.argmin(values) if column.endswith("loss") else np.argmax(values))


def make_line(group: Group, curve: Curve, axes: Sequence[str]) -> Line:
    """The table's row of a curve against steps."""

    def value(i: int) -> dict[str, float]:
        if curve.low is None or curve.high is None:
            return {"mean": curve.mean[i]}
        return {"mean": curve.mean[i], "low": curve.low[i], "high": curve.high[i]}

    best = best_of(curve.column, curve.mean)
    step = np.array([curve.x[best]])
    at = {axis: float(np.mean([run.at(axis, step)[0] for run in group.runs])) for axis in axes}
    return Line(curve.group, curve.column, len(curve.runs), value(0), value(best), value(-1), at)


def make_rows(groups: Sequence[Group], column: str, axes: Sequence[str], smooth: int) -> list[list[list[Curve]]]:
    """The curves of a column and, where there are any, of its held-out twin: a row each, with a list an axis."""
    rows = []
    for name, width in ((column, smooth), (f"eval_{column}", 1)):
        cells = [[curve for group in groups if (curve := make_curve(group, name, axis, width))] for axis in axes]
        if cells[0]:
            rows.append(cells)
    return rows


def draw_rows(
    rows: Sequence[Sequence[Sequence[Curve]]], column: str, smooth: int, path: str | Path, title: str
) -> Path:
    """Draw `make_rows` as a PNG, and say below the title what its lines are."""
    from .plots import plot_curves

    mean = f"mean of the last {smooth} logged values" if smooth > 1 else "logged values"
    legend = f"thin: logged; thick: {mean}"
    if any(len(curve.runs) > 1 for cells in rows for curve in cells[0]):
        legend = "thin: each seed; thick: their mean; band: its 95 % t interval (from three seeds on)"
    names = [column if cells[0][0].column == column else f"held-out {column}" for cells in rows]
    return plot_curves(rows, path, f"{title}\n{legend}", names)


def draw_runs(
    runs: Sequence[Run],
    folder: str | Path,
    metric: str | None = None,
    axes: Sequence[str] = AXES,
    smooth: int = 5,
    named: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw runs, print their table, and return what is written: `curves.png` and `curves.json` in `folder`.

    Args:
        metric (`str`, *optional*): column of the log; `eval_` before it is its held-out twin.
        smooth (`int`): logged values in the trailing mean of training's line; held-out values stay as they are.
        named (`list[str]`): what the user has named; what else lies below those folders may lack the metric.
    """
    column, chosen = choose_metric(runs, metric, named)
    for run in runs:
        if run not in chosen:
            print(f"{run.folder} has no {column!r} in its log and is left out.")
    groups = group_runs(chosen)
    check_scale(groups, column)
    rows, lines = make_rows(groups, column, axes, smooth), []
    by_label = {group.label: group for group in groups}
    for cells, name, width in zip(rows, (column, f"eval_{column}"), (smooth, 1), strict=False):
        against_steps = [make_curve(by_label[curve.group], name, "steps", width) for curve in cells[0]]
        lines += [make_line(by_label[curve.group], curve, axes) for curve in against_steps if curve is not None]
    several = any(len(group.runs) > 1 for group in groups)
    title = f"{_about(chosen)}{column} of {len(chosen)} run{'s' * (len(chosen) > 1)}"
    mean = f"mean of the last {smooth} logged values" if smooth > 1 else "logged values"
    how = f"{mean}; over seeds their mean, and its 95 % t interval" if several else mean
    print_curves(lines, f"{title}\n({how})")
    for group in groups:
        ends = {run: run.points(column)[0][-1] for run in group.runs}
        shortest = min(ends, key=ends.__getitem__)
        if ends[shortest] < max(ends.values()):
            print(f"{group.label} ends at step {ends[shortest]:.0f}, where {shortest.folder} does.")
    for group in groups[1:]:
        found = _beyond_seed(groups[0].runs[0], group.runs[0])
        if group.runs[0].meaning and groups[0].runs[0].meaning:
            print(
                f"{group.label} differs from {groups[0].label}: {in_a_line(found) or 'in the weights it starts from'}."
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "metric": column,
        "smooth": smooth,
        "interval": "95 % t interval of the mean over seeds",
        "table": [asdict(line) for line in lines],
        "curves": [asdict(curve) for cells in rows for cell in cells for curve in cell],
    }
    (folder / "curves.json").write_text(json.dumps(written, indent=1) + "\n")
    picture = draw_rows(rows, column, smooth, folder / "curves.png", title)
    print(f"Written to {picture} and {folder / 'curves.json'}.")
    return written


def print_curves(lines: Sequence[Line], title: str, console=None) -> None:
    """Start, best and last value of each curve, and where the best one is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("metric", no_wrap=True)
    for heading in ("seeds", "start", "best", "best at", "last"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        at = ", ".join(say_amount(axis, value) for axis, value in line.at.items())
        start, best, last = (say_value(value) for value in (line.start, line.best, line.last))
        table.add_row(line.group, line.column, str(line.seeds), start, best, at, last)
    (console or Console(width=120)).print(table)


def say_value(value: dict[str, float]) -> str:
    """`0.557 ± 0.031`"""
    half = f" ± {value['high'] - value['mean']:.2g}" if "high" in value else ""
    return f"{value['mean']:.3g}{half}"


def say_amount(against: str, value: float) -> str:
    """`step 120`, `2.61 TFLOPs` or `3.4 min`"""
    if against == "steps":
        return f"step {value:.0f}"
    size, unit = flops_unit(value) if against == "flops" else time_unit(value)
    return f"{value / size:.3g} {unit}"


def flops_unit(largest: float) -> tuple[float, str]:
    """(operations, name) of the unit in which a number of operations is written."""
    power = min(max(int(math.log10(max(largest, 1)) // 3), 0), 8)
    return 1000.0**power, f"{['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'][power]}FLOPs"


def time_unit(largest: float) -> tuple[float, str]:
    """(seconds, name) of the unit in which a duration is written."""
    return (1.0, "s") if largest < 120 else (60.0, "min") if largest < 7200 else (3600.0, "h")


def _about(runs: Sequence[Run]) -> str:
    """The task and the kind of training, where all runs have the same."""
    facts = [[run.meaning.get("task") or run.meaning.get("dataset_name"), run.meaning.get("command")] for run in runs]
    known = [str(fact) for fact in facts[0] if fact and all(other == facts[0] for other in facts)]
    return f"{', '.join(known)}: " if known else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
