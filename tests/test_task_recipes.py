"""A tiny model trains on each task from its 8B recipe, with the real data and rewards."""

import json

import pytest

from trl_dllm.scripts import grpo


# The local copies of MATH-500, HumanEval and MBPP are test splits: to train on them is a choice that has to be spelled
# out.
TEST_SPLIT = {"allow_test_as_train": True}

CASES = {
    "gsm8k": ("gsm8k_step_merge", {}),
    "math": ("math500_step_merge", TEST_SPLIT),
    "countdown": ("countdown_step_merge", {}),
    "sudoku": ("sudoku_step_merge", {}),
    "humaneval": ("humaneval_pkl", TEST_SPLIT),
    "mbpp": ("mbpp_pkl", TEST_SPLIT),
}

# What makes it fit here; everything else is the recipe's.
SMALL = {
    "attn_implementation": "sdpa",
    "bf16": "false",
    "block_length": 16,
    "diffusion_steps": 8,
    "disable_tqdm": "true",
    "dtype": "float32",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "false",
    "load_in_4bit": "false",
    "lora_alpha": 8,
    "lora_r": 4,
    "max_completion_length": 32,
    "max_steps": 2,
    "num_generations": 2,
    "num_iterations": 1,
    "num_train_examples": 4,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "use_cpu": "true",
}


@pytest.mark.parametrize("task", CASES)
def test_a_tiny_model_trains_on_the_task_from_its_recipe(task, tiny_checkpoint, tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("TRL_DLLM_ALLOW_CODE_EXECUTION", "1")
    if task in ("humaneval", "mbpp"):
        from trl_dllm.sandbox import SandboxUnavailable, choose_sandbox

        try:
            choose_sandbox()
        except SandboxUnavailable as error:
            pytest.skip(f"no sandbox for generated programs on this machine: {error}")
    name, task_kwargs = CASES[task]
    small = {**SMALL, "model_name_or_path": tiny_checkpoint, "output_dir": tmp_path, "task": task}
    if "step_merge" in name:
        small["num_segments"] = 4
    argv = ["--config", f"llada_8b/grpo/{name}", "--task_kwargs", json.dumps(task_kwargs), "--data_dir", str(data_dir)]
    argv += [word for key, value in small.items() for word in (f"--{key}", str(value))]
    state = grpo.main(*grpo.make_parser().parse_args_and_config(argv)).state
    steps = [entry for entry in state.log_history if "loss" in entry]
    assert len(steps) == 2
    assert all(entry["grad_norm"] == entry["grad_norm"] and abs(entry["loss"]) < 1e3 for entry in steps)  # finite
    assert all("reward" in entry for entry in steps)
