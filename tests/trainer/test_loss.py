"""What a token counts for: weights held to TRL's own loss, sub-sampling, wd1, separability."""

import copy
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from helpers_grpo import build
from trl import GRPOTrainer

from trl_dllm.likelihood import TokenScores
from trl_dllm.trainer.loss import (
    SEPARABLE_LOSSES,
    is_separable,
    sub_sample_weights,
    token_weights,
    wd1_advantages,
    wd1_weights,
)


# Every loss type that the installed TRL's loss tells apart: a new one fails `token_weights` until it is known.
TRLS_LOSSES = sorted(
    {
        name
        for line in inspect.getsource(GRPOTrainer._compute_loss).splitlines()
        if "self.loss_type" in line
        for name in re.findall(r'"(\w+)"', line)
    }
)

# Rows of different lengths, one that nobody counts, and one with weights n / k.
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 1.5, 1.5]])


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = build(
        tmp_path_factory.mktemp("run"),
        gradient_accumulation_steps=6,
        steps_per_generation=3,
        beta=1.0,
        use_bias_correction_kl=False,
    )
    trainer.current_gradient_accumulation_steps = 5  # the last window of an epoch may be a shorter one
    return trainer


def test_the_installed_trls_losses_are_found():
    assert {"grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"} <= set(TRLS_LOSSES)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss_type", TRLS_LOSSES)
def test_token_weights_are_those_of_trls_own_kl_term(trainer, loss_type, training):
    """TRL adds β·k3 to each token's loss; with β = 1 and without it the loss differs by the weighted sum of k3."""
    generator = torch.Generator().manual_seed(0)
    gap = torch.randn(MASK.shape, generator=generator, dtype=torch.float64)
    inputs = {
        "prompt_ids": torch.zeros(len(MASK), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(MASK), 2, dtype=torch.long),
        "completion_ids": torch.zeros(MASK.shape, dtype=torch.long),
        "completion_mask": MASK,
        "advantages": torch.tensor([1.0, -1.0, 0.5, 2.0]),
        "num_items_in_batch": torch.tensor(29),
        "ref_per_token_logps": gap,
    }
    zeros = torch.zeros_like(gap)
    scores = TokenScores(zeros, zeros, zeros.bool())
    twin = copy.copy(trainer)
    twin.loss_type, twin.max_completion_length = loss_type, MASK.shape[1]
    twin.model.train(training)
    losses = []
    for beta in (0.0, 1.0):
        twin.beta = beta
        losses.append(GRPOTrainer._compute_loss(twin, scores, inputs))
    expected = (token_weights(twin, inputs) * (gap.exp() - gap - 1)).sum()
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-6, atol=1e-9, check_dtype=False)
    assert expected > 0.01


def test_an_unknown_loss_is_refused(trainer):
    twin = copy.copy(trainer)
    twin.loss_type = "tomorrows"
    with pytest.raises(ValueError, match="loss_type='tomorrows'"):
        token_weights(twin, {"completion_mask": MASK})


def test_sub_sample_weights_sum_to_the_counted_tokens_and_are_even():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    scored = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    expected = [[2, 0, 0, 2], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]  # the last row's draw met nothing counted
    assert sub_sample_weights(mask, scored).tolist() == expected


def test_weights_of_an_estimators_own_are_made_up_to_the_counted_tokens():
    """What is over or missing goes to positions without a gradient; a row that is scored whole has none."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    scored = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    weights = torch.tensor([[1.5], [1.0], [2.0], [8.0]]).expand(-1, 4)
    expected = [[1.5, 0.5, 0.5, 1.5], [1, 1, 1, 0], [0, 0, 0, 0], [8, -4 / 3, -4 / 3, -4 / 3]]
    found = sub_sample_weights(mask, scored, weights)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(found.sum(dim=1).round(decimals=5), mask.sum(dim=1).float())


def test_wd1_weights_are_softmax_plus_minus_of_each_group():
    groups = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, -1.0]], dtype=torch.float64)
    weights = wd1_weights(groups)
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    positive, negative = (torch.tensor([s * a for a in (1.0, 2.0, -1.0)]).double().exp() for s in (1, -1))
    assert torch.allclose(weights[1], 3 * (positive / positive.sum() - negative / negative.sum()))


@pytest.mark.parametrize("training", [True, False])
def test_wd1_groups_are_those_of_training_or_of_evaluation_also_across_processes(training):
    """The second of two processes: its six completions are parts of groups of four, or whole groups of two."""
    whole = torch.arange(12.0).sin()
    trainer = SimpleNamespace(
        num_generations=4,
        num_generations_eval=2,
        model=SimpleNamespace(training=training),
        accelerator=SimpleNamespace(gather=lambda own: torch.cat([whole[:6], own]), process_index=1),
    )
    groups = whole.view(3, 4) if training else whole.view(6, 2)
    expected = groups.shape[1] * (groups.softmax(dim=1) - (-groups).softmax(dim=1))
    torch.testing.assert_close(wd1_advantages(trainer, whole[6:]), expected.flatten()[6:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("importance_sampling_level", "sequence"),
        ("off_policy_mask_threshold", 0.1),
        ("top_entropy_quantile", 0.5),
        ("_entropy_bonus_enabled", True),
        ("loss_type", "luspo"),
        ("loss_type", "vespo"),
    ],
)
def test_what_couples_tokens_is_not_separable(trainer, name, value):
    for loss_type in SEPARABLE_LOSSES:
        twin = copy.copy(trainer)
        twin.loss_type = loss_type
        assert is_separable(twin)
        setattr(twin, name, value)
        assert not is_separable(twin)
