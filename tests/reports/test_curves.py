"""What `trl-dllm report curves` draws, averages, says and refuses."""

import json

import helpers_runs
import numpy as np
import pytest
from helpers_runs import log

from trl_dllm import cli
from trl_dllm.reports.curves import make_curve, say_amount
from trl_dllm.reports.run_logs import Run, group_runs, read_runs
from trl_dllm_cli import main


T2 = 4.302652729749464  # Student's 97.5 % point with two degrees of freedom


@pytest.fixture
def save(tmp_path):
    """`save(name, log, …)`: a run's folder, as in `helpers_runs`."""
    return lambda name, *args, **kwargs: helpers_runs.save(tmp_path / name, *args, **kwargs)


def draw(*argv) -> dict:
    cli.main(["report", "curves", *argv])


def test_the_whole_command(save, tmp_path, capsys):
    """Three seeds are one line, another estimator is another; the table, the picture, and what is drawn."""
    for seed, rewards in enumerate(([0.0, 0.4, 0.2], [0.2, 0.6, 0.4], [0.4, 1.1, 0.6])):
        held = [(0, rewards[0]), (3, rewards[2])]
        save(f"runs/merge/seed-{seed}", log(rewards, held_out=held), seed=seed, weights=f"w{seed}", rows=f"r{seed}")
    save("runs/pkl", log([0.1, 0.1, 0.3], held_out=[(3, 0.5)]), seed=0, weights="w0", rows="r0", estimator="pkl")
    draw(str(tmp_path / "runs"), "--smooth", "1", "--output_dir", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "curves.json").read_text())
    curves = {(curve["group"], curve["column"], curve["against"]): curve for curve in written["curves"]}
    assert len(curves) == 2 * 2 * 3
    merge = curves["merge", "reward", "flops"]
    assert merge["x"] == [100, 200, 300] and merge["mean"] == pytest.approx([0.2, 0.7, 0.4])
    deviation = np.std([0.4, 0.6, 1.1], ddof=1)
    assert merge["high"][1] - 0.7 == pytest.approx(T2 * deviation / 3**0.5) == pytest.approx(0.7 - merge["low"][1])
    assert curves["merge", "reward", "time"]["x"] == [3, 6, 9]
    assert curves["merge", "eval_reward", "time"]["x"] == [0, 9] and curves["pkl", "reward", "steps"]["low"] is None
    row = next(line for line in written["table"] if line["group"] == "merge")
    assert row["seeds"] == 3 and row["best"]["mean"] == pytest.approx(0.7)
    assert row["at"] == {"steps": 2, "flops": 200, "time": 6}
    assert "0.7 ± 0.9" in printed and "step 2, 200 FLOPs, 6 s" in printed and "ends at step" not in printed
    assert "pkl differs from merge: estimator step_merge → pkl" in printed


def test_training_is_smoothed_and_held_out_values_are_not(save):
    (run,) = read_runs([save("a", log([1.0, 2.0, 6.0, 3.0], held_out=[(2, 5.0), (4, 1.0)]))])
    (group,) = group_runs([run])
    assert make_curve(group, "reward", "steps", 3).mean == pytest.approx([1, 1.5, 3, 11 / 3])
    assert make_curve(group, "reward", "steps", 3).runs[0]["logged"] == [1, 2, 6, 3]


def test_seeds_are_averaged_where_all_of_them_are():
    """Interpolated to each other's positions: one is logged every step, one every second, and it ends earlier."""
    short = Run("a", [{"step": step, "reward": float(step)} for step in (2, 4)], "x")
    long = Run("b", [{"step": step, "reward": 10.0} for step in (1, 2, 3, 4, 5, 6)], "x")
    (group,) = group_runs([short, long])
    curve = make_curve(group, "reward", "steps")
    assert curve.x == [2, 3, 4] and curve.mean == pytest.approx([6, 6.5, 7])


