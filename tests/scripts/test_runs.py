"""Whose run an output_dir holds: another's is never gone on with or written over, and a finished one is complete."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_scripts import DPO, GRPO, SFT, write_recipe
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from trl_dllm.fingerprint import FINGERPRINT, Fingerprint
from trl_dllm.generation.saved import DECODING
from trl_dllm.scripts import dpo, grpo, sft
from trl_dllm.scripts.common import TaskArguments
from trl_dllm.scripts.runs import begin_run
from trl_dllm.trainer.records import RecordingTrainer, is_complete


COMMANDS = {"grpo": (grpo, GRPO), "sft": (sft, SFT), "dpo": (dpo, DPO)}


@pytest.fixture
def model(tmp_path, tiny_checkpoint) -> Path:
    """A tiny model that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def start(command: str, folder: Path, recipe: Path, callbacks=None, **changes):
    """A run of the script of two steps, changed, into `folder`."""
    script, settings = COMMANDS[command]
    settings = {**settings, "output_dir": str(folder), **changes}
    parsed = script.make_parser().parse_args_and_config(["--config", write_recipe(recipe, settings)])
    return script.main(*parsed) if callbacks is None else script.main(*parsed, callbacks=callbacks)


@pytest.fixture
def run(tmp_path, model):
    """`run(command, **changes)`: a run into the folder "run"."""

    def begin(command="grpo", **changes):
        changes.setdefault("model_name_or_path", str(model))
        return start(command, **{"folder": tmp_path / "run", "recipe": tmp_path, **changes})

    return begin


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory, tiny_checkpoint) -> dict[str, Path]:
    folders = {}
    for command in COMMANDS:
        folders[command] = tmp_path_factory.mktemp(command) / "run"
        start(command, folders[command], folders[command].parent, model_name_or_path=tiny_checkpoint)
    return folders


