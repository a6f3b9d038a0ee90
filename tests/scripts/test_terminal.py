"""What a training command prints: five numbers a log, and what came of the run; all the rest goes where it went."""

import json
import re
from types import SimpleNamespace

import pytest
from helpers_scripts import DPO, GRPO, SFT, write_recipe
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from trl_dllm.scripts import dpo, grpo, sft
from trl_dllm.scripts.terminal import StepLines, StepLinesOfBar, log_line, print_summary, shorten_log, summary


STATE = TrainerState(global_step=7, max_steps=45)
LOGGED = {
    "reward": 0.5469, "reward_std": 0.49881, "entropy": 0.2592, "completions/mean_length": 17.0, "grad_norm": 0.08745,
    "loss": 0.0, "learning_rate": 1e-5, "flops": 6e11, "step_time": 3.2, "epoch": 0.02,
}  # fmt: skip


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (LOGGED, "step  7/45  reward 0.5469 ± 0.4988  entropy 0.2592  length 17  grad norm 0.08745  2.5 s/step"),
        (
            {**LOGGED, "kl": 0.00123},
            "step  7/45  reward 0.5469 ± 0.4988  kl 0.00123  length 17  grad norm 0.08745  2.5 s/step",
        ),
        (
            {**LOGGED, "reward": None},
            "step  7/45  reward – ± 0.4988  entropy 0.2592  length 17  grad norm 0.08745  2.5 s/step",
        ),
        (
            {"eval_reward": 0.25, "eval_reward_std": 0.5, "eval_completions/mean_length": 9.5, "eval_runtime": 12.345},
            "step  7/45  held out  reward 0.25 ± 0.5  length 9.5  12.3 s",
        ),
        (
            {"loss": 1.25, "entropy": 3.0, "learning_rate": 3e-6, "grad_norm": 0.5, "masked_fraction": 0.4},
            "step  7/45  loss 1.25  entropy 3  lr 3e-06  grad norm 0.5  2.5 s/step",
        ),
        (
            {"loss": 0.6, "rewards/accuracies": 0.75, "rewards/margins": 0.1, "entropy": 1.0, "grad_norm": 2.0},
            "step  7/45  loss 0.6  accuracy 0.75  margin 0.1  grad norm 2  2.5 s/step",
        ),
        ({"eval_reward": 0.25}, "step  7/45  held out  reward 0.25"),
        ({"mine": 3.0, "epoch": 0.1}, "step  7/45  mine 3  2.5 s/step"),
        ({"train_runtime": 163.1, "train_loss": 0.1}, None),
    ],
)
def test_a_log_is_a_line_of_five_numbers(logs, line):
    assert log_line(logs, STATE, 2.5) == line


def test_seconds_a_step_are_the_mean_of_the_steps_since_the_last_log(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    lines, state = StepLines(), TrainerState(global_step=7, max_steps=45, is_world_process_zero=True)
    for steps in ((1.0, 3.0), (4.0,), ()):
        for seconds in steps:
            lines.on_step_begin(None, state, None)
            clock[0] += seconds
            lines.on_step_end(None, state, None)
            clock[0] += 100.0  # between two steps
        lines.on_log(None, state, None, logs={"mine": 0})
    assert capsys.readouterr().out.splitlines() == [
        f"step  7/45  mine 0{end}" for end in ("  2 s/step", "  4 s/step", "")
    ]


class Recorder(TrainerCallback):
    """As an integration of `report_to`."""

    def __init__(self):
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def train(tmp_path, tiny_checkpoint):
    """`train(script, recipe, …)`: a run of two steps, and what a callback was told of it."""

    def train(script, recipe, *argv, **changes):
        settings = {**recipe, "model_name_or_path": tiny_checkpoint, "output_dir": str(tmp_path / "run"), **changes}
        parsed = script.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, settings), *argv])
        return script.main(*parsed, callbacks=[recorder := Recorder()]), recorder.logs

    return train


