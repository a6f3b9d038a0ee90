"""Pictures of runs, as PNG files. Lines and points carry their names beside them: there is no legend to look up."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from .curves import Curve


# Okabe and Ito's, which colour-blind readers tell apart, without the yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":", "-.")  # of every further round of the colours


def pyplot():
    """matplotlib's, which draws into files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures are drawn by matplotlib: pip install 'trl-dllm[plots]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of the wanted ones and, by least squares, nearest to them."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Without i times the gap each, they need only not fall: pools of those that would take their mean.
    pools: list[list[float]] = []  # (mean, number)
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, number), (before, count) = pools.pop(), pools.pop()
            pools.append([(mean * number + before * count) / (number + count), number + count])
    flat = [mean for mean, number in pools for _ in range(int(number))]
    found = [0.0] * len(wanted)
    for rank, (i, value) in enumerate(zip(order, flat, strict=True)):
        found[i] = value + rank * gap
    return found


def label_ends(axes, ends: Sequence[tuple[float, float, str, str]], size: float = 8) -> None:
    """Names right of the axes, each at the height of its line's end, or as near as the others leave room.

    Call it when limits and layout stand: the room that a name takes is measured in pixels.

    Args:
        ends (`list[tuple]`): x and y of a line's end, its name, its colour.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    height = axes.get_window_extent().height
    gap = 1.25 * size * figure.dpi / 72 / height
    inside = axes.transData + axes.transAxes.inverted()
    wanted = [inside.transform((x, y))[1] for x, y, *_ in ends]
    line = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
    for (x, y, name, color), at in zip(ends, spread(wanted, gap), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.04, at),
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=size,
            annotation_clip=False,
            arrowprops=line | {"color": color},
        )


def label_points(
    axes,
    points: Sequence[tuple[float, float, str]],
    avoid: Sequence[tuple[float, float]] = (),
    size: float = 7,
    color: str = "black",
) -> None:
    """Names beside points, none over another or over a point, tied by a thin line to a point that is farther away.

    Call it when limits and layout stand.

    Args:
        points (`list[tuple]`): x, y and name.
        avoid (`list[tuple]`): further points that no name may cover, such as those of a line.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    renderer, area, em = figure.canvas.get_renderer(), axes.get_window_extent(), size * figure.dpi / 72
    centers = [axes.transData.transform((x, y)) for x, y, _ in points]
    full = [*centers, *(axes.transData.transform(point) for point in avoid)]
    taken = [(x - em / 3, y - em / 3, x + em / 3, y + em / 3) for x, y in full]
    rings = [(r, angle) for r in np.arange(0.8, 14, 0.6) for angle in np.deg2rad(np.arange(0, 360, 15))]
    for (px, py), (x, y, name) in zip(centers, points, strict=True):
        text = axes.annotate(name, (x, y), fontsize=size, annotation_clip=False)
        box = text.get_window_extent(renderer)
        text.remove()

        def cost(place: tuple[float, float, float, float]) -> float:
            outside = max(0, area.x0 - place[0], place[2] - area.x1, area.y0 - place[1], place[3] - area.y1)
            return sum(_overlap(place, other) for other in taken) + 1e3 * outside

        places = []
        for radius, angle in rings:  # the text's nearest edge is that far from the point
            cx = px + (radius * em + box.width / 2) * np.cos(angle)
            cy = py + (radius * em + box.height / 2) * np.sin(angle)
            places.append((cx - box.width / 2, cy - box.height / 2, cx + box.width / 2, cy + box.height / 2))
        best = next((place for place in places if cost(place) == 0), None) or min(places, key=cost)
        taken.append(best)
        corner = axes.transData.inverted().transform(best[:2])
        far = np.hypot((best[0] + best[2]) / 2 - px, (best[1] + best[3]) / 2 - py) > box.width / 2 + 1.5 * em
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(name, (x, y), xytext=tuple(corner), fontsize=size, color=color, arrowprops=line if far else None)


def _overlap(a: tuple, b: tuple) -> float:
    """The area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each of them, of fewer at the start."""
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(len(values))])


