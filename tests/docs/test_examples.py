"""The scripts of examples/ run as they are, in an empty folder, and what they print of learning is so."""

import re
import runpy
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = ["own_estimator.py", "own_reward.py", "sudoku.py"]


def test_these_are_all():
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_file()) == SCRIPTS


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a script's names are when it has run."""
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.mark.slow
def test_sudoku_improves(run):
    rewards = run("sudoku.py")["rewards"]
    assert len(rewards) == 15 and sum(rewards[-5:]) > sum(rewards[:5]) + 0.1


@pytest.mark.slow
def test_a_reward_of_ones_own_is_learned(run):
    rewards = run("own_reward.py")["rewards"]
    assert rewards[-1] > rewards[0] + 0.2


@pytest.mark.slow
def test_an_estimator_of_ones_own_is_closer_than_the_mean_field_and_trains(run, capsys):
    names = run("own_estimator.py")
    mean_field, own = map(float, re.findall(r"([\d.]+) nats", capsys.readouterr().out))
    assert own < mean_field / 2
    log = [entry for entry in names["trainer"].state.log_history if "grad_norm" in entry]
    assert len(log) == 2 and all(entry["grad_norm"] > 0 for entry in log)