def test_grpo_prints_lines_and_a_summary_and_logs_everything(train, tmp_path, capsys):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "num_eval_examples": 2, "per_device_eval_batch_size": 8}
    trainer, logs = train(grpo, GRPO, **evaluation)
    printed = capsys.readouterr().out
    rest = r"reward \S+ ± \S+  entropy \S+  length \S+"
    assert len(re.findall(rf"^step [12]/2  {rest}  grad norm \S+  \S+ s/step$", printed, re.M)) == 2
    assert len(re.findall(rf"^step [12]/2  held out  {rest}  \S+ s$", printed, re.M)) == 2
    assert "{" not in printed.replace("--task_kwargs", "") and "clip_ratio" not in printed
    assert [set(entry) | {"step"} for entry in logs] == [set(entry) for entry in trainer.state.log_history]
    assert {"reward", "flops", "clip_ratio/low_mean", "profile/rest_seconds", "num_tokens"} <= set(logs[0])
    said = dict(re.findall(r"^(\w[\w -]*?)  +(.+)$", printed[printed.index("Model saved to") :], re.M))
    folder = tmp_path / "run"
    assert said["trained"].startswith("step 2 of 2, ") and said["model"] == str(folder)
    first, second = (entry["reward"] for entry in logs if "reward" in entry)
    assert said["reward"] == f"{first:.3g} → {second:.3g} (first and last logged)"
    held = [entry["eval_reward"] for entry in logs if "eval_reward" in entry]
    assert said["held-out reward"].startswith(f"{held[0]:.3g} (step 1) → {held[1]:.3g} (step 2); best {max(held):.3g}")
    assert said["next"] == f"trl-dllm eval --model_name_or_path {folder} --task sudoku --output_dir {folder / 'eval'}"
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"] == trainer.state.log_history


@pytest.mark.parametrize(("script", "recipe", "number"), [(sft, SFT, "lr"), (dpo, DPO, "margin")])
def test_sft_and_dpo_have_lines_of_their_own(train, capsys, script, recipe, number):
    train(script, recipe)
    printed = capsys.readouterr().out
    assert len(re.findall(rf"^step [12]/2  loss \S+  .*{number} \S+  grad norm \S+  \S+ s/step$", printed, re.M)) == 2
    assert re.search(r"^best checkpoint +unknown: nothing was evaluated \(eval_strategy: steps\)$", printed, re.M)


def test_all_metrics_are_printed_where_it_is_asked_for(train, capsys):
    train(sft, SFT, "--print_all_metrics", "true")
    printed = capsys.readouterr().out
    assert "'masked_fraction': " in printed and "s/step" not in printed and "\ntrained " in printed


class Mine(ProgressCallback):
    pass


def test_what_transformers_put_there_is_replaced_and_nothing_else():
    mine, other = Mine(), Recorder()
    callbacks = [other, ProgressCallback(), mine, PrinterCallback()]
    shorten_log(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks)))
    assert callbacks[0] is other and callbacks[2] is mine
    assert type(callbacks[1]) is StepLinesOfBar and type(callbacks[3]) is StepLines


def test_a_bar_stays_and_lines_stand_above_it(train, capsys):
    train(sft, SFT, disable_tqdm=False)
    printed = capsys.readouterr()
    assert "2/2 [" in printed.err and len(re.findall(r"^step [12]/2  loss", printed.out, re.M)) == 2


def finished(tmp_path, log, main=True, best=None, task="sudoku", **args):
    """A trainer whose run is over, as far as its summary asks."""
    state = TrainerState(global_step=len(log), max_steps=99, log_history=log, **(best or {}))
    defaults = {"output_dir": str(tmp_path), "metric_for_best_model": None, "load_best_model_at_end": False}
    trainer = SimpleNamespace(state=state, fingerprint=None, model=args.pop("model", object()))
    trainer.args, trainer.is_world_process_zero = SimpleNamespace(**{**defaults, **args}), lambda: main
    return trainer, SimpleNamespace(task=task, task_kwargs={"min_blanks": 6} if task else None, data_dir=None)


