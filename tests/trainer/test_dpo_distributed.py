"""Preference optimisation on two processes is that on one: loss, gradient norm, metrics and weights."""

import pytest
import torch
from helpers_distributed import BACKENDS, launch, needs, run_dpo, save_tiny
from helpers_dpo import pairs


RUNS = {
    "vrpo": {"loss_type": ["sigmoid"]},
    "lora": {"peft": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "coupled": {"estimator": "coupled_elbo", "num_samples": 2, "loss_type": ["apo_zero"], "sync_ref_model": True,
                "ref_model_sync_steps": 2},
}  # fmt: skip
NAMES = ("loss", "grad_norm", "num_tokens", "rewards/margins", "rewards/accuracies", "logps/chosen")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    kinds = {"float64": torch.float64, "float32": torch.float32}
    return {name: save_tiny(tmp_path_factory.mktemp(name), dtype, num_layers=2) for name, dtype in kinds.items()}


def equal_to_one(tmp_path, checkpoints, backend: str, runs: dict) -> None:
    settings, wrapper = BACKENDS[backend]
    exact = backend in ("ddp", "fsdp2")
    checkpoint = checkpoints["float64" if exact else "float32"]
    pairs(4).save_to_disk(tmp_path / "rows")
    runs = {name: {"rows": str(tmp_path / "rows"), **described} for name, described in runs.items()}
    both = launch(tmp_path, checkpoint, {k: {"do": "run_dpo", **v} for k, v in runs.items()}, settings, timeout=240)
    for name, described in runs.items():
        first, second = (result[name] for result in both)
        alone = run_dpo(tmp_path / "alone" / name, checkpoint, per_device_train_batch_size=4, **described)
        assert first["wrapper"][0].startswith(wrapper) and first["sharded"] == (backend in ("zero3", "fsdp2"))
        for key in NAMES:
            assert first[key] == second[key] and len(first[key]) >= 3, f"{name}, {key}: one for all processes"
            assert first[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-6), f"{name}, {key}"
        assert first["eval"] == pytest.approx(alone["eval"], rel=1e-5, abs=1e-6), name
        weights, expected = (torch.load(result["weights"]) for result in (first, alone))
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-7 if exact else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_equals_one_process(tmp_path, checkpoints, backend):
    needs(backend)
    equal_to_one(tmp_path, checkpoints, backend, RUNS)
