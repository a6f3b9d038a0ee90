"""Two processes do what one process with twice the batch does: DDP, ZeRO-2, ZeRO-3 and FSDP2, on CPUs with gloo."""

import itertools
import json
import os
from itertools import product

import pytest
import torch
from helpers_distributed import BACKENDS, launch, needs, run, run_rows, save_short, save_tiny

from trl_dllm.likelihood import ESTIMATORS
from trl_dllm.trainer.loss import LOSSES


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
COUPLED = {
    "exact, ragged": RAGGED,
    "luspo": {**STEP_MERGE, "loss_type": "luspo"},
    # One micro-batch an optimizer step: the metric is one mean over the tokens of both processes.
    "full KL": {**STEP_MERGE, "loss_type": "grpo", "kl_estimator": "full", "gradient_accumulation_steps": 1},
    # A group is spread over the processes, and so is the smaller one of the evaluation.
    "wd1": {
        **STEP_MERGE,
        "loss_type": "wd1",
        "beta": 0.0,
        "num_generations": 8,
        "num_generations_eval": 4,
        "evaluate": True,
    },
    "a model with an adapter": {"estimator": "mean_field", "loss_type": "grpo", "adapted": True},
    "spg": {
        "estimator": "spg",
        "estimator_kwargs": {"block_length": 4, "p_mask_clean": 0.2},
        "ratio_denominator": "current",
        "loss_type": "dapo",
        "beta": 0.0,
    },
}


def matrix(losses) -> dict[str, dict]:
    return {
        f"{kind}-{mode}-{loss}": {**KINDS[kind], **CHECKPOINTING[mode], **STEP_MERGE, "loss_type": loss}
        for kind in KINDS
        for mode in CHECKPOINTING
        for loss in losses
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"), num_layers=2)


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """`alone(settings)`: the same run in this process, with the rows of both processes in each micro-batch."""
    cache = {}

    def get(settings: dict) -> dict:
        # DeepSpeed's own way to hand out weights changes nothing in a single process.
        settings = {k: v for k, v in settings.items() if k != "ds3_gather_for_generation"}
        key = json.dumps(settings, sort_keys=True)
        if key not in cache:
            settings = {"checkpoint": checkpoint, "per_device_train_batch_size": 4, **settings}
            cache[key] = run(tmp_path_factory.mktemp("alone"), **settings)
        return cache[key]

    return get


def merged(results: list[dict]) -> list:
    """Rollouts of each generation, of all processes, by row seed."""
    return [
        sorted(row for part in parts for row in part)
        for parts in zip(*(result["rollouts"] for result in results), strict=True)
    ]


def same_rollouts(both: list[dict], alone: dict, name: str) -> None:
    for ours, theirs in zip(merged(both), merged([alone]), strict=True):
        assert len(ours) == len(theirs) > 0
        for (step, seed, canvas, steps, advantage), reference in zip(ours, theirs, strict=True):
            assert [step, seed, canvas, steps] == reference[:4], f"{name}: another rollout in step {step}"
            assert advantage == pytest.approx(reference[4], abs=1e-5)


def check(both: list[dict], alone: dict, name: str, wrapper: str) -> None:
    first, second = both
    assert first["wrapper"][0].startswith(wrapper), "not the wrapper that this test is about"
    assert first["loss"] == second["loss"] and len(first["loss"]) == 4
    assert first["eval"] == second["eval"] == pytest.approx(alone["eval"], abs=1e-6)
    assert first["rollouts"] != second["rollouts"], "both processes drew the same rows"
    same_rollouts(both, alone, name)
    needed = [[needed for needed, _ in result["views"]] for result in both]
    run = [[run for _, run in result["views"]] for result in both]
    assert run[0] == run[1] == list(map(max, *needed)), f"{name}: a process runs another number of views"
    assert "exact" not in name or needed[0] != needed[1], "all processes need as many views: nothing was tested"
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6, abs=1e-6), name
    # (TRL's `kl` is a mean of micro-batch means, and a shuffle makes other micro-batches on two processes.)
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5), name
    if name == "full KL":
        assert first["kl"] == second["kl"] == pytest.approx(alone["kl"], abs=1e-6)
        assert first["kl"][0] == 0 < first["kl"][1]
    if name.startswith(
        "a model with an adapter"
    ):  # its reference is a copy of that adapter, and not the model without
        assert abs(first["kl"][0]) < 1e-6 < first["kl"][1]
    if name == "wd1":
        assert len(first["eval"]) == 2 and first["eval"]["eval_loss"] != 0


def compare_ddp(tmp_path, checkpoint, alone, runs):
    both = launch(tmp_path, checkpoint, runs, timeout=180)
    for name, settings in runs.items():
        check([result[name] for result in both], alone(settings), name, "DistributedDataParallel")
        steps = both[0][name]["reductions"]
        assert steps == 4, f"{name}: gradients were reduced {steps} times"


