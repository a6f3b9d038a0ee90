"""What `Memory` counts, and what sharding makes of it."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from trl_dllm.reports.memory import SHARDINGS, Footprint, Live, Memory, Sharding, weight_bytes


def test_views_and_weights_are_no_new_memory():
    weight = nn.Linear(8, 4, bias=False)
    with Memory(weight) as memory, torch.no_grad():
        x = torch.zeros(3, 8)  # 96 bytes
        y = weight(x)  # 48
        y.view(-1)[1:].add_(1)
        weight.weight.t()
        assert memory.peak() == 96 + 48
        del x, y
        torch.zeros(30)  # 120
    assert memory.peak() == 96 + 48 and weight_bytes(weight) == 128


def test_tied_weights_are_counted_once():
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    second.weight = first.weight
    assert weight_bytes(nn.ModuleList([first, second])) == 128
    first.weight.requires_grad_(False)
    assert (weight_bytes(first, trained=True), weight_bytes(first, trained=False)) == (0, 128)


def test_gradients_and_optimizer_states_are_told_from_activations():
    """Of one weight of 128 bytes; AdamW's states are two of it, and a step count."""
    layer = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
    with Memory(layer) as memory:
        for _ in range(2):
            layer(torch.zeros(3, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    gc.collect()
    moments = memory.peaks["training"]
    assert {live.gradients for live in moments} == {0, 128}
    states = min(live.optimizer for live in moments)
    assert 256 <= states <= 256 + 8, "at each moment, also of the first step: they stay"
    assert max(live.optimizer for live in moments) > states, "and what a step makes on the way"
    # x and y; the gradient of y is a view of the sum's
    assert max(live.activations for live in moments if live.gradients == 0) >= 96 + 48
    assert max(live.activations for live in moments) < 96 + 48 + 128


def test_phases_are_counted_apart():
    with Memory() as memory:
        with memory.during("sampling"):
            torch.zeros(10)
        torch.zeros(20)
    assert {phase: max(map(sum, moments)) for phase, moments in memory.peaks.items()} == {
        "sampling": 40,
        "training": 80,
    }


def footprint(**changes) -> Footprint:
    """1000 trained bfloat16 weights and 500 frozen ones; the fullest moment is before the gradients are there."""
    peaks = {
        "training": [Live(0, 4000, 3000), Live(2000, 4000, 500), Live(2000, 4100, 0)],
        "sampling": [Live(0, 4000, 200)],
    }
    given = {"frozen": 1000, "trained": 2000, "reference": 600, "parameters": 1000, "size": 2, "mixed": True}
    return Footprint(**{**given, "largest": 300, "peaks": peaks, **changes})


def test_one_process_has_everything():
    assert footprint().total == 1000 + 2000 + 600 + 7000
    memory = Sharding().memory(footprint())
    assert memory["total"] == footprint().total and memory["activations"] == 3000 and memory["gradients"] == 0


@pytest.mark.parametrize(
    "kind, parts",
    [
        # DDP's buckets make two of each gradient, so that another moment is the fullest.
        ("ddp", {"weights": 3000, "gradients": 4000, "optimizer": 4000, "activations": 500, "reference": 600}),
        ("zero1", {"weights": 3000, "gradients": 0, "optimizer": 1000 + 500, "activations": 3000, "reference": 600}),
        ("zero2", {"weights": 3000, "gradients": 0, "optimizer": 1000 + 500, "activations": 3000, "reference": 600}),
        ("fsdp2", {"weights": 625, "gradients": 0, "optimizer": 1000, "activations": 3000, "reference": 75}),
    ],
)
def test_each_stage_divides_what_it_divides(kind, parts):
    """By eight. States of bfloat16 weights are float32 where the weights are, or where DeepSpeed copies them."""
    memory = Sharding(kind, 8).memory(footprint())
    assert {name: memory[name] for name in parts} == parts
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert memory["gathered weights"] == (300 if kind == "fsdp2" else 0)


def test_zero3_gathers_the_policy_for_sampling_or_a_part_of_it():
    small = footprint(peaks={"training": [Live(2000, 4000, 100)], "sampling": [Live(0, 4000, 200)]})
    memory = Sharding("zero3", 8).memory(small)
    assert (memory["gathered weights"], memory["activations"]) == (3000, 200), "sampling is the fullest moment"
    memory = Sharding("zero3", 8, gathers=False).memory(small)
    assert (memory["gathered weights"], memory["activations"]) == (300, 100)
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (375, 250, 1500)


def test_mixed_precision_gives_adapters_the_back_ends_type():
    """1000 float32 adapter weights: DeepSpeed has them in bfloat16 and steps on float32 copies, FSDP2 does not."""
    lora = footprint(size=4, trained=4000, peaks={"training": [Live(4000, 8000, 0)]})
    for kind, part in (("zero2", 1), ("zero3", 8)):
        memory = Sharding(kind, 8).memory(lora)
        assert (memory["weights"], memory["optimizer"]) == (3000 // part, 1000 + 500)
        assert memory["gradients"] == 250
    assert Sharding("fsdp2", 8).memory(lora)["gradients"] == 500
    memory = Sharding("zero2", 8).memory(replace(lora, mixed=False))
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (5000, 500, 1000)


def test_an_unknown_sharding_is_refused():
    with pytest.raises(ValueError, match=r"sharding='zero4' is unknown; choose one of none, ddp, zero1"):
        Sharding("zero4")
    assert all(Sharding(kind, 2).memory(footprint())["total"] for kind in SHARDINGS)