@pytest.fixture
def finished(folder, finished_runs):
    """`finished(command)`: the folder "run", with a run that has ended, or was `killed` before its model was saved."""

    def copy(command="grpo", killed=False) -> Path:
        shutil.copytree(finished_runs[command], folder)
        if killed:
            for path in folder.iterdir():
                if path.is_file() and path.name != "README.md":
                    path.unlink()
        return folder

    return copy


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def no_weights(monkeypatch):
    """`no_weights()`: from now on, loading any weight fails the test."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    return lambda: monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def killed_before_the_model_is_saved(run, monkeypatch, command="grpo", **changes) -> None:
    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordingTrainer, "save_finished", killed)
        run(command, **changes)


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------- another meaning


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("grpo", {"learning_rate": 5e-4}),
        ("grpo", {"estimator": "mean_field", "num_segments": None}),
        ("grpo", {"seed": 1, "resume_from_checkpoint": False}),
        ("grpo", {"reward_funcs": ["cells", "solved"]}),
        ("sft", {"learning_rate": 5e-4}),
        ("sft", {"objective": "any_order", "resume_from_checkpoint": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_a_changed_recipe_is_refused_before_any_weight_is_loaded(
    run, folder, finished, no_weights, command, changes, killed
):
    finished(command, killed)
    before = contents(folder)
    no_weights()
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        run(command, **changes)
    named = [name for name in changes if name != "resume_from_checkpoint"]
    for name in named:
        assert any(line.startswith(f"│ {name} ") for line in str(error.value).splitlines()), error.value
    assert "Choose another output_dir, or pass --start_over true" in str(error.value)
    assert contents(folder) == before


def test_another_model_at_the_same_path_is_another_run(run, finished, model, no_weights):
    finished()
    other = {name: tensor + 1 for name, tensor in weights(model).items()}
    save_file(other, model / "model.safetensors", metadata={"format": "pt"})
    no_weights()
    with pytest.raises(ValueError, match=r"\(weights differ\)"):
        run()


def test_the_same_model_at_another_path_is_the_same_run(run, finished, model, tmp_path, capsys):
    finished()
    model.rename(tmp_path / "moved")
    assert run(model_name_or_path=str(tmp_path / "moved")) is None
    assert "already trained" in capsys.readouterr().out


def test_other_rows_are_another_run(tmp_path, model):
    argv = ["--output_dir", str(tmp_path / "run"), "--model_name_or_path", str(model), "--use_cpu", "--bf16", "false"]
    parsed = sft.make_parser().parse_args_and_config(argv)
    begin_run("sft", *parsed, [{"prompt": "1", "completion": "2"}]).write(tmp_path / "run")
    assert begin_run("sft", *parsed, [{"prompt": "1", "completion": "2"}])
    with pytest.raises(ValueError, match=r"\(rows differ\)"):
        begin_run("sft", *parsed, [{"prompt": "1", "completion": "3"}])


def test_a_run_of_another_command_is_told_by_that_alone(run, finished, no_weights):
    finished("sft")
    no_weights()
    with pytest.raises(ValueError, match=r"holds a run with other settings \(command differ\)"):
        run("grpo")


def test_a_checkpoint_of_another_run_is_refused_wherever_it_lies(run, folder, finished, tmp_path, no_weights):
    finished()
    no_weights()
    with pytest.raises(ValueError, match=r"checkpoint-1 holds a run with other settings \(beta differ\)") as error:
        run(beta=0.1, folder=tmp_path / "other", resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert "Resume from a checkpoint of this run" in str(error.value)


def test_a_run_needs_a_model(run):
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        run(model_name_or_path=None)


# ------------------------------------------------------------------------------------------------------- finished runs


@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_run_is_left_as_it_is(run, folder, finished, no_weights, capsys, command):
    finished(command)
    assert is_complete(folder, Fingerprint.read(folder))
    # DPO hands on what its model came with, which is nothing here.
    assert (folder / DECODING).exists() == (command != "dpo")
    before = contents(folder)
    no_weights()
    assert run(command) is None
    assert f"{folder} is already trained: 2 of 2 steps." in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["killed", "cut", "no word"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_without_its_whole_model_ends_by_saving_it(run, folder, finished, monkeypatch, capsys, command, damage):
    """All steps are taken, and the last checkpoint lies there; no step may be taken again."""
    if damage == "killed":
        killed_before_the_model_is_saved(run, monkeypatch, command)
        assert not (folder / "model.safetensors").exists()
    else:
        finished(command)
    if damage == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "no word":
        (folder / FINGERPRINT).unlink()
    trainer = run(command)
    assert trainer.state.global_step == 2
    assert "All steps are taken: the model is saved from" in capsys.readouterr().out
    assert same(folder, folder / "checkpoint-2") and is_complete(folder, Fingerprint.read(folder))
    assert run(command) is None


def test_a_run_counted_in_epochs_is_finished_too(run, folder, monkeypatch, capsys):
    epochs = {"max_steps": -1, "num_train_epochs": 1, "num_train_examples": 8, "save_strategy": "epoch"}
    killed_before_the_model_is_saved(run, monkeypatch, "sft", **epochs)
    trainer = run("sft", **epochs)
    assert trainer.state.global_step == 2 and same(folder, folder / "checkpoint-2")
    assert run("sft", **epochs) is None
    assert "already trained: 2 of 2 steps" in capsys.readouterr().out
    assert run("sft", **{**epochs, "num_train_epochs": 2}).state.global_step == 4


def test_a_run_that_was_stopped_early_is_finished(run, capsys):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    assert run("sft", callbacks=[Stop()]).state.global_step == 1
    assert run("sft") is None
    assert "already trained: 1 of 2 steps" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the schedule


def test_a_longer_schedule_goes_on_and_is_said(run, folder, capsys):
    run(max_steps=1, lr_scheduler_type="linear")
    capsys.readouterr()
    assert run(max_steps=2, lr_scheduler_type="linear").state.global_step == 2
    printed = capsys.readouterr().out
    line = "The schedule changes: max_steps 1 → 2. The linear learning rate follows the new number of steps."
    assert line in printed.splitlines() and f"Resuming from {folder / 'checkpoint-1'}." in printed
    assert Fingerprint.read(folder).finished["global_step"] == 2


def test_a_shorter_schedule_is_finished_already(run, finished, capsys):
    finished()
    assert run(max_steps=1) is None
    assert "already trained: 2 of 1 steps" in capsys.readouterr().out


def test_how_often_it_saves_and_where_it_logs_may_change(run, capsys):
    run(max_steps=1)
    run(logging_steps=2, save_total_limit=1, gradient_checkpointing=True, dtype="float32")
    assert "logging_steps 1 → 2" in capsys.readouterr().out


def test_another_split_of_a_step_is_the_same_run(run, monkeypatch):
    run(max_steps=1)
    assert run(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=4).state.global_step == 2
    with pytest.raises(ValueError, match="rows_an_optimizer_step"):
        run(per_device_train_batch_size=8)


def test_a_checkpoint_that_says_nothing_is_gone_on_with_and_said(run, folder, monkeypatch, capsys):
    killed_before_the_model_is_saved(run, monkeypatch, max_steps=1)
    checkpoint = folder / "checkpoint-1"  # as from an earlier version
    for file in (checkpoint / FINGERPRINT, checkpoint / "manifest.json", *checkpoint.glob("process_state*")):
        file.unlink()
    run(seed=1)
    assert f"checkpoint-1 has no {FINGERPRINT}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- start over


def test_start_over_moves_the_run_aside_and_trains_anew(run, folder, finished, capsys):
    finished()
    (folder / "notes.txt").write_text("mine")
    old = weights(folder)
    trainer = run(seed=1, start_over=True, max_steps=1)
    assert trainer.state.global_step == 1
    aside = folder / "_replaced-1"
    assert f"What {folder} held is in {aside}." in capsys.readouterr().out
    assert sorted(path.name for path in aside.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(torch.equal(value, weights(aside)[name]) for name, value in old.items())
    assert Fingerprint.read(aside).meaning["seed"] == 42 and Fingerprint.read(folder).meaning["seed"] == 1
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "checkpoint-2").exists()
    run(seed=2, start_over=True, max_steps=1)
    assert Fingerprint.read(folder / "_replaced-2").meaning["seed"] == 1
    assert run(seed=2, max_steps=1) is None


def test_start_over_in_an_empty_folder_is_a_run(run, folder):
    assert run(start_over=True, max_steps=1).state.global_step == 1
    assert not list(folder.glob("_replaced-*"))


def test_start_over_contradicts_a_checkpoint_and_its_own_model(run, folder, finished, model):
    finished()
    before = contents(folder)
    with pytest.raises(ValueError, match=r"start_over=True and resume_from_checkpoint='.*checkpoint-1' contradict"):
        run(start_over=True, resume_from_checkpoint=str(folder / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"start_over=True: output_dir='.*model' is the model to start from"):
        run(start_over=True, folder=model)
    assert contents(folder) == before and (model / "model.safetensors").exists()


def test_the_flag_is_documented():
    assert "start_over" in TaskArguments.__doc__
    argv = ["--output_dir", "x", "--use_cpu", "--bf16", "false", "--start_over", "true"]
    assert grpo.make_parser().parse_args_and_config(argv)[0].start_over is True


# ------------------------------------------------------------------------------------------------------- two processes


def test_hashing_is_left_to_the_first_process(tmp_path, model, monkeypatch):
    """A second process gets what the first found, and reads no weights itself."""
    argv = ["--output_dir", str(tmp_path / "run"), "--model_name_or_path", str(model), "--use_cpu", "--bf16", "false"]
    parsed = sft.make_parser().parse_args_and_config(argv)
    done = []
    monkeypatch.setattr("trl_dllm.scripts.runs.on_main_process", lambda compute: done.append(compute) or "the first's")
    monkeypatch.setattr("trl_dllm.scripts.runs.model_identity", lambda *args: pytest.fail("hashed"))
    assert begin_run("sft", *parsed, []) == "the first's" and len(done) == 1


@pytest.mark.slow
def test_two_processes_agree_on_whose_run_it_is(tmp_path, model, folder):
    """Trained by two, finished for one that takes all rows at once, and refused by both without one waiting."""
    settings = {**GRPO, "model_name_or_path": str(model), "output_dir": str(folder), "max_steps": 1}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}

    def launched(processes: int, **changes) -> subprocess.CompletedProcess:
        argv = [str(processes), grpo.__file__, "--config", write_recipe(tmp_path, {**settings, **changes})]
        return subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True, timeout=300)

    assert "Model saved to" in launched(2).stdout
    again = launched(1, per_device_train_batch_size=8)
    assert f"{folder} is already trained: 1 of 1 steps." in again.stdout and again.returncode == 0
    refused = launched(2, learning_rate=5e-4)
    assert refused.returncode != 0
    line = f"trl-dllm grpo: {folder} holds a run with other settings (learning_rate differ)"
    assert refused.stderr.count(line) == 1, "said by one process for both"


def test_no_secret_is_written(run, folder):
    run(hub_token="hf_secret", max_steps=1)
    for path in [folder / FINGERPRINT, folder / "checkpoint-1" / FINGERPRINT, folder / DECODING]:
        assert "hf_secret" not in path.read_text()
    assert json.loads((folder / FINGERPRINT).read_text())["meaning"]["task"] == "sudoku"
