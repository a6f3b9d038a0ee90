"""Two processes do what one process with twice the batch does: DDP, ZeRO-2 and ZeRO-3, on CPUs with gloo."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers_distributed import run
from helpers_grpo import tiny


HERE = Path(__file__).parent
STEP_MERGE = {"estimator": "step_merge", "num_segments": 4}
LOSS = ("grpo", "dapo", "dr_grpo")
KINDS = {"full": {}, "lora": {"peft": True}}
CHECKPOINTING = {"plain": {}, "checkpointed": {"gradient_checkpointing": True}}

# Rows take different numbers of steps, and processes need different numbers of views and sampler forwards.
RAGGED = {
    "estimator": "exact_trajectory",
    "confidence_threshold": 0.02,
    "block_length": 8,
    "loss_type": "grpo",
}

# Processes depend on each other for more than gradients.
COUPLED = {"exact, ragged": RAGGED, "luspo": {**STEP_MERGE, "loss_type": "luspo"}}


def matrix(losses) -> dict[str, dict]:
    return {
        f"{kind}-{mode}-{loss}": {**KINDS[kind], **CHECKPOINTING[mode], **STEP_MERGE, "loss_type": loss}
        for kind in KINDS
        for mode in CHECKPOINTING
        for loss in losses
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = tiny(num_layers=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """`alone(settings)`: the same run in this process, with the rows of both processes in each micro-batch."""
    cache = {}

    def get(settings: dict) -> dict:
        # DeepSpeed's own way to hand out weights changes nothing in a single process.
        settings = {k: v for k, v in settings.items() if k != "ds3_gather_for_generation"}
        key = json.dumps(settings, sort_keys=True)
        if key not in cache:
            cache[key] = run(tmp_path_factory.mktemp("alone"), checkpoint, per_device_train_batch_size=4, **settings)
        return cache[key]

    return get


def launch(folder: Path, checkpoint: str, runs: dict, deepspeed: dict | None = None, timeout: int = 300) -> list[dict]:
    """Both processes' results of all `runs`, done one after the other by one pair of processes."""
    runs = {name: {**settings, "per_device_train_batch_size": 2} for name, settings in runs.items()}
    path = folder / "settings.json"
    path.write_text(
        json.dumps({"checkpoint": checkpoint, "folder": str(folder), "deepspeed": deepspeed, "runs": runs})
    )
    root = HERE.parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    # --standalone lets torchrun choose a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, str(HERE / "distributed" / "grpo_worker.py"), str(path)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = f"no end after {timeout} s"
    assert code == 0, f"exit {code}\n" + log.read_text()[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def merged(results: list[dict]) -> list:
    """Rollouts of each generation, of all processes, by row seed."""
    return [
        sorted(row for part in parts for row in part)
        for parts in zip(*(result["rollouts"] for result in results), strict=True)
    ]


def check(both: list[dict], alone: dict, name: str, wrapper: str) -> None:
    first, second = both
    assert first["wrapper"] == [wrapper], "not the wrapper that this test is about"
    assert first["loss"] == second["loss"] and len(first["loss"]) == 4
    assert first["rollouts"] != second["rollouts"], "both processes drew the same rows"
    for ours, theirs in zip(merged(both), merged([alone]), strict=True):
        assert len(ours) == len(theirs) == 8
        for (step, seed, canvas, steps, advantage), reference in zip(ours, theirs, strict=True):
            assert [step, seed, canvas, steps] == reference[:4], f"{name}: another rollout in step {step}"
            assert advantage == pytest.approx(reference[4], abs=1e-5)
    needed = [[needed for needed, _ in result["views"]] for result in both]
    run = [[run for _, run in result["views"]] for result in both]
    assert run[0] == run[1] == list(map(max, *needed)), f"{name}: a process runs another number of views"
    assert "exact" not in name or needed[0] != needed[1], "all processes need as many views: nothing was tested"
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-6), name
    # (TRL's `kl` is a mean of micro-batch means, and a shuffle makes other micro-batches on two processes.)
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5), name


def compare_ddp(tmp_path, checkpoint, alone, runs):
    both = launch(tmp_path, checkpoint, runs, timeout=180)
    for name, settings in runs.items():
        check([result[name] for result in both], alone(settings), name, "DistributedDataParallel")
        assert both[0][name]["reductions"] == 4, f"{name}: gradients were reduced {both[0][name]['reductions']} times"


def test_ddp_equals_one_process(tmp_path, checkpoint, alone):
    """Losses, gradient norms and rollouts; and gradients travel once an optimizer step, not once a view."""
    everything = matrix(LOSS)
    names = ("full-plain-grpo", "full-checkpointed-dapo", "lora-plain-dapo", "lora-checkpointed-dr_grpo")
    compare_ddp(tmp_path, checkpoint, alone, {**{name: everything[name] for name in names}, **COUPLED})


def test_two_processes_share_a_reference_an_error_and_their_checkpoints(tmp_path, checkpoint):
    """Files that one of them writes are found by both, and what is not finite on one ends both."""
    resumed = {"do": "run_resumed", **STEP_MERGE}
    runs = {
        "in memory": {"do": "run_in_memory"},
        "broken": {"do": "run_broken", "num_segments": 2},
        "resumed": resumed,
        "resumed, lora": {**resumed, "peft": True, "steps": [1]},
    }
    both = launch(tmp_path, checkpoint, runs, timeout=180)
    for rank, result in enumerate(both):
        assert result["in memory"]["reference"], f"rank {rank} has another reference"
        assert result["in memory"]["kl"][0] == 0 < result["in memory"]["kl"][1]
        broken = result["broken"]
        assert broken["error"].startswith("Step 2: the loss is not finite, in process 1, row 0 ("), broken
        assert "process 0" not in broken["error"] and broken["finite"] and broken["steps"] == 1
        for name in ("resumed", "resumed, lora"):
            assert all(all(same) for same in result[name]["same"]), (rank, name, result[name])
    assert both[0]["resumed"]["flops"] and both[1]["resumed"]["flops"]
    manifest = json.loads((tmp_path / "resumed" / "checkpoint-2" / "manifest.json").read_text())["files"]
    assert {"process_state_0.pt", "process_state_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= manifest.keys()


@pytest.mark.slow
def test_ddp_equals_one_process_in_every_combination(tmp_path, checkpoint, alone):
    compare_ddp(tmp_path, checkpoint, alone, matrix(LOSS))


def zero(stage: int) -> dict:
    return {
        # 0: tiny parameters are partitioned like large ones.
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "bf16": {"enabled": False},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install trl-dllm[deepspeed])"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(tmp_path, checkpoint, alone, stage):
    runs = {**matrix(LOSS), **COUPLED}
    if stage == 3:
        # The sampler runs on partitioned weights: a process that is done must go on answering the other.
        runs["exact, ragged, partitioned sampler"] = {**RAGGED, "ds3_gather_for_generation": False}
        runs["lora, partitioned sampler"] = {**STEP_MERGE, "peft": True, "ds3_gather_for_generation": False}
    both = launch(tmp_path, checkpoint, runs, zero(stage), timeout=300)
    for name, settings in runs.items():
        check([result[name] for result in both], alone(settings), name, "DeepSpeedEngine")
