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

from trl_dllm import DiffusionDPOTrainer, DiffusionGRPOTrainer, DiffusionSFTTrainer
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, Plan, compact, score_view
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.reports.fake import (
    PROMPT,
    make_fake,
    make_model,
    make_tokenizer,
    measure_decoding,
    measure_dpo,
    measure_grpo,
    measure_sft,
)
from trl_dllm.reports.memory import Memory, weight_bytes
from trl_dllm.scripts import dpo, grpo, sft


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
    """Settings and model settings of a run; None takes one away."""
    given = {"model_name_or_path": "a-tiny-model", "output_dir": folder, **SETTINGS, **settings}
    if script is grpo:
        given = {**GRPO, **given}
    words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
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
        answer = args.max_length - PROMPT - 1
        row, trainer_class = {"prompt": "1" * PROMPT, "completion": "1" * answer}, DiffusionSFTTrainer
        if script is dpo:
            row = {"prompt": "1" * PROMPT, "chosen": "1" * answer, "rejected": "2" * answer}
            trainer_class = DiffusionDPOTrainer
            model.config._name_or_path = ""
        trainer = trainer_class(model, args=args, train_dataset=Dataset.from_list([row] * 64), **common)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    gc.collect()
    with Memory(*models) as memory:
        trainer.train()
    return trainer, sum(map(weight_bytes, models)) + memory.peak()


def check(script, folder, config, **settings):
    args, model_args = parsed(script, folder, **settings)
    measure = {grpo: measure_grpo, sft: measure_sft, dpo: measure_dpo}[script]
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


def test_operations_are_those_that_torch_counts(tmp_path):
    """Of a whole step, sampling and update, by FlopCounterMode; norms and the like are left out."""
    for settings in ({}, LORA):
        args, model_args = parsed(grpo, tmp_path, **STEP_MERGE, **settings, gradient_checkpointing="false")
        config = config_of(64, 2)
        flops = measure_grpo(args, model_args, config).flops
        with flop_counter() as counter:
            real_run(grpo, args, model_args, config, steps=1)
        assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("objective", ["masked_diffusion", "any_order"])
def test_memory_of_fine_tuning_is_that_of_a_real_run(tmp_path, objective):
    """Any-order trains q, k and v alone, as d2 does."""
    settings = {"objective": objective, "max_length": 240, "gradient_checkpointing": "true", "task": None}
    measured, trainer, _ = check(sft, tmp_path, config_of(64, 2), **settings)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert measured.footprint.parameters == trained
    assert (trained == 2 * 3 * 64 * 64) == (objective == "any_order")


@pytest.mark.parametrize("peft", [{}, LORA], ids=["full", "lora"])
def test_memory_of_preferences_is_that_of_a_real_run(tmp_path, peft):
    """VRPO with a reference beside the policy, or the policy without its adapter."""
    settings = {"max_length": 240, "gradient_checkpointing": "true", "task": None, "dataset_name": "none", **peft}
    check(dpo, tmp_path, config_of(64, 2), **settings, num_samples=4)


def test_4_bit_weights_are_as_large_as_real_ones(tmp_path):
    """Packed by bitsandbytes on the CPU, and by hand around fake tensors."""
    bnb = pytest.importorskip("bitsandbytes")
    settings = {**STEP_MERGE, **LORA, "load_in_4bit": "true", "use_bnb_nested_quant": "true"}
    args, model_args = parsed(grpo, tmp_path, **settings, bnb_4bit_quant_type="nf4", dtype="bfloat16")
    config = config_of(64, 2)
    footprint = measure_grpo(args, model_args, config).footprint
    from trl import get_quantization_config

    quantisation = get_quantization_config(model_args)
    model = make_model(config, "bfloat16", None, quantisation)
    make_fake(model)
    real = create_tiny_model("llada", 64, 2, intermediate_size=192)[0].to(torch.bfloat16)
    for name, module in list(real.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type="nf4", module=packed)
            real.set_submodule(name, packed.to("cpu"))
    assert real.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert weight_bytes(model) == pytest.approx(weight_bytes(real), rel=0.02)
    assert footprint.frozen == pytest.approx(weight_bytes(real), rel=0.02)
    assert footprint.size == 2 and footprint.parameters == 2 * 8 * (4 * 2 * 64 + 3 * (64 + 192))


