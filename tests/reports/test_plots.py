"""The pictures of a run: what is drawn, read back from the figure."""

from itertools import combinations

import numpy as np
import pytest

from trl_dllm.reports.curves import Curve
from trl_dllm.reports.likelihood import LikelihoodLine, plot_report
from trl_dllm.reports.plots import label_points, plot_curves, plot_reward, spread


plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed: pip install 'trl-dllm[plots]'")

HISTORY = [
    {"flops": 10.0, "reward": 1.0},
    {"loss": 0.3},
    {"flops": 20.0, "reward": 4.0, "rewards/format": 0.5},
    {"flops": 25.0, "loss": 0.1},
    {"reward": 9.0},
    {"flops": 30.0, "reward": 2.0, "rewards/format": 0.25},
    {"flops": 40.0, "reward": 0.0},
    {"flops": 50.0, "reward": 3.0},
    {"flops": 60.0, "reward": 8.0},
]


@pytest.fixture
def figures(monkeypatch):
    """Figures that are closed, which makes them garbage otherwise."""
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)
    return closed


def drawn(axes) -> dict:
    return {line.get_label(): [list(map(float, values)) for values in line.get_data()] for line in axes.lines}


def test_reward_is_drawn_against_flops(figures, tmp_path):
    """Entries with both are points; the second line is the mean of the last five, of fewer at the start."""
    path = plot_reward(HISTORY, str(tmp_path / "reward.png"), "a run")
    assert path == tmp_path / "reward.png" and path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    (axes,) = figure.axes
    flops, rewards = [10, 20, 30, 40, 50, 60], [1, 4, 2, 0, 3, 8]
    means = [1, 5 / 2, 7 / 3, 7 / 4, 10 / 5, (4 + 2 + 0 + 3 + 8) / 5]
    lines = drawn(axes)
    assert lines == {"logged": [flops, rewards], "mean of the last 5": [flops, pytest.approx(means)]}
    assert axes.get_title() == "a run" and axes.get_ylabel() == "reward" and axes.get_xlabel() == "FLOPs (counted)"
    assert axes.get_xlim()[0] <= 0 and axes.get_legend() is None


def test_another_column_is_drawn_by_its_name(figures, tmp_path):
    plot_reward(HISTORY, tmp_path / "format.png", "a run", column="rewards/format")
    (axes,) = figures[0].axes
    assert drawn(axes)["logged"] == [[20, 30], [0.5, 0.25]] and axes.get_ylabel() == "rewards/format"


def test_held_out_values_stand_around_the_run_with_their_intervals(figures, tmp_path):
    held_out = [
        {"name": "before", "value": 3.0, "low": 2.0, "high": 5.0},
        {"name": "after", "value": 6.0, "low": 5.5, "high": 7.0},
    ]
    plot_reward(HISTORY, tmp_path / "reward.png", "a run", held_out=held_out)
    (axes,) = figures[0].axes
    marks = [bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers]
    reach = [bar.lines[2][0].get_segments()[0][:, 1].tolist() for bar in axes.containers]
    assert marks == [[0, 3], [60, 6]] and reach == [[2, 5], [5.5, 7]]
    assert_legible(figures[0], ["before", "after", "in training, mean of the last 5"])


def letters(text):
    """The box of an annotation's text, without the line that ties it to its point."""
    return plt.Text.get_window_extent(text)


