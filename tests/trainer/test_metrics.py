"""What is logged beside TRL's metrics, against numbers by hand."""

import math

import pytest
import torch
from helpers_grpo import as_rollout, build

from trl_dllm.trainer.metrics import (
    order_bars,
    record_correction,
    record_flops,
    record_generation,
    record_kl,
    record_mismatch,
)


@pytest.fixture
def trainer(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    for entries in trainer._metrics.values():
        entries.clear()
    return trainer


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_samplers_speed_and_the_totals(trainer, mode):
    trainer.model.train(mode == "train")
    rollout = as_rollout(trainer, trainer._buffered_inputs[0])
    for _ in range(2):
        record_generation(trainer, rollout, torch.tensor([True, False, False, False]))
    entries = trainer._metrics[mode]
    steps = rollout.num_steps.float().mean().item()
    assert entries["sampling/steps"] == [steps] * 2
    revealed = int((rollout.unmask_step >= 0).sum())
    assert entries["sampling/tokens_per_forward"] == pytest.approx([revealed / int(rollout.num_steps.sum())] * 2)
    assert entries["frac_rows_skipped"] == [0.25] * 2
    record_flops(trainer)
    record_flops(trainer)
    assert entries["flops"] == [float(trainer.flops.counted)] and entries["flops_paper"] == [
        float(trainer.flops.paper)
    ]


def test_the_table_of_completions_says_how_each_was_decoded(tmp_path, capsys):
    """In the terminal and in the file, a row for each completion of the step."""
    import pandas

    trainer = build(tmp_path, max_steps=1, log_completions=True, logging_steps=1)
    trainer.train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    table = pandas.read_parquet(file)
    rollouts = [as_rollout(trainer, batch) for batch in trainer._buffered_inputs]  # shuffled meanwhile
    facts = [(r.num_steps.tolist(), r.unmask_step, r.counted) for r in rollouts]
    rows = [row for each in facts for row in zip(*each, strict=True)]
    expected = sorted((number, order_bars(steps[counted].tolist())) for number, steps, counted in rows)
    assert sorted(zip(table["decoding_steps"], table["unmask_order"], strict=True)) == expected
    assert len({number for number, _ in expected}) > 1 and len({bars for _, bars in expected}) > 4
    printed = capsys.readouterr().out
    assert "unmask_o" in printed and "decoding" in printed and any(bar in printed for bar in "▃▄▅▆")


@pytest.mark.parametrize(
    ("steps", "bars"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([3, 0, 1, 2], "█▁▃▆"),
        ([0], "▁"),
        ([], ""),
        ([0, 0, 2, 2, 4, 4, 6, 8], "▁▃▅▇"),  # of two neighbours each, in four bars
    ],
)
def test_bars_show_the_order_of_unmasking(steps, bars):
    assert order_bars(steps, width=4 if len(bars) == 4 else 32) == bars


def test_the_full_kl_is_a_mean_over_counted_tokens_and_replaces_trls(trainer):
    trainer.model.train()
    trainer._metrics["train"]["kl"] = [7.0, 0.0]
    record_kl(trainer, torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert trainer._metrics["train"]["kl"] == [7.0, 2.0]
    record_kl(trainer, torch.ones(1, 2), torch.zeros(1, 2))
    assert trainer._metrics["train"]["kl"] == [7.0, 0.0]


def test_the_mismatch_is_k3_of_the_counted_tokens(trainer):
    trainer.model.train()
    record_mismatch(trainer, torch.tensor([0.5, -0.25]))
    record_mismatch(trainer, torch.zeros(0))
    expected = ((math.exp(0.5) - 1 - 0.5) + (math.exp(-0.25) - 1 + 0.25)) / 2
    assert trainer._metrics["train"]["sampling/mismatch_kl"] == pytest.approx([expected, 0], rel=1e-5)
    assert trainer._metrics["train"]["sampling/mismatch_max"] == pytest.approx([0.5, 0], rel=1e-5)


def test_the_correction_has_trls_names(trainer):
    trainer.model.train()
    record_correction(trainer, torch.tensor([0.5, -1.0]), torch.tensor([1.6, 0.4]))
    found = {name: values for name, values in trainer._metrics["train"].items() if name.startswith("sampling/")}
    assert found == {
        "sampling/sampling_logp_difference/mean": [0.75],
        "sampling/sampling_logp_difference/max": [1.0],
        "sampling/importance_sampling_ratio/min": [pytest.approx(0.4)],
        "sampling/importance_sampling_ratio/mean": [1.0],
        "sampling/importance_sampling_ratio/max": [pytest.approx(1.6)],
    }
