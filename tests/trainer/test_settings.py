"""Values of TRL's own settings: wrong ones are refused before TRL computes with them, by field, value and remedy."""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers_grpo import config
from transformers import training_args
from transformers.trainer_utils import SchedulerType
from trl import GRPOConfig, SFTConfig

from trl_dllm import DiffusionGRPOConfig, DiffusionSFTConfig


NAN, INF = math.nan, math.inf

# fields of TRL's -> the value as the message must show it, and what must be right
WRONG = [
    # not finite, or negative
    ({"temperature": NAN}, "nan", "a finite number"),
    ({"beta": NAN}, "nan", "a finite number"),
    ({"beta": -0.04}, "-0.04", "0 or more"),
    ({"epsilon": INF}, "inf", "a finite number"),
    ({"epsilon": -0.2}, "-0.2", "0 or more"),
    ({"epsilon_high": -0.2}, "-0.2", "0 or more"),
    ({"learning_rate": NAN}, "nan", "a finite number"),
    ({"learning_rate": -1e-6}, "-1e-06", "0 or more"),
    ({"confidence_threshold": NAN}, "nan", "a finite number or None"),
    ({"score_temperature": INF}, "inf", "a finite number or None"),
    ({"warmup_steps": NAN}, "nan", "a finite number"),
    ({"reward_weights": [1.0, NAN]}, "[1.0, nan]", "a list of which each is a finite number"),
    # zero work
    ({"num_iterations": 0}, "0", "at least 1"),
    ({"num_generations": 1}, "1", "at least 2"),
    ({"num_generations": None}, "None", "a whole number"),
    ({"max_completion_length": 0}, "0", "at least 1"),
    ({"max_completion_length": -1}, "-1", "at least 1"),
    ({"max_steps": 0}, "0", "-1 for no limit"),
    ({"num_train_epochs": 0}, "0", "greater than 0"),
    ({"per_device_train_batch_size": 0}, "0", "at least 1"),
    ({"gradient_accumulation_steps": 0}, "0", "at least 1"),
    ({"steps_per_generation": 0}, "0", "at least 1"),
    # floats for whole numbers, and others of a wrong type
    ({"num_generations": 4.5}, "4.5", "a whole number"),
    ({"per_device_train_batch_size": 2.0}, "2.0", "a whole number"),
    ({"block_length": 4.0}, "4.0", "a whole number"),
    ({"num_segments": 1.5}, "1.5", "a whole number"),
    ({"max_steps": True}, "True", "a whole number"),
    ({"shuffle_dataset": "no"}, "'no'", "True or False"),
    ({"label_names": "labels"}, "'labels'", "a list"),
    ({"report_to": 3}, "3", "a string or a list"),
    ({"lr_scheduler_kwargs": "cosine"}, "'cosine'", "a mapping, or the JSON of one"),
    ({"lr_scheduler_kwargs": [1]}, "[1]", "a mapping"),
    # words that nobody knows
    ({"loss_type": "nonsense"}, "'nonsense'", "'grpo'"),
    ({"loss_type": "dr_grp"}, "'dr_grp'", "did you mean 'dr_grpo'"),
    ({"importance_sampling_level": "word"}, "'word'", "'token', 'sequence' or 'sequence_token'"),
    ({"scale_rewards": "std"}, "'std'", "'group'"),
    ({"multi_objective_aggregation": "sum"}, "'sum'", "'sum_then_normalize'"),
    ({"lr_scheduler_type": "cosin"}, "'cosin'", "did you mean 'cosine'"),
    ({"eval_strategy": False}, "False", "'no'"),  # YAML's reading of a bare `no`
    ({"save_strategy": "never"}, "'never'", "'steps'"),
    ({"optim": "adam"}, "'adam'", "'adamw_torch'"),
    ({"debug": "all"}, "'all'", "underflow_overflow"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 2}}, "'power'", "it takes num_training_steps"),
    # ranges
    ({"seed": -1}, "-1", "between 0 and 2**32 - 1"),
    ({"adam_beta1": 1.0}, "1.0", "[0, 1)"),
    ({"top_entropy_quantile": 1.5}, "1.5", "[0, 1]"),
    ({"save_steps": 0}, "0", "greater than 0"),
    ({"resume_from_checkpoint": "no/such"}, "'no/such'", "is no folder"),
    # contradictions
    ({"sync_ref_model": True}, "True", "Set beta"),
    ({"bf16": True, "use_cpu": False}, "True", "use_cpu: true"),
    ({"per_device_train_batch_size": 3}, "per_device_train_batch_size=3", "num_generations=4"),
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: False)