def flops_unit(largest: float) -> tuple[float, str]:
    """(operations, name) of the unit in which a number of operations is written."""
    power = min(max(int(math.log10(max(largest, 1)) // 3), 0), 8)
    return 1000.0**power, f"{['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'][power]}FLOPs"


def time_unit(largest: float) -> tuple[float, str]:
    """(seconds, name) of the unit in which a duration is written."""
    return (1.0, "s") if largest < 120 else (60.0, "min") if largest < 7200 else (3600.0, "h")


def plot_curves(
    rows: Sequence[Sequence[Sequence["Curve"]]], path: str | Path, title: str, names: Sequence[str]
) -> Path:
    """Draw curves with their bands: a row a metric, a column an axis.

    Args:
        rows: of rows, of columns, of the curves that share a panel.
        path (`str`): the PNG to write.
        names (`list[str]`): what each row is called.
    """
    plt = pyplot()
    size = (1 + 4.2 * len(rows[0]), 0.7 + 2.9 * len(rows))
    figure, panels = plt.subplots(len(rows), len(rows[0]), figsize=size, dpi=150, squeeze=False, layout="constrained")
    groups = list(dict.fromkeys(curve.group for row in rows for cell in row for curve in cell))
    labelled = []
    for row, name, line_of_axes in zip(rows, names, panels, strict=True):
        for cell, axes in zip(row, line_of_axes, strict=True):
            against, ends, heights = cell[0].against, [], []
            last = max(max(run["x"][-1] for run in curve.runs) for curve in cell)
            unit, unit_name = {"flops": flops_unit, "time": time_unit}.get(against, lambda _: (1.0, ""))(last)
            for curve in cell:
                number = groups.index(curve.group)
                color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
                several = len(curve.runs) > 1
                for run in curve.runs:
                    shown = run["y"] if several else run["logged"]
                    axes.plot(np.divide(run["x"], unit), shown, color=color, linewidth=0.6, alpha=0.35)
                    heights += shown
                x, marker = (
                    np.divide(curve.x, unit),
                    "o" if len(curve.x) <= 25 and name.startswith("held-out") else None,
                )
                axes.plot(
                    x, curve.mean, style, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=curve.group
                )
                if curve.low is not None and curve.high is not None and len(curve.runs) > 2:
                    axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
                ends.append((x[-1], curve.mean[-1], curve.group, color))
            # By the runs: a band of few seeds may be wider than anything that was measured.
            room = 0.2 * (max(heights) - min(heights)) or 0.1 * abs(heights[0]) or 0.1
            axes.set(ylim=(min(heights) - room, max(heights) + room), xlim=(0, 1.02 * last / unit))
            what = {
                "steps": "optimizer steps",
                "flops": f"{unit_name} (counted)",
                "time": f"training time, {unit_name}",
            }
            axes.set(xlabel=what[against], ylabel=name)
            axes.grid(alpha=0.3)
            if len(groups) > 1:
                labelled.append((axes, ends))
    figure.suptitle(title, fontsize=10)
    for axes, ends in labelled:
        label_ends(axes, ends)
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def plot_reward(
    log_history: list[dict],
    path: str | Path,
    title: str,
    column: str = "reward",
    held_out: Sequence[dict[str, Any]] = (),
) -> Path:
    """Draw the training reward of a run against the operations counted until then, and held-out values around it.

    Args:
        log_history (`list[dict]`): of the trainer's state, with the entries `flops` and `column`.
        path (`str`): the PNG to write.
        held_out (`list[dict]`): `name`, `value` and its interval `low` to `high`, at equal distances: the first before
            the run, the last after it.
    """
    plt = pyplot()
    points = [(entry["flops"], entry[column]) for entry in log_history if column in entry and "flops" in entry]
    counted, rewards = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    unit, name = flops_unit(counted[-1])
    flops, smooth = counted / unit, trailing_mean(rewards, 5)
    figure, axes = plt.subplots(figsize=(6.8, 4), dpi=150, layout="constrained")
    axes.plot(flops, rewards, color=COLORS[0], alpha=0.3, linewidth=1, label="logged")
    axes.plot(flops, smooth, color=COLORS[0], linewidth=1.8, label="mean of the last 5")
    ends = [(flops[-1], smooth[-1], "in training, mean of the last 5", COLORS[0])]
    marks = np.linspace(0, flops[-1], len(held_out))
    for x, point in zip(marks, held_out, strict=True):
        reach = [[point["value"] - point["low"]], [point["high"] - point["value"]]]
        axes.errorbar(x, point["value"], reach, fmt="o", color=COLORS[1], capsize=4, markersize=5, zorder=3)
    axes.set(xlabel=f"{name} (counted)", ylabel=column, title=title, xlim=(-0.02 * flops[-1], 1.02 * flops[-1]))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    names = [(x, point["value"], point["name"]) for x, point in zip(marks, held_out, strict=True)]
    ends += [(*names.pop(), COLORS[1])] if names else []
    dense = np.linspace(flops[0], flops[-1], 200)
    lines = [
        (x, y) for values in (rewards, smooth) for x, y in zip(dense, np.interp(dense, flops, values), strict=True)
    ]
    bars = [(x, y) for x, point in zip(marks, held_out, strict=True) for y in (point["low"], point["high"])]
    label_points(axes, names, [*lines, *bars], size=8, color=COLORS[1])
    label_ends(axes, ends)
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def plot_language(learned: list[dict], improved: list[dict], path: str | Path, title: str) -> Path:
    """Draw an SFT run's loss and a GRPO run's reward, KL and length, each against its steps.

    Args:
        learned (`list[dict]`): the log history of SFT, with `loss`.
        improved (`list[dict]`): of GRPO, with `reward`, `kl` where there is one, and `completions/mean_length`.
        path (`str`): the PNG to write.
    """
    plt = pyplot()
    panels = [
        (learned, "loss", "SFT: loss, nats a position"),
        (improved, "reward", "GRPO: reward"),
        (improved, "kl", "GRPO: KL to the SFT model, nats a token"),
        (improved, "completions/mean_length", "GRPO: tokens a completion"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), dpi=120)
    for ax, (history, column, name) in zip(axes, panels, strict=True):
        points = [(entry["step"], entry[column]) for entry in history if column in entry]
        ax.plot(
            *zip(*points, strict=True) if points else ((), ()),
            color="tab:blue",
            linewidth=1.2,
            marker=".",
            markersize=4,
        )
        ax.set(xlabel="step", title=name)
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return Path(path)
