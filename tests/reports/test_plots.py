"""The pictures of a run: what is drawn, read back from the figure."""

import pytest

from trl_dllm.reports.plots import plot_reward


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
    assert axes.get_title() == "a run" and axes.get_ylabel() == "training reward"
    assert "floating-point operations" in axes.get_xlabel() and axes.get_xlim()[0] == 0


def test_another_column_is_drawn_by_its_name(figures, tmp_path):
    plot_reward(HISTORY, tmp_path / "format.png", "a run", column="rewards/format")
    (axes,) = figures[0].axes
    assert drawn(axes)["logged"] == [[20, 30], [0.5, 0.25]] and axes.get_ylabel() == "training rewards/format"