def test_seeds_that_were_evaluated_once_are_averaged_though_they_took_other_times(save, tmp_path):
    for seed, (seconds, value) in enumerate([(3.0, 0.25), (5.0, 0.75)]):
        entries = [{"step": 1, "reward": 0.0, "step_time": seconds, "eval_reward": value}]
        save(f"runs/seed{seed}", entries, seed=seed)
    draw(str(tmp_path / "runs"), "--against", "time", "--output_dir", str(tmp_path / "out"))
    *_, held_out = json.loads((tmp_path / "out/curves.json").read_text())["curves"]
    assert (held_out["column"], held_out["x"], held_out["mean"]) == ("eval_reward", [4.0], [0.5])


def test_seeds_without_a_position_in_common_are_no_line():
    first, other = (Run("a", [{"step": step, "reward": 0.0}], "x") for step in (1, 2))
    (group,) = group_runs([first, other])
    with pytest.raises(ValueError, match="'x': its runs have no steps of 'reward' in common"):
        make_curve(group, "reward", "steps")


def test_held_out_values_stay_as_they_are_where_they_are_what_is_named(save, tmp_path):
    path = save("a", log([0.0] * 3, held_out=[(1, 0.25), (2, 1.0), (3, 0.5)]))
    argv = ["--metric", "eval_reward", "--against", "steps", "--output_dir", str(tmp_path / "out")]
    draw(path, *argv)
    written = json.loads((tmp_path / "out/curves.json").read_text())
    assert written["curves"][0]["mean"] == [0.25, 1.0, 0.5] and written["smooth"] == 1
    assert written["table"][0]["best"] == {"mean": 1.0}


def test_a_line_that_ends_before_some_of_its_runs_do_is_said(save, tmp_path, capsys):
    save("m/0", log([0.0, 1.0, 2.0]), seed=0), save("m/1", log([0.0, 1.0]), checkpoint=2, seed=1)
    draw(str(tmp_path / "m"), "--against", "steps", "--output_dir", str(tmp_path / "out"))
    assert f"m ends at step 2, where {tmp_path / 'm/1'} does." in capsys.readouterr().out


def test_a_folder_may_hold_runs_without_the_metric_and_a_named_run_may_not(save, tmp_path, capsys):
    save("runs/sft", [{"step": 1, "loss": 0.5}]), save("runs/grpo", log([0.0, 1.0]))
    draw(str(tmp_path / "runs"), "--against", "steps", "--output_dir", str(tmp_path / "out"))
    assert f"{tmp_path / 'runs/sft'} has no 'reward' in its log and is left out." in capsys.readouterr().out
    assert not any(
        "sft" in run["folder"]
        for c in json.loads((tmp_path / "out/curves.json").read_text())["curves"]
        for run in c["runs"]
    )