def test_ddp_equals_one_process(tmp_path, checkpoint, alone):
    """Losses, gradient norms and rollouts; and gradients travel once an optimizer step, not once a view."""
    everything = matrix(LOSS)
    names = ("full-plain-grpo", "full-checkpointed-dapo", "lora-plain-dapo", "lora-checkpointed-dr_grpo")
    compare_ddp(tmp_path, checkpoint, alone, {**{name: everything[name] for name in names}, **COUPLED})


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_update_of_two_processes_is_the_plain_one(tmp_path):
    """As `test_old_and_reference.py` has it of one: every loss, with other rows and numbers of forwards on each."""
    views = {"num_segments": 4, "p_mask_prompt": 0.15}
    runs = {loss: {**views, "loss_type": loss} for loss in LOSSES}
    two_streams = {"estimator": "any_order", "decoding": "any_order", "cache": "exact", "beta": 0.04}
    runs |= {f"{loss}, any-order": {**two_streams, "loss_type": loss} for loss in ("grpo", "luspo", "vespo")}
    described = {
        f"{name}, plain={plain}": {"do": "run_update", "plain": plain, **settings}
        for name, settings in runs.items()
        for plain in (False, True)
    }
    both = launch(tmp_path, save_short(tmp_path / "checkpoint"), described, timeout=180)
    uneven = 0
    for name in runs:
        ours, plain = ([result[f"{name}, plain={plain}"] for result in both] for plain in (False, True))
        uneven += ours[0]["rows"] != ours[1]["rows"]
        for mine, expected in zip(ours, plain, strict=True):
            assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-12), name
        assert sum(result["rows"] for result in ours) < sum(result["rows"] for result in plain)
        for mine, expected in zip(*(torch.load(part[0]["gradients"]) for part in (ours, plain)), strict=True):
            largest = max(value.abs().max() for value in expected.values())
            assert largest > 1e-4, name
            assert max((mine[key] - expected[key]).abs().max() for key in mine) < 1e-6 * largest, name
    assert uneven > 0, "both processes run as many rows: nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3", "fsdp2"])
def test_sharding_equals_one_process(tmp_path, checkpoint, alone, backend):
    needs(backend)
    settings, wrapper = BACKENDS[backend]
    runs = {**matrix(("dapo",)), **COUPLED}
    runs["a model with an adapter, full KL"] = {**runs["a model with an adapter"], "kl_estimator": "full"}
    if backend == "zero3":
        # The sampler runs on partitioned weights: a process that is done must go on answering the other.
        runs["exact, ragged, partitioned sampler"] = {**RAGGED, "ds3_gather_for_generation": False}
        runs["lora, partitioned sampler"] = {**STEP_MERGE, "peft": True, "ds3_gather_for_generation": False}
    both = launch(tmp_path, checkpoint, runs, settings, timeout=300)
    for name, described in runs.items():
        check([result[name] for result in both], alone(described), name, wrapper)


# --------------------------------------------------------------------------------- sharding x adapter x estimator x KL

ESTIMATOR_SETTINGS: dict[str, dict] = {
    "mean_field": {},
    "step_merge": {"num_segments": 4},
    "exact_trajectory": {"confidence_threshold": 0.02, "block_length": 8},
    "agrpo": {"estimator_kwargs": {"num_steps": 3}},
    "any_order": {"decoding": "any_order", "cache": "exact"},
    "pkl": {},
    "pkl_u": {"estimator_kwargs": {"block_size": 3, "num_views": "partition"}},
    "pkl_t": {"decoding": "any_order"},
    "elbo": {},
    "coupled_elbo": {},
    "spg": {"estimator_kwargs": {"block_length": 4}, "ratio_denominator": "current", "beta": 0.0},
}
ADAPTERS = {"full": {}, "lora": {"peft": True}, "qlora": {"peft": True, "quantized": "uint8"}}
EVERYTHING = os.environ.get("TRL_DLLM_SHARDING") == "all"


