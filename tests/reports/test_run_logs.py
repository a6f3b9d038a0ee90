"""Which runs a folder holds, and which of them are seeds of one run."""

import helpers_runs
import numpy as np
import pytest
from helpers_runs import log

from trl_dllm.reports.run_logs import Run, group_runs, read_runs


@pytest.fixture
def save(tmp_path):
    """`save(name, log, …)`: a run's folder, as in `helpers_runs`."""
    return lambda name, *args, **kwargs: helpers_runs.save(tmp_path / name, *args, **kwargs)


def labels(*words) -> dict[str, list]:
    return {group.label: [run.seed for run in group.runs] for group in group_runs(read_runs(words))}


def test_held_out_values_between_and_behind_logged_steps_are_placed_by_the_runs_rate():
    entries = [{"step": 4, "flops": 100.0}, {"step": 8, "flops": 400.0}]
    assert Run("a", entries).at("flops", np.array([0, 2, 6, 8, 12])).tolist() == [0, 50, 250, 400, 600]


def test_time_is_the_mean_of_a_window_times_its_steps():
    """TRL's own trainers and older versions have no profile, but `step_time`."""
    entries = [{"step": 5, "step_time": 2.0}, {"step": 5, "eval_reward": 1.0}, {"step": 15, "step_time": 1.0}]
    assert Run("a", entries).at("time", np.array([5, 10, 15])).tolist() == [10, 15, 20]


def test_the_newest_checkpoint_speaks_for_a_run_that_was_killed(save):
    save("a", log([0.0]), checkpoint=9, seed=0)
    (run,) = read_runs([save("a", log([0.0, 1.0]), checkpoint=10, seed=3)])
    assert len(run.points("reward")[0]) == 2 and run.seed == 3


def test_a_finished_run_that_goes_on_is_read_as_far_as_it_has_come(save):
    save("a", log([0.0, 1.0])), save("a", log([0.0, 1.0])[:2], checkpoint=2)
    (finished,) = read_runs([save("a", [{"step": 1, "reward": 5.0}], checkpoint=9)])
    assert finished.points("reward")[1].tolist() == [0, 1], "what an older run left is not its log"
    (resumed,) = read_runs([save("a", log([0.0, 1.0, 2.0]), checkpoint=10)])
    assert resumed.points("reward")[1].tolist() == [0, 1, 2]


def test_runs_that_were_moved_aside_are_not_found(save, tmp_path):
    save("runs/a", log([0.0]))
    save("runs/a/_replaced-1", log([1.0]))
    (run,) = read_runs([str(tmp_path / "runs")])
    assert run.folder.name == "a"


def test_runs_of_other_settings_or_without_any_word_of_them_are_lines_of_their_own(save, tmp_path):
    save("a_s0", log([0.0]), seed=0), save("a_s1", log([0.0]), seed=1), save("b", log([0.0]), seed=0, beta=0.1)
    save("c", log([0.0])), save("d", log([0.0]))
    assert labels(str(tmp_path)) == {"a": [0, 1], "b": [0], "c": [None], "d": [None]}
    assert labels(f"mine={tmp_path}/c", f"mine={tmp_path}/d") == {"mine": [None, None]}
    assert labels(f"{tmp_path}/c", f"c={tmp_path}/d") == {"c": [None], "c (2)": [None]}


def test_a_label_has_no_part_of_a_seed(save, tmp_path):
    for seed in (1, 10, 11):
        save(f"pkl_4_seed{seed}", log([0.0]), seed=seed)
    assert labels(str(tmp_path)) == {"pkl_4": [1, 10, 11]}


def test_weights_follow_the_seed_only_where_the_seeds_differ(save, tmp_path):
    """One seed from two starting points, each with two seeds: two lines."""
    for start in "pq":
        for seed in (0, 1):
            save(f"{start}/{seed}", log([0.0]), seed=seed, weights=start)
    assert labels(str(tmp_path)) == {"p": [0, 1], "q": [0, 1]}
