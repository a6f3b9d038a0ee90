"""Every setting is meaning, schedule or machine, and a fingerprint is made of the first two."""

import json
from dataclasses import dataclass, fields

import pytest
from transformers import TrainerState
from trl import ModelConfig

from trl_dllm import DiffusionDPOConfig, DiffusionGRPOConfig, DiffusionSFTConfig
from trl_dllm.scripts.common import TaskArguments
from trl_dllm.scripts.dpo import DiffusionDPOScriptArguments
from trl_dllm.scripts.grpo import DiffusionGRPOScriptArguments
from trl_dllm.trainer import meaning
from trl_dllm.trainer.meaning import (
    MACHINE,
    MEANING,
    SCHEDULE,
    machine_facts,
    meaning_differences,
    nothing_left,
    run_fingerprint,
    same_end,
    schedule_line,
)


CONFIGS = [
    *(DiffusionGRPOConfig, DiffusionSFTConfig, DiffusionDPOConfig, ModelConfig),
    *(TaskArguments, DiffusionGRPOScriptArguments, DiffusionDPOScriptArguments),
]


def grpo(tmp_path, **settings) -> DiffusionGRPOConfig:
    small = {"max_completion_length": 16, "per_device_train_batch_size": 8, "num_generations": 4}
    return DiffusionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{**small, **settings})


def sft(tmp_path, **settings) -> DiffusionSFTConfig:
    return DiffusionSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def fingerprint(args, model=None, script=None, **facts):
    command = "grpo" if isinstance(args, DiffusionGRPOConfig) else "sft"
    return run_fingerprint(command, args, [script or TaskArguments(), model or ModelConfig()], facts)


def differ(was, now, args) -> set[str]:
    return {name for name, *_ in meaning_differences(was, now, [args, TaskArguments(), ModelConfig()])}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_in_exactly_one_class(config):
    for f in fields(config):
        classes = [name for name in ("MEANING", "SCHEDULE", "MACHINE") if f.name in getattr(meaning, name)]
        assert len(classes) == 1, f"{config.__name__}.{f.name} is in {classes or 'no class'} of trainer/meaning.py"


def test_a_field_that_nobody_has_put_anywhere_counts_as_meaning(tmp_path):
    @dataclass
    class Newer(TaskArguments):
        brightness: float = 1.0

    was, now = fingerprint(grpo(tmp_path), script=Newer()), fingerprint(grpo(tmp_path), script=Newer(brightness=2.0))
    assert differ(was, now, grpo(tmp_path)) == {"brightness"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 3e-6}, {"learning_rate"}),
        ({"estimator": "mean_field", "num_segments": None}, {"estimator", "num_segments"}),
        ({"estimator_kwargs": {"num_segments": 2}}, {"estimator_kwargs", "num_segments"}),
        ({"diffusion_steps": 4}, {"diffusion_steps", "num_segments"}),
        ({"tokens_per_step": 1}, {"diffusion_steps"}),
        ({"remasking": "random", "temperature": 0.5}, {"remasking", "temperature"}),
        ({"seed": 7}, {"seed"}),
        ({"loss_type": "grpo", "beta": 0.04}, {"loss_type", "beta"}),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, {"lr_scheduler_type", "warmup_steps"}),
        ({"max_completion_length": 32}, {"max_completion_length", "block_length", "diffusion_steps"}),
        ({"per_device_train_batch_size": 16}, {"rows_an_optimizer_step", "generation_batch_size"}),
        ({"num_iterations": 2}, {"num_iterations"}),
        ({"model_init_kwargs": {"rope_theta": 1.0}}, {"model_init_kwargs"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_another_meaning_is_seen(tmp_path, change, expected):
    assert differ(fingerprint(grpo(tmp_path)), fingerprint(grpo(tmp_path, **change)), grpo(tmp_path)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"block_length": 16, "diffusion_steps": 8},  # what None stands for
        {"tokens_per_step": 2},
        {"num_segments": 8},
        {"max_steps": 5, "save_steps": 7, "logging_steps": 3},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1},
        {"model_init_kwargs": {"dtype": "bfloat16", "device_map": "auto", "token": "secret"}},
        {"gradient_checkpointing": False, "report_to": "none", "hub_token": "secret", "run_name": "another"},
        {"resume_from_checkpoint": "."},
    ],
    ids=str,
)
def test_schedule_machine_and_another_spelling_are_no_other_meaning(tmp_path, change):
    was, now = fingerprint(grpo(tmp_path)), fingerprint(grpo(tmp_path / "elsewhere", **change))
    assert differ(was, now, grpo(tmp_path)) == set()
    assert "secret" not in json.dumps(vars(now)) and str(tmp_path) not in json.dumps(vars(now))


