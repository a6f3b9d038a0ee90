"""Half-precision weights that a learning rate cannot move: counted as AdamW moves them, and warned of."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_dllm import DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.models import create_tiny_model
from trl_dllm.trainer.coarse import WarnOfLostSteps, lost_share


@pytest.mark.parametrize(
    ("dtype", "learning_rate"),
    [(torch.bfloat16, 1e-4), (torch.bfloat16, 1e-5), (torch.float16, 1e-5), (torch.float16, 2e-6)],
)
def test_the_share_is_that_of_weights_which_a_step_leaves_where_they_are(dtype, learning_rate):
    weights = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    stay = [(weights + step == weights) for step in (learning_rate, -learning_rate)]
    up, down = (each.float().mean() for each in stay)  # at a power of two the neighbour below is half as far away
    assert lost_share([weights], learning_rate) == pytest.approx(float(up), abs=2e-3)
    assert lost_share([weights], learning_rate) == pytest.approx(float(down), abs=2e-2)
    assert 0.05 < float(up) < 0.999, "neither all nor none"


def test_tensors_count_by_their_size():
    still, moved = torch.full((300,), 1.0, dtype=torch.bfloat16), torch.full((100,), 1e-3, dtype=torch.bfloat16)
    assert lost_share([still, moved], 1e-4) == 0.75
    assert lost_share([still, torch.zeros(900, dtype=torch.bfloat16)], 1e-4) == 1.0, "zeros say nothing of what comes"
    large = torch.full((600_000,), 1.0, dtype=torch.bfloat16)
    assert lost_share([large, moved.repeat(2000)], 1e-4) == 0.75, "of which some elements are looked at"
    assert lost_share([], 1e-4) == lost_share([torch.zeros(0)], 1e-4) == 0.0
    assert lost_share([torch.full((300,), 1.0)], 1e-4) == 0.0, "float32 moves"


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "optim", "warned"),
    [
        (torch.bfloat16, 1e-6, "adamw_torch", True),
        (torch.bfloat16, 1e-1, "adamw_torch", False),
        (torch.float32, 1e-6, "adamw_torch", False),
        (torch.bfloat16, 1e-6, "sgd", False),
    ],
)
def test_a_run_that_would_change_nothing_warns(tmp_path, dtype, learning_rate, optim, warned):
    model, tokenizer = create_tiny_model(hidden_size=16, num_layers=1)
    rows = Dataset.from_dict({"prompt": ["copy:"] * 2, "completion": ["abc"] * 2})
    args = DiffusionSFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=learning_rate,
        optim=optim,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = DiffusionSFTTrainer(model.to(dtype), args, train_dataset=rows, processing_class=tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = [str(each.message) for each in caught if "rounds to nothing" in str(each.message)]
    assert len(found) == warned
    if warned:
        assert found[0].startswith("learning_rate=1e-06: ") and "dtype: float32" in found[0]


@pytest.mark.parametrize(("deepspeed", "frozen", "warned"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_weights_that_are_frozen_or_have_float32_copies_are_none_of_them(deepspeed, frozen, warned):
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(not frozen)
    args = SimpleNamespace(optim="adamw_torch", learning_rate=1e-9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WarnOfLostSteps(SimpleNamespace(is_deepspeed_enabled=deepspeed)).on_train_begin(args, None, None, model=model)
    assert len(caught) == warned


@pytest.mark.parametrize(("quantised", "remedy"), [(True, "--accelerate_config zero2"), (False, "dtype: float32")])
def test_an_adapter_that_trl_has_made_bfloat16_is_told_what_helps_it(quantised, remedy):
    """B begins at 0 and moves at first; A is what a step of 3e-6 rounds to nothing."""
    model, _ = create_tiny_model(hidden_size=16, num_layers=1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).to(torch.bfloat16)
    model.base_model.model.is_loaded_in_4bit = quantised
    warn = WarnOfLostSteps(SimpleNamespace(is_deepspeed_enabled=False))
    with pytest.warns(UserWarning, match=f"rounds to nothing.*{remedy}"):
        warn.on_train_begin(SimpleNamespace(optim="adamw_torch", learning_rate=3e-6), None, None, model=model)