def combinations() -> list[tuple[str, str, str, str]]:
    """(back-end, adapter, estimator, KL): all of them, or few that hold every pair that there is."""
    everything = list(product(BACKENDS, ADAPTERS, ESTIMATORS, ("k3", "full")))
    everything = [case for case in everything if case[2:] != ("spg", "full")]  # which takes no KL
    if EVERYTHING:
        return everything
    pairs = {case: {frozenset(pair) for pair in itertools.combinations(enumerate(case), 2)} for case in everything}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(everything, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A float64 model, a float32 one and one that is wide enough for 4-bit blocks."""
    kinds = {
        "float64": {"dtype": torch.float64, "num_layers": 2},
        "float32": {"num_layers": 2},
        "wide": {"hidden_size": 64},
    }
    return {name: save_tiny(tmp_path_factory.mktemp(name), **kwargs) for name, kwargs in kinds.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800 if EVERYTHING else 600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_equals_one_process(tmp_path, checkpoints, alone, backend):
    """Loss, gradient norm and final weights, of processes with different numbers of views and of head tiles."""
    needs(backend)
    runs, double = {}, {}
    for name, adapter, estimator, kl in combinations():
        if name == backend:
            exact = backend in ("ddp", "fsdp2") and adapter != "qlora"
            kind = "float64" if exact else "wide" if adapter == "qlora" else "float32"
            case = f"{adapter}, {estimator}, {kl}"
            double[case] = exact
            runs[case] = {
                **ADAPTERS[adapter],
                **ESTIMATOR_SETTINGS[estimator],
                "estimator": estimator,
                "kl_estimator": kl,
                "loss_type": "grpo",
                "tile_rows": 4,
                "max_steps": 3,
                "model_init_kwargs": {"dtype": "auto"},
                "checkpoint": checkpoints[kind],
            }
            if (backend, adapter) == ("fsdp2", "qlora"):  # which shards floating-point weights alone
                runs[case]["quantized"] = "float32"
    settings, wrapper = BACKENDS[backend]
    both = launch(tmp_path, "", runs, settings, timeout=60 + 20 * len(runs))
    assert any(result[0] != result[1] for result in ([part[case]["tiles"] for part in both] for case in runs))
    for case, described in runs.items():
        equal_to_one([part[case] for part in both], alone(described), case, wrapper, double[case])
        assert both[0][case]["sharded"] == (backend in ("zero3", "fsdp2")), f"{case}: not the sharding that was meant"


def equal_to_one(both: list[dict], alone: dict, case: str, wrapper: str, double: bool) -> None:
    ours = both[0]
    (name,) = ours["wrapper"]
    assert name.startswith(wrapper), f"{case}: not the wrapper that this test is about"
    same_rollouts(both, alone, case)
    # Rounding of a first step is carried into the weights of the next.
    first, later, weight = (1e-12, 1e-12, 1e-11) if double else (1e-6, 1e-4, 1e-5)
    rounding = 1e-6 if double else 1e-5  # a loss is logged in float32
    assert ours["loss"] == pytest.approx(alone["loss"], rel=rounding, abs=rounding), case
    assert ours["grad_norm"][0] == pytest.approx(alone["grad_norm"][0], rel=first), case
    assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=later), case
    weights, expected = (torch.load(result["weights"]) for result in (ours, alone))
    assert weights.keys() == expected.keys()
    far = {key: (value - expected[key]).abs().max().item() for key, value in weights.items()}
    assert max(far.values()) < weight, f"{case}: {far}"


# One pair of processes that need different numbers of something, of which a sharded model wants a forward from each.
PARTITIONED = {"ds3_gather_for_generation": False}
UNEVEN = {
    "tiles": {"estimator": "mean_field", "kl_estimator": "full", "tile_rows": 2},
    "views": {**RAGGED, "kl_estimator": "full", "tile_rows": 2},
    "steps": {**STEP_MERGE, **PARTITIONED, "block_length": 2},
    "prompts": {
        "estimator": "any_order",
        "decoding": "any_order",
        "cache": "exact",
        "prompts": ["", "abc"],
        "shuffle_dataset": False,
        **PARTITIONED,
    },
}
ROWS = {f"rows, {cache}": {"rows": [4, 0], "cache": cache} for cache in (None, "exact")}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_processes_with_different_work_do_not_wait(tmp_path, checkpoint, alone, backend):
    """Head tiles, views, decoding steps (one meets its EOS first), empty prompts in one of them, and rows."""
    needs(backend)
    settings, wrapper = BACKENDS[backend]
    runs = {**UNEVEN, **{name: {"do": "run_rows", **described} for name, described in ROWS.items()}}
    both = launch(tmp_path, checkpoint, runs, settings)
    for name, described in UNEVEN.items():
        parts = [result[name] for result in both]
        equal_to_one(parts, alone(described), name, wrapper, double=False)
        needed = {
            "tiles": [part["tiles"] for part in parts],
            "views": [[needed for needed, _ in part["views"]] for part in parts],
            "steps": [[max(max(row[3]) for row in rows) for rows in part["rollouts"]] for part in parts],
            "prompts": [part["prompt_tokens"] for part in parts],
        }
        assert needed[name][0] != needed[name][1], f"{name}: both need as many, nothing was tested"
    assert 0 in both[0]["prompts"]["prompt_tokens"]
    for name, described in ROWS.items():
        mine, none = (result[name] for result in both)
        expected = run_rows(tmp_path / "alone", checkpoint, per_device_train_batch_size=4, **described)
        assert mine["completions"] == expected["completions"] and none["completions"] == []
        assert mine["forwards"] == none["forwards"] == expected["forwards"] > 0