def assert_legible(figure, names: list[str]) -> None:
    """Each name is there once in each panel, inside the picture, and over no other one."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = {text.get_text(): letters(text) for text in axes.texts}
        assert sorted(boxes) == sorted(names) and len(axes.texts) == len(names)
        for one, other in combinations(boxes, 2):
            assert not boxes[one].overlaps(boxes[other]), f"{one} and {other} overlap"
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes.values())


def nearest_by_brute_force(wanted: list[int], gap: int) -> float:
    """The least sum of squares of whole positions in the order of the wanted ones, `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    best = {None: 0.0}
    for i in order:
        best = {
            at: (at - wanted[i]) ** 2
            + min(cost for before, cost in best.items() if before is None or before + gap <= at)
            for at in range(-30, 60)
            if any(before is None or before + gap <= at for before in best)
        }
    return min(best.values())


@pytest.mark.parametrize("seed", range(5))
def test_names_are_spread_as_little_as_their_height_asks_for(seed):
    wanted = np.random.default_rng(seed).integers(0, 12, 6).tolist()
    found = spread(wanted, 4)
    assert np.argsort(found, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
    assert min(np.diff(sorted(found))) >= 4 - 1e-9
    cost = sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True))
    assert cost <= nearest_by_brute_force(wanted, 4) + 1e-9
    assert spread([0, 10, 5], 4) == [0, 10, 5], "nothing moves where there is room"


def curve(group: str, against: str, heights: list[float], band: float | None = None, seeds: int = 3) -> Curve:
    x = [1.0, 2.0, 3.0]
    runs = [{"folder": "a", "seed": 0, "x": x, "logged": heights, "y": heights}]
    runs = runs if band is None else runs * seeds
    low, high = ([h + sign * band for h in heights] if band is not None else None for sign in (-1, 1))
    return Curve(group, "reward", against, runs, x, heights, low, high)


def test_curves_have_bands_and_names_that_do_not_overlap(figures, tmp_path):
    """Eight lines that end within one name's height."""
    names = [f"method {i}" for i in range(8)]
    panel = [curve(name, "flops", [0.1, 0.2, 0.5 + i / 1000], 0.1) for i, name in enumerate(names)]
    plot_curves([[panel], [panel]], tmp_path / "curves.png", "title", ["reward", "held-out reward"])
    (figure,) = figures
    assert len(figure.axes) == 2 and all(axes.get_legend() is None for axes in figure.axes)
    assert_legible(figure, names)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.0) and band[:, 1].max() == pytest.approx(0.6)
    assert figure.axes[0].get_xlabel() == "FLOPs (counted)" and figure.axes[1].get_ylabel() == "held-out reward"


@pytest.mark.parametrize("seeds", [2, 3])
def test_a_wide_band_does_not_flatten_the_lines_and_two_seeds_have_none(figures, tmp_path, seeds):
    wide = curve("a", "steps", [0.0, 0.5, 1.0], 12.0, seeds)
    plot_curves([[[wide]]], tmp_path / "curves.png", "title", ["reward"])
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    assert -0.5 < low < 0 and 1 < high < 1.5 and len(axes.collections) == seeds - 2


@pytest.mark.parametrize("seed", range(3))
def test_names_of_points_overlap_neither_each_other_nor_points(seed):
    """Most of them are in one corner of the picture."""
    figure, axes = plt.subplots(figsize=(6, 5), dpi=100)
    draws = np.random.default_rng(seed).random((16, 2)) ** 3
    axes.scatter(*draws.T)
    label_points(axes, [(x, y, f"estimator {i}") for i, (x, y) in enumerate(draws)])
    assert_legible(figure, [f"estimator {i}" for i in range(16)])
    dots = axes.transData.transform(draws)
    assert not any(letters(text).contains(*dot) for text in axes.texts for dot in dots)
    plt.close(figure)


def test_the_likelihood_figure_has_intervals_and_a_title(figures, tmp_path):
    lines = [LikelihoodLine(f"estimator {i}", -1.0, 0.1, 1.0, None, 0.1 + i / 100, 0.05, 1, 10**7) for i in range(9)]
    plot_report(lines, tmp_path / "likelihood.png", "a model on a task, 64 completions")
    (figure,) = figures
    left, right = figure.axes
    assert figure.get_suptitle() == "a model on a task, 64 completions"
    for axes, along in ((left, 0), (right, 1)):
        (bar,) = axes.containers
        (first, *_) = bar.lines[2][0].get_segments()
        assert first[:, along].tolist() == pytest.approx([0.1 - 1.96 * 0.05, 0.1 + 1.96 * 0.05])
    assert [label.get_text() for label in left.get_yticklabels()] == [line.name for line in lines]
    left.remove()
    assert_legible(figure, [line.name for line in lines])