def test_any_order_takes_no_more_than_an_uncompacted_pass():
    """Peak activations of an update: rows that end early, on the columns that matter and on all of P + 2L."""
    model, tokenizer = create_tiny_model("llada", 64, 4)
    spec = MaskedDiffusionSpec.from_config(model.config, tokenizer)
    config = DiffusionGenerationConfig(max_new_tokens=32, diffusion_steps=16, block_length=16, decoding="any_order")
    prompts = torch.randint(5, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    rollout = generate(model, prompts, torch.ones_like(prompts), config, spec=spec)
    share = torch.arange(32) < torch.tensor([[8], [16], [20], [32]])
    for counted in (share, share & (torch.arange(32) < 16), torch.ones_like(share)):
        rollout = replace(rollout, counted=counted)
        peaks = []
        for narrow in (compact, lambda view: view):
            view, owner = Plan(AnyOrder(), rollout, 0, len(rollout))[0]
            with Memory(model) as memory:
                scores = score_view(model, narrow(view), 32, spec, owner=owner, rows=len(rollout))
                scores.logps.sum().backward()
            peaks.append(max(sum(live) - live.gradients for live in memory.peaks["training"]))
            model.zero_grad()
        assert peaks[0] <= peaks[1]
        if counted[:, 16:].sum() == 0:
            assert peaks[0] < 0.9 * peaks[1], "and less where no row has more than half of its canvas counted"


def test_what_decoding_takes_is_what_it_takes_with_real_weights():
    config = config_of(64, 2)
    real = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    decoding = {"max_new_tokens": 32, "block_length": 16, "diffusion_steps": 8, "stop_at_eos": False}
    for settings in ({}, {"decoding": "any_order", "cache": "exact"}, {"cache": "dual"}):
        settings = DiffusionGenerationConfig(**decoding, **settings, temperature=0.0)
        flops, weights, rest = measure_decoding(config, settings, 4, "float32")
        ids = torch.full((4, PROMPT), 9)
        ids[:, 0] = torch.arange(4) + 1
        spec = MaskedDiffusionSpec.from_config(config, make_tokenizer(config))
        with Memory(real) as memory:
            rollout = generate(real, ids, torch.ones_like(ids), settings, spec=spec)
        assert (flops, weights) == (rollout.flops, weight_bytes(real))
        assert rest == pytest.approx(memory.peak(), rel=0.1)


def test_truncated_draws_are_measured_too(tmp_path):
    """Which tokens are left cannot be known of logits without contents."""
    args, model_args = parsed(grpo, tmp_path, **STEP_MERGE, top_k=5)
    assert measure_grpo(args, model_args, config_of(32, 2)).footprint.total > 0


FEW = {"num_segments": 2, "diffusion_steps": 2, "gradient_accumulation_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {**STEP_MERGE, **LORA, **FEW, "gradient_checkpointing": "true", "beta": 0.04},
        {**STEP_MERGE, **FEW, "gradient_checkpointing": "false", "beta": 0.04},
        {**ANY_ORDER, "gradient_checkpointing": "false", "diffusion_steps": 4, "gradient_accumulation_steps": 1},
    ],
    ids=["step_merge_lora", "step_merge", "any_order"],
)
def test_memory_is_that_of_a_real_run_at_50_million_parameters(tmp_path, settings):
    config = config_of(512, 5)
    config.vocab_size = 32768
    _, trainer, _ = check(grpo, tmp_path, config, **settings, per_device_train_batch_size=2, num_generations=2)
    assert 45e6 < sum(p.numel() for p in trainer.model.parameters()) < 60e6