def test_the_objective_of_sft_and_the_tokens_of_its_tokenizer_are_meaning(tmp_path):
    was = fingerprint(sft(tmp_path, eos_token="<eos>"))
    assert differ(was, fingerprint(sft(tmp_path, eos_token="<pad>")), sft(tmp_path)) == {"eos_token"}
    changes = {"objective": "any_order", "canvas_length": 16, "eos_token": "<eos>"}
    found = differ(was, fingerprint(sft(tmp_path, **changes)), sft(tmp_path))
    assert found == {"objective", "canvas_length", "block_length"}


def test_models_scripts_and_facts_belong_to_it(tmp_path):
    args = grpo(tmp_path)
    was = fingerprint(args, weights="a", rows="x")
    lora = fingerprint(
        args, ModelConfig("elsewhere", dtype="bfloat16", use_peft=True, lora_r=8), weights="a", rows="x"
    )
    assert differ(was, lora, args) == {"use_peft", "lora_r"}
    script = TaskArguments(task="sudoku", data_dir=str(tmp_path), num_eval_examples=3)
    assert differ(was, fingerprint(args, script=script, weights="b", rows="y"), args) == {"task", "weights", "rows"}


def test_a_fingerprint_of_another_version_is_compared_by_defaults(tmp_path):
    args = grpo(tmp_path, beta=0.04)
    was, now = fingerprint(grpo(tmp_path)), fingerprint(args)
    del was.meaning["beta"], was.meaning["loss_tokens"]
    was.meaning["removed_since"] = 3
    assert differ(was, now, args) == {"beta"}, "an older TRL without it had its default, 0"
    assert meaning_differences(was, now, [args])[0] == ("beta", 0.0, 0.04)


def test_what_changes_in_the_schedule_is_one_line(tmp_path):
    was = fingerprint(grpo(tmp_path, max_steps=45, lr_scheduler_type="linear"))
    assert schedule_line(was, was) is None
    longer = fingerprint(grpo(tmp_path, max_steps=90, save_steps=7, lr_scheduler_type="linear"))
    assert schedule_line(was, longer) == (
        "The schedule changes: max_steps 45 → 90, save_steps 500 → 7. The linear learning rate follows the new number "
        "of steps."
    )
    saves = fingerprint(grpo(tmp_path, max_steps=45, save_steps=7, lr_scheduler_type="linear"))
    assert schedule_line(was, saves) == "The schedule changes: save_steps 500 → 7."
    constant = fingerprint(grpo(tmp_path, max_steps=90, lr_scheduler_type="constant"))
    assert schedule_line(was, constant) == "The schedule changes: max_steps 45 → 90."


def test_the_shape_of_a_generation_buffer(tmp_path):
    args = grpo(tmp_path, gradient_accumulation_steps=2, steps_per_generation=4)
    assert machine_facts(args) == {
        "world_size": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    }
    assert fingerprint(args).machine == machine_facts(args)
    assert "steps_per_generation" not in machine_facts(sft(tmp_path))


@pytest.mark.parametrize(
    ("done", "planned", "now", "left"),
    [
        (2, 2, {"max_steps": 2}, False),
        (2, 2, {"max_steps": 3}, True),
        (2, 4, {"max_steps": 4}, True),
        (4, 4, {"max_steps": 2}, False),
        (4, 4, {"num_train_epochs": 2}, False),
        (3, 4, {"num_train_epochs": 2}, True),
        (4, 4, {"num_train_epochs": 3}, True),
    ],
)
def test_whether_a_checkpoint_has_taken_all_steps(tmp_path, done, planned, now, left):
    TrainerState(global_step=done, max_steps=planned).save_to_json(tmp_path / "trainer_state.json")
    was = {"max_steps": planned} if "max_steps" in now else {"num_train_epochs": 2}
    fingerprint(grpo(tmp_path, **was)).write(tmp_path)
    assert nothing_left(grpo(tmp_path, **now), tmp_path) is not left
    assert same_end(grpo(tmp_path, **now), fingerprint(grpo(tmp_path, **was))) is (was == now)
    assert not same_end(grpo(tmp_path), None)


def test_no_name_is_in_two_classes():
    assert not (MEANING & SCHEDULE or MEANING & MACHINE or SCHEDULE & MACHINE)
