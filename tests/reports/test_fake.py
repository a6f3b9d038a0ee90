"""What a step on fake tensors takes is what the same step takes with real weights: bytes and operations."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from helpers_flops import flop_counter
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from trl_dllm import DiffusionGRPOTrainer, DiffusionSFTTrainer
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, MeanField, Plan, compact, score_view
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.models.tiny import create_tiny_tokenizer
from trl_dllm.reports.fake import PROMPT, make_fake, make_model, make_tokenizer, measure_decoding, measure_grpo
from trl_dllm.reports.fake import measure_sft
from trl_dllm.reports.memory import Memory, weight_bytes
from trl_dllm.scripts import grpo, sft


SETTINGS = {
    "task": "sudoku",
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "report_to": "none",
    "disable_tqdm": "true",
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": "1e-4",
}
GRPO = {
    "max_completion_length": 32,
    "block_length": 16,
    "diffusion_steps": 8,
    "num_generations": 4,
    "loss_tokens": "canvas",
    "stop_at_eos": "false",
}
STEP_MERGE = {"estimator": "step_merge", "num_segments": 4}
ANY_ORDER = {"estimator": "any_order", "decoding": "any_order", "cache": "exact"}
LORA = {"use_peft": "true", "lora_r": 8, "lora_target_modules": "all-linear"}


def parsed(script, folder, **settings):
    """Settings and model settings of a run."""
    given = {"model_name_or_path": "a-tiny-model", "output_dir": folder, **SETTINGS, **settings}
    if script is grpo:
        given = {**GRPO, **given}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return script.make_parser().parse_args_and_config(words)[1:]


def config_of(hidden_size: int, num_layers: int, **kwargs):
    config = create_tiny_model("llada", hidden_size=16, num_layers=1, **kwargs)[0].config
    config.hidden_size, config.num_hidden_layers = hidden_size, num_layers
    config.intermediate_size = 3 * hidden_size
    config.num_attention_heads = config.num_key_value_heads = hidden_size // 16
    return config


def real_run(script, args, model_args, config, steps: int = 2):
    """The trainer after `steps` optimizer steps with real weights, and the memory that they took."""
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=getattr(torch, model_args.dtype), attn_implementation="sdpa"
    )
    args = copy.copy(args)
    args.max_steps = steps
    common = {"processing_class": make_tokenizer(config), "peft_config": get_peft_config(model_args)}
    if script is grpo:
        prompts = [{"prompt": f"{row:0{PROMPT}d}"} for row in range(64)]
        trainer = DiffusionGRPOTrainer(
            model,
            lambda completions, **kwargs: [float(row) for row in range(len(completions))],
            args,
            train_dataset=Dataset.from_list(prompts),
            **common,
        )
    else:
        row = {"prompt": "1" * PROMPT, "completion": "1" * (args.max_length - PROMPT - 1)}
        trainer = DiffusionSFTTrainer(model, args, train_dataset=Dataset.from_list([row] * 64), **common)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    gc.collect()
    with Memory(*models) as memory:
        trainer.train()
    return trainer, sum(map(weight_bytes, models)) + memory.peak()


def check(script, folder, config, **settings):
    args, model_args = parsed(script, folder, **settings)
    measure = measure_grpo if script is grpo else measure_sft
    measured = measure(args, model_args, config)
    trainer, peak = real_run(script, args, model_args, config)
    assert measured.footprint.total == pytest.approx(peak, rel=0.1)
    return measured, trainer, peak


@pytest.mark.parametrize("peft", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["true", "false"], ids=["checkpointing", "kept"])
@pytest.mark.parametrize("estimator", [STEP_MERGE, ANY_ORDER], ids=["step_merge", "any_order"])
def test_memory_is_that_of_a_real_run(tmp_path, estimator, checkpointing, peft):
    """Peak bytes of the model, its reference, gradients, optimizer and all that is made on the way."""
    settings = {**estimator, **peft, "gradient_checkpointing": checkpointing, "beta": 0.04}
    check(grpo, tmp_path, config_of(64, 2), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {**STEP_MERGE, **LORA, "num_iterations": 2, "beta": 0.04},
        {**STEP_MERGE, "importance_sampling_level": "sequence"},  # 2 N forwards
        {**ANY_ORDER, "beta": 0.04, "kl_estimator": "full"},
        {"estimator": "exact_trajectory", "num_iterations": 2, "gradient_accumulation_steps": 1},
    ],
    ids=["lora", "sequence", "full_kl", "exact"],
)
def test_operations_are_those_of_the_log(tmp_path, settings):
    """A run of two generation batches: `flops` of the first log is sampling and scoring, a cycle's is their sum."""
    args, model_args = parsed(grpo, tmp_path, **settings)
    config = config_of(32, 2)
    flops = measure_grpo(args, model_args, config).flops
    cycle = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    trainer, _ = real_run(grpo, args, model_args, config, steps=cycle + 1)
    logged = [entry["flops"] for entry in trainer.state.log_history if "flops" in entry]
    assert logged[0] == flops["sampling"] + flops["old and reference"]
    assert logged[-1] == logged[0] + sum(flops.values())
