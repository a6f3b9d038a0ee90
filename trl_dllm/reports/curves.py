"""What training runs have learned: a metric and its held-out twin against steps, operations and time, over seeds.

A line is a group of runs ([`~trl_dllm.reports.run_logs`]). Its band is the 95 % t interval of the mean over the seeds,
drawn from three on: that of two reaches 12.7 standard errors to each side, and the two lines say as much.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..fingerprint import in_a_line
from .plots import flops_unit, plot_curves, time_unit, trailing_mean
from .run_logs import AXES, Group, Run, beyond_seed, check_scale, choose_metric, group_runs
from .samples import mean_interval, t_quantile


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


def make_curve(group: Group, column: str, against: str, smooth: int = 1) -> Curve | None:
    """A group's curve: each run's trailing mean of `smooth` entries, and their mean and band. None without entries.

    The runs are interpolated to each other's positions on the axis, and averaged as far as all of them go; entry by
    entry where they have no position in common, but the same steps.
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
    values = np.stack([np.interp(grid, x, y) for _, x, _, y in runs])
    if not len(grid):  # a single evaluation, which no two seeds end after the same time
        if len({tuple(run.points(column)[0]) for run, *_ in runs}) > 1:
            raise ValueError(
                f"{group.label!r}: its runs have no {against} of {column!r} in common. Give them other labels."
            )
        grid, values = np.mean([x for _, x, *_ in runs], axis=0), np.stack([y for *_, y in runs])
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
    if column.startswith("eval_"):
        smooth = 1
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
        found = beyond_seed(groups[0].runs[0], group.runs[0])
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


def _about(runs: Sequence[Run]) -> str:
    """The task and the kind of training, where all runs have the same."""
    facts = [[run.meaning.get("task") or run.meaning.get("dataset_name"), run.meaning.get("command")] for run in runs]
    known = [str(fact) for fact in facts[0] if fact and all(other == facts[0] for other in facts)]
    return f"{', '.join(known)}: " if known else ""