@pytest.mark.parametrize(
    ("settings", "value", "right"), WRONG, ids=["-".join(case[0]) + f"={case[1]}" for case in WRONG]
)
def test_a_wrong_value_is_refused_by_field_value_and_what_is_right(tmp_path, settings, value, right):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **settings)
    message = str(error.value)
    assert any(name in message for name in settings), message
    assert value in message and right in message, message


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", NAN), ("max_length", 0), ("dataset_num_proc", 1.5), ("per_device_train_batch_size", 0)],
)
def test_sft_has_the_same_checks(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be "):
        DiffusionSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize("settings", [{"beta": -1.0}, {"loss_type": "nonsense"}, {"epsilon": NAN}])
def test_a_stock_config_is_checked_when_it_is_taken_over(tmp_path, settings):
    stock = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiffusionGRPOConfig.from_stock(stock)
    with pytest.raises(ValueError, match="learning_rate=-1"):
        DiffusionSFTConfig.from_stock(SFTConfig(str(tmp_path), use_cpu=True, bf16=False, learning_rate=-1))


def test_right_values_of_every_spelling_pass(tmp_path):
    found = config(
        Path(tmp_path),
        seed=np.int64(7),
        learning_rate=np.float32(0.5),
        lr_scheduler_type=SchedulerType.COSINE,
        lr_scheduler_kwargs='{"num_cycles": 2}',
        scale_rewards=False,
        reward_weights=(1, 0.5),
        resume_from_checkpoint=True,
        report_to=["none"],
        warmup_steps=0.1,
        epsilon=1e9,
        max_steps=-1,
    )
    assert (found.scale_rewards, found.lr_scheduler_kwargs) == ("none", {"num_cycles": 2})
    assert found.output_dir == os.fspath(tmp_path)


def test_the_defaults_of_trl_pass(tmp_path):
    for of_trl, own in ((GRPOConfig, DiffusionGRPOConfig), (SFTConfig, DiffusionSFTConfig)):
        own.from_stock(of_trl(str(tmp_path), use_cpu=True, bf16=False))
        own(str(tmp_path), use_cpu=True, bf16=False)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {}}])
@pytest.mark.parametrize("cls", [DiffusionGRPOConfig, DiffusionSFTConfig])
def test_a_config_raises_no_futurewarning(tmp_path, cls, settings):
    """TRL turns checkpointing on under the name that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        found = cls(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert found.gradient_checkpointing is settings.get("gradient_checkpointing", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_to_multiple_of": "nonsense"}, "pad_to_multiple_of='nonsense' must be a whole number"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be"),
        ({"accelerator_config": "{bad json"}, "accelerator_config='{bad json' must be a mapping"),
        ({"deepspeed": "{bad json"}, "deepspeed='{bad json' must be a mapping"),
        ({"torch_compile_mode": "fastest"}, "torch_compile_mode='fastest' is unknown"),
        ({"torch_compile_backend": "inducter"}, "torch_compile_backend='inducter' .*did you mean 'inductor'"),
        ({"output_dir": " "}, "output_dir=' ' must name a folder"),
    ],
)
@pytest.mark.parametrize("config", [DiffusionGRPOConfig, DiffusionSFTConfig])
def test_what_transformers_would_fail_on_without_a_name_is_named(tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **changes})
