"""SIGKILL at random moments; `kill_runs.py` has the harness, and a command for more."""

import pytest
from kill_runs import run_killed


@pytest.mark.slow
@pytest.mark.parametrize("kind, processes, kills", [("full", 1, 3), ("lora", 1, 2), ("full", 2, 2)])
def test_a_killed_run_resumes_to_the_undisturbed_one(tmp_path, kind, processes, kills):
    assert run_killed(tmp_path / "runs", kind, processes, kills, seed=kills + processes) >= 1
