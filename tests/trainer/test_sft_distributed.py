"""Supervised fine-tuning on two processes is that on one: loss, gradient norm, metrics and weights."""

import pytest
import torch
from helpers_distributed import BACKENDS, launch, needs, run_sft, save_tiny


RUNS = {
    "masked diffusion": {"objective": "masked_diffusion", "canvas_length": 8},
    "any-order": {"objective": "any_order", "block_length": 4},
    "masked diffusion, lora": {"objective": "masked_diffusion", "peft": True},
}
NAMES = ("loss", "grad_norm", "masked_fraction", "entropy", "num_tokens")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    kinds = {"float64": torch.float64, "float32": torch.float32}
    return {name: save_tiny(tmp_path_factory.mktemp(name), dtype, num_layers=2) for name, dtype in kinds.items()}


def equal_to_one(tmp_path, checkpoints, backend: str, runs: dict) -> None:
    settings, wrapper = BACKENDS[backend]
    exact = backend in ("ddp", "fsdp2")
    checkpoint = checkpoints["float64" if exact else "float32"]
    runs = {name: {"model_init_kwargs": {"dtype": "auto"}, **described} for name, described in runs.items()}
    named = {name: {"do": "run_sft", **described} for name, described in runs.items()}
    both = launch(tmp_path, checkpoint, named, settings, timeout=180)
    for name, described in runs.items():
        first, second = (result[name] for result in both)
        alone = run_sft(tmp_path / "alone" / name, checkpoint, per_device_train_batch_size=4, **described)
        assert first["wrapper"][0].startswith(wrapper) and first["sharded"] == (backend in ("zero3", "fsdp2"))
        for key in NAMES:
            assert first[key] == second[key] and len(first[key]) >= 3, f"{name}, {key}: one for all processes"
            tolerance = 1e-12 if exact and key == "grad_norm" else 1e-5
            assert first[key] == pytest.approx(alone[key], rel=tolerance, abs=1e-7), f"{name}, {key}"
        assert first["eval"] == pytest.approx(alone["eval"], rel=1e-6), name
        weights, expected = (torch.load(result["weights"]) for result in (first, alone))
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-11 if exact else 1e-5)


def test_ddp_equals_one_process(tmp_path, checkpoints):
    equal_to_one(tmp_path, checkpoints, "ddp", {name: RUNS[name] for name in ("masked diffusion", "any-order")})


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_equals_one_process(tmp_path, checkpoints, backend):
    needs(backend)
    equal_to_one(tmp_path, checkpoints, backend, RUNS)
