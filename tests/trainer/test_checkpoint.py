"""Which checkpoints are complete, how a save that is cut off leaves the folder, and what a changed run takes up."""

import json
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from helpers_grpo import build, history, losses, weights

from trl_dllm.models import FlopsCounter
from trl_dllm.trainer.checkpoint import find_checkpoint, find_defect, load_process_states


# Every optimizer step is saved; a generation cycle has two of them.
SETTINGS = {"num_iterations": 2, "max_steps": 4, "num_segments": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder and trainer. Copied, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = build(folder, **SETTINGS)
    trainer.train()
    return folder, trainer


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path) -> None:
    """Leave the first half of a file, as a full disk does."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


# ----------------------------------------------------------------------------------------------------- completeness


def test_a_manifest_names_every_file_but_the_two_written_behind_it(finished):
    for folder in finished[0].glob("checkpoint-*"):
        assert find_defect(folder) is None
        files = {path.name for path in folder.iterdir()} - {"manifest.json", "trainer_state.json"}
        assert json.loads((folder / "manifest.json").read_text())["files"].keys() == files
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "process_state_0.pt"} <= files


def test_a_checkpoint_without_any_one_of_its_files_is_not_complete(run_dir):
    folder = run_dir / "checkpoint-2"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        cut(path)
        assert path.name in find_defect(folder), path.name
        path.unlink()
        assert path.name in find_defect(folder), path.name
        path.write_bytes(content)
        assert find_defect(folder) is None


def test_a_stock_checkpoint_needs_a_readable_trainer_state_and_weights(run_dir):
    folder = run_dir / "checkpoint-2"
    (folder / "manifest.json").unlink()
    (folder / "process_state_0.pt").unlink()
    assert find_defect(folder) is None
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert find_defect(folder) is None
    (folder / "adapter_model.safetensors").unlink()
    assert find_defect(folder) == "its weights are missing"
    (folder / "global_step2").mkdir()
    assert find_defect(folder) is None
    cut(folder / "trainer_state.json")
    assert find_defect(folder) == "trainer_state.json is missing or cut off"
    assert find_defect(run_dir / "checkpoint-9") == "there is no such folder"


def test_a_checkpoint_without_its_optimizer_on_purpose_is_complete(tmp_path):
    build(tmp_path, **{**SETTINGS, "max_steps": 1}, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1" / "manifest.json").exists()
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-1")


def test_the_newest_complete_checkpoint_is_found(run_dir, recwarn):
    assert find_checkpoint(True, run_dir) == str(run_dir / "checkpoint-4") and not recwarn
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-10")
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-best")
    assert find_checkpoint(True, run_dir) == str(run_dir / "checkpoint-10"), "steps are numbers"
    assert find_checkpoint(None, run_dir) is None and find_checkpoint(False, run_dir) is None
    assert find_checkpoint(True, run_dir / "nowhere") is None and not recwarn
    for step in (1, 2, 3, 4, 10):
        cut(run_dir / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"checkpoint-10 \(optimizer.pt has .*None of the others is complete"):
        assert find_checkpoint(True, run_dir) is None


# ------------------------------------------------------------------------------------------------ a save is cut off


class CutOff(Exception):
    """Stands for a kill."""


def _cut_off_torch_save(name):
    def install(monkeypatch, leave):
        save = torch.save

        def saving(state, file, *args, **kwargs):
            save(state, file, *args, **kwargs)
            if os.path.basename(file) == name and "checkpoint-3" in str(file):
                leave(Path(file))
                raise CutOff

        monkeypatch.setattr(torch, "save", saving)

    return install


def _cut_off_weights(monkeypatch, leave):
    save = safetensors.torch.save_file

    def saving(tensors, file, *args, **kwargs):
        save(tensors, file, *args, **kwargs)
        if "checkpoint-3" in str(file):
            leave(Path(file))
            raise CutOff

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", saving)


def _cut_off_manifest(monkeypatch, leave):
    write = Path.write_text

    def writing(path, text, *args, **kwargs):
        write(path, text, *args, **kwargs)
        if path.name == "manifest.json" and "checkpoint-3" in str(path):
            leave(path)
            raise CutOff

    monkeypatch.setattr(Path, "write_text", writing)


def _cut_off_trainer_state(monkeypatch, leave):
    save = transformers.TrainerState.save_to_json

    def saving(state, path):
        save(state, path)
        if "checkpoint-3" in path:
            leave(Path(path))
            raise CutOff

    monkeypatch.setattr(transformers.TrainerState, "save_to_json", saving)


STAGES = {
    "weights": _cut_off_weights,
    "arguments": _cut_off_torch_save("training_args.bin"),
    "optimizer": _cut_off_torch_save("optimizer.pt"),
    "scheduler": _cut_off_torch_save("scheduler.pt"),
    "random state": _cut_off_torch_save("rng_state.pth"),
    "process state": _cut_off_torch_save("process_state_0.pt"),
    "manifest": _cut_off_manifest,
    "trainer state": _cut_off_trainer_state,
}


@pytest.mark.parametrize("stage, again", [(s, False) for s in STAGES] + [(s, True) for s in list(STAGES)[:-1]])
def test_a_run_goes_on_from_before_a_save_that_was_cut_off(finished, run_dir, monkeypatch, stage, again):
    """In the middle of a file; and behind one, where the same step had been saved before: then every file is there,
    as long as it should be, and they are of two runs."""
    whole = finished[1]
    shutil.rmtree(run_dir / "checkpoint-4")
    if not again:
        shutil.rmtree(run_dir / "checkpoint-3")
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        STAGES[stage](patch, (lambda path: None) if again else cut)
        build(run_dir, **SETTINGS).train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    assert (run_dir / "checkpoint-3").is_dir(), "nothing was tested"
    resumed = build(run_dir, **SETTINGS)
    with pytest.warns(UserWarning, match=r"checkpoint-3 \(.*The run goes on from checkpoint-2"):
        resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(whole) and resumed.flops == whole.flops
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert find_checkpoint(True, run_dir) == str(run_dir / "checkpoint-4")


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(finished, run_dir):
    """The limit on a file's size stands for the disk's: the system's own write fails half-way through a file."""
    for step in (2, 3, 4):
        shutil.rmtree(run_dir / f"checkpoint-{step}")
    weights_size, optimizer_size = (
        (run_dir / "checkpoint-1" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")
    )
    assert weights_size < optimizer_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = build(run_dir, **SETTINGS)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((weights_size + optimizer_size) // 2, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            run.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (run_dir / "checkpoint-2" / "model.safetensors").stat().st_size == weights_size
    resumed = build(run_dir, **SETTINGS)
    with pytest.warns(UserWarning, match=r"checkpoint-2 \(.*The run goes on from checkpoint-1"):
        resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(finished[1])


def test_complete_checkpoints_are_not_deleted_for_incomplete_ones(run_dir):
    """Trainer would keep checkpoint-9, the newest, which is cut off, and delete the one that it has just saved."""
    for step in (2, 4):
        shutil.rmtree(run_dir / f"checkpoint-{step}")
    (run_dir / "checkpoint-3").rename(run_dir / "checkpoint-9")
    (run_dir / "checkpoint-9" / "trainer_state.json").unlink()
    later = time.time() + 100  # Trainer goes by the time of change, and by the number where times are near each other
    os.utime(run_dir / "checkpoint-9", (later, later))
    resumed = build(run_dir, **{**SETTINGS, "max_steps": 2}, save_total_limit=1)
    with pytest.warns(UserWarning, match=r"checkpoint-9 \("):
        resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_defect(run_dir / "checkpoint-2") is None


def test_incomplete_checkpoints_are_left_alone_where_nothing_is_deleted(run_dir):
    cut(run_dir / "checkpoint-2" / "optimizer.pt")
    resumed = build(run_dir, **{**SETTINGS, "max_steps": 5})
    resumed.train(resume_from_checkpoint=True)
    assert len(list(run_dir.glob("checkpoint-*"))) == 5 and find_defect(run_dir / "checkpoint-2")


# --------------------------------------------------------------------------------------------- what a run takes up


def make_stock(folder: Path) -> None:
    """The checkpoint as an older version, or stock TRL, would have saved it."""
    (folder / "manifest.json").unlink()
    (folder / "process_state_0.pt").unlink()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_iterations": 4}, "num_iterations=2, now 4"),
        ({"num_generations": 2}, "num_generations=4, now 2"),
        ({"beta": 0.04}, "scores_reference=False, now True"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 4, "per_device_train_batch_size": 2},
            "per_device_train_batch_size=4, now 2; gradient_accumulation_steps=2, now 4; steps_per_gen",
        ),
        ({}, None),
    ],
)
def test_a_buffer_that_does_not_fit_is_drawn_anew_for_the_rest_of_the_cycle(run_dir, changes, reason):
    """And the next cycle begins where the sampler's does, which repeats each prompt for a whole cycle."""
    folder = run_dir / "checkpoint-1"
    if reason is None:
        make_stock(folder)
        reason = "holds no generation buffer"
    trainer, drawn = build(run_dir, **{**SETTINGS, **changes}), []
    generate = trainer._generate_single_turn

    def generating(*args, **kwargs):
        drawn.append(trainer._step)
        return generate(*args, **kwargs)

    trainer._generate_single_turn = generating
    with pytest.warns(UserWarning, match=f"lies inside a generation cycle and .*{reason}.*drawn anew"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 4 and torch.tensor(losses(trainer)).isfinite().all()
    accumulation, cycle = trainer.args.gradient_accumulation_steps, trainer._cycle
    assert drawn == [accumulation, *range(cycle, 4 * accumulation, cycle)]


def test_a_stock_checkpoint_at_a_cycle_boundary_resumes_exactly(finished, run_dir, recwarn):
    make_stock(run_dir / "checkpoint-2")
    resumed = build(run_dir, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    assert losses(resumed) == losses(finished[1]) and losses(resumed, "reward") == losses(finished[1], "reward")
    assert not [w for w in recwarn if issubclass(w.category, UserWarning) and "cycle" in str(w.message)]


@pytest.mark.parametrize("now", [1, 2, 3, 6])
def test_no_operation_is_lost_or_counted_twice_when_the_number_of_processes_changes(tmp_path, now):
    large = 2**70  # more than fits into 64 bits, which a long run at 8B reaches
    for process in range(3):
        state = {"num_processes": 3, "flops": FlopsCounter(large + process, process).state_dict(), "of": process}
        torch.save(state, tmp_path / f"process_state_{process}.pt")
    total, own = 0, {}
    for process in range(now):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(
                process_index=process, num_processes=now, gather=lambda tensor: tensor, device=torch.device("cpu")
            ),
            _metrics={},
            args=SimpleNamespace(device="cpu"),
        )
        if now == 3:  # then what was logged is taken up as well
            state = torch.load(tmp_path / f"process_state_{process}.pt")
            window = {"metrics": {}, "loss": torch.tensor(2.0), "last_logged": 7}
            torch.save({**state, **window}, tmp_path / f"process_state_{process}.pt")
            trainer._total_loss_scalar = 0.0
        states = load_process_states(trainer, tmp_path)
        total += sum(state["flops"]["counted"] for state in states)
        own[process] = states[0]["of"] if states else None
        assert now != 3 or (trainer._tr_loss, trainer._globalstep_last_logged) == (2.0, 7)
    assert total == 3 * large + 3
    assert own == {process: process if process < 3 else None for process in range(now)}