def history(steps: int, evaluated=()) -> list[dict]:
    log = [{"step": step, "reward": step / 10, "flops": 1e9 * step} for step in range(1, steps + 1)]
    return log + [{"step": step, "eval_reward": value} for step, value in evaluated]


def test_the_summary_says_the_best_checkpoint_that_is_there(tmp_path):
    for step in (2, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    evaluated = ((2, 0.5), (4, 0.75), (6, 0.25))
    rows = dict(summary(*finished(tmp_path, history(6, evaluated))))
    assert rows["held-out reward"] == "0.5 (step 2) → 0.25 (step 6); best 0.75 (step 4)"
    assert rows["best checkpoint"] == f"{tmp_path / 'checkpoint-2'} (held-out reward 0.5)"
    assert rows["reward"] == "0.2 → 0.5 (means of the first and the last 3 logged)" and "figure" not in rows
    rows = dict(summary(*finished(tmp_path, history(6, [(3, 0.5)]))))
    assert rows["best checkpoint"].startswith("unknown: none is of an evaluated step (save_steps:")
    best = {"best_model_checkpoint": "there", "best_metric": 0.625}
    named = {"metric_for_best_model": "eval_reward", "load_best_model_at_end": True}
    rows = dict(summary(*finished(tmp_path, history(6, evaluated), best=best, **named)))
    assert rows["best checkpoint"] == "there (eval_reward 0.625; it was loaded at the end, and is the model)"


def test_the_next_command_names_task_adapter_and_base(tmp_path):
    class Adapted:
        peft_config = {"default": SimpleNamespace(base_model_name_or_path="a base")}  # noqa: RUF012

    *_, (name, command), (_, generate) = summary(*finished(tmp_path / "a b", history(2), model=Adapted()))
    model = f"--model_name_or_path 'a base' --adapter '{tmp_path}/a b'"
    kwargs = """--task_kwargs '{"min_blanks": 6}'"""
    assert (name, command) == (
        "next",
        f"trl-dllm eval {model} --task sudoku {kwargs} --output_dir '{tmp_path}/a b/eval'",
    )
    assert generate == f'trl-dllm generate {model} --prompt "…"'
    trainer, script_args = finished(tmp_path, history(2))
    script_args.data_dir = "my data"
    assert (
        "--task_kwargs '{\"min_blanks\": 6}' --data_dir 'my data' --output_dir"
        in dict(summary(trainer, script_args))["next"]
    )
    *_, last = summary(*finished(tmp_path, history(2), task=None))
    assert last == ("next", f'trl-dllm generate --model_name_or_path {tmp_path} --prompt "…"')


def test_curves_are_drawn_of_runs_that_have_some(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'trl-dllm[plots]'")
    assert "figure" not in dict(summary(*finished(tmp_path, history(9))))
    assert dict(summary(*finished(tmp_path, history(10))))["figure"] == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_summary_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install 'trl-dllm[plots]'" in dict(summary(*finished(tmp_path, history(10))))["figure"]


def test_the_summary_is_plain_where_nobody_looks_and_said_once(tmp_path, capsys, monkeypatch):
    long = tmp_path / ("a" * 90)
    print_summary(*finished(long, history(2)))
    printed = capsys.readouterr().out
    assert f"model            {long}\n" in printed and "\x1b" not in printed
    monkeypatch.setenv("FORCE_COLOR", "1"), monkeypatch.setenv("COLUMNS", "80")
    print_summary(*finished(long, history(2)))
    assert "\x1b[1m" in capsys.readouterr().out
    print_summary(*finished(long, history(2), main=False))
    assert capsys.readouterr().out == ""