def one_line(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as ended:
        draw(*argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("runs", "argv", "message"),
    [
        ({}, ["{}/no"], "RUN='{}/no' is not a folder. Name the output_dir of a run, or LABEL=FOLDER."),
        ({"a": None}, ["{}/a"], "RUN='{}/a' has no log: neither trainer_state.json, nor a checkpoint with one"),
        ({"a": "{"}, ["{}/a"], "{}/a/trainer_state.json cannot be read"),
        (
            {"a": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]},
            ["{}/a"],
            "RUN='{}/a': its log has no `flops`, so it cannot be drawn against flops (GRPO logs flops; SFT, DPO and "
            "other trainers do not). Pass --against steps.",
        ),
        (
            {"a": log([0.0]), "b": [{"step": 1, "loss": 0.5}]},
            ["{}/a", "{}/b"],
            "RUN='{}/b' has no 'reward' in its log. Leave it out, or name a column that all runs have with --metric; "
            "it has loss.",
        ),
        ({"a": log([0.0])}, ["{}/a", "--metric", "kl"], "RUN='{}/a' has no 'kl' in its log."),
        ({"a": log([0.0])}, ["{}/a", "--against", "hours"], "--against: invalid choice: 'hours'"),
        (
            {"a": (log([0.0]), {"seed": 0}), "b": (log([0.0]), {"seed": 1, "beta": 0.1, "learning_rate": 1})},
            ["x={}/a", "x={}/b"],
            None,
        ),
        (
            {"a": (log([0.0]), {"seed": 0}), "b": (log([0.0]), {"seed": 1, "estimator": "pkl"})},
            ["x={}/a", "x={}/b"],
            "x='{}/b' differs from '{}/a' in more than the seed (estimator step_merge → pkl). Give it another label.",
        ),
        (
            {"a": (log([0.0]), {"seed": 4}), "b": (log([0.0]), {"seed": 4})},
            ["{}/a", "{}/b"],
            "RUN='{}/a' and '{}/b' are the same run twice (seed 4, the same settings)",
        ),
        (
            {"a": (log([0.0]), {"seed": 0}), "b": (log([0.0]), {"seed": 0, "task": "countdown"})},
            ["{}/a", "{}/b"],
            "RUN='{}/b' and '{}/a' have rewards that are no one scale (task sudoku → countdown). Draw them one by one",
        ),
        (
            {
                "a": (log([0.0], held_out=[(1, 1.0)]), {"seed": 0}),
                "b": (log([0.0], held_out=[(1, 1.0)]), {"seed": 0, "task": "countdown"}),
            },
            ["{}/a", "{}/b", "--metric", "eval_reward"],
            "RUN='{}/b' and '{}/a' have rewards that are no one scale (task sudoku → countdown). Draw them one by one",
        ),
        (
            {"a": (log([0.0], held_out=[(1, 1.0)]), {"seed": 0}), "b": (log([0.0]), {"seed": 1})},
            ["{}/a", "{}/b"],
            "RUN='{}/b' has no 'eval_reward' in its log, which another seed of",
        ),
    ],
)
def test_what_cannot_be_drawn_is_named_with_the_remedy(save, tmp_path, capsys, runs, argv, message):
    for name, entries in runs.items():
        if entries is None:
            (tmp_path / name).mkdir()
        elif isinstance(entries, str):
            (tmp_path / name).mkdir()
            (tmp_path / name / "trainer_state.json").write_text(entries)
        else:
            entries, meaning = entries if isinstance(entries, tuple) else (entries, {})
            save(name, entries, **meaning)
    argv = [*(word.replace("{}", str(tmp_path)) for word in argv), "--output_dir", str(tmp_path / "out")]
    if message is None:  # a field that only one version of the library knows is not compared
        draw(*argv)
    else:
        assert message.replace("{}", str(tmp_path)) in one_line(capsys, *argv)
        assert not (tmp_path / "out").exists()


def test_amounts_are_said_in_units_of_their_size():
    amounts = [
        ("steps", 12.0),
        ("flops", 2.34e12),
        ("flops", 999.0),
        ("time", 90.0),
        ("time", 600.0),
        ("time", 9000.0),
    ]
    said = ["step 12", "2.34 TFLOPs", "999 FLOPs", "90 s", "10 min", "2.5 h"]
    assert [say_amount(*amount) for amount in amounts] == said


def test_a_loss_is_best_where_it_is_smallest(save, tmp_path, capsys):
    path = save("a", [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0))])
    draw(path, "--against", "steps", "--smooth", "1", "--output_dir", str(tmp_path / "out"))
    (row,) = json.loads((tmp_path / "out/curves.json").read_text())["table"]
    assert row["column"] == "loss" and row["best"] == {"mean": 1.0} and row["at"] == {"steps": 2.0}


def test_the_help_of_report_knows_both(capsys):
    for argv, words in (
        (["report", "--help"], ("--model_name_or_path", "report curves RUN")),
        (["report", "curves", "-h"], ("RUN", "--against")),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        printed = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and all(word in printed for word in words)


def test_the_traceback_is_shown_where_it_is_asked_for(tmp_path):
    for argv in (
        ["--debug", "report", "curves", "no"],
        ["report", "--debug", "curves", "no"],
        ["report", "curves", "no", "--debug"],
    ):
        with pytest.raises(ValueError, match="RUN='no' is not a folder"):
            main(argv)
