"""What a run will do, before any weight is loaded: batches, forwards, floating-point operations and memory a GPU."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..likelihood.view import IGNORE
from ..models import DreamConfig, LLaDAConfig, TrainingFlops, backbone_parameters
from ..models.eso_lm import EsoLMConfig
from ..models.hub import HubConfig
from ..models.illada import ILLaDAConfig
from ..models.llada_moe import LLaDAMoEConfig
from ..models.lora import register_lora_targets
from ..rollout import Rollout


_PROMPT = 200  # tokens of a prompt, which nobody has read yet


def _dream() -> DreamConfig:
    return DreamConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )


# Shapes of published checkpoints, for a machine that cannot reach the Hub: the first that a name contains.
_PUBLISHED: dict[str, Callable[[], HubConfig]] = {
    "illada": ILLaDAConfig,
    "llada-moe": LLaDAMoEConfig,
    "llada-8b": LLaDAConfig,
    "llada-1.5": LLaDAConfig,
    "dream": _dream,
    "diffucoder": _dream,
    "eso_lm": EsoLMConfig,  # converted
}


def read_config(name: str):
    """The model's config: from its folder or the Hub, else the published shapes of a known family."""
    try:
        return AutoConfig.from_pretrained(name)
    except OSError:
        for family, config in _PUBLISHED.items():
            if family in name.lower():
                return config()
        raise


def count_parameters(config) -> int:
    """Parameters of a model of this config, without making any."""
    return backbone_parameters(_without_weights(config))


def estimate_memory(config, args, model_args, parameters: int, trainable: int, columns: int, rows: int) -> dict:
    """Bytes a GPU, by part: weights, gradients, optimizer states, activations of one view, the reference model."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(str(model_args.dtype), 2)
    weight = 0.55 if model_args.load_in_4bit else 1 if model_args.load_in_8bit else size
    stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) or 0
    world = max(1, args.world_size)
    trained_size = size
    if model_args.use_peft:
        # PEFT makes float32 adapters. TRL casts those on quantised weights, and keeps the model's type under ZeRO-3.
        quantised = model_args.load_in_4bit or model_args.load_in_8bit
        trained_size = 2 if quantised else size if stage == 3 else 4
    master = 4 if stage >= 1 and trained_size < 4 else 0  # DeepSpeed steps on a float32 copy
    adapter = trainable if model_args.use_peft else 0
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # With checkpointing a layer keeps its input and one layer at a time its inside, else every layer its inside.
    inside = 2 * (8 * hidden + 3 * config.intermediate_size)
    token = 2 * hidden * layers + inside if args.gradient_checkpointing else layers * inside
    reference = getattr(args, "beta", 0) != 0 and not model_args.use_peft
    return {
        "weights": (parameters * weight + adapter * trained_size) / (world if stage == 3 else 1),
        "gradients": trainable * trained_size / (world if stage >= 2 else 1),
        "optimizer": trainable * (8 + master) / (world if stage >= 1 else 1),
        "activations": rows * columns * token + 3 * 64 * config.vocab_size * 4,  # and the tiles of the head
        "reference": parameters * size / (world if stage == 3 else 1) if reference else 0,
    }


def describe(command: str, args, model_args) -> dict:
    """The numbers of a run of `grpo` or `sft`, by name.

    Those by d2's formula (App. C.2) are of all processes, and equal the log's `flops_paper`; the counted ones are of
    one micro-batch on one GPU, with prompts of 200 tokens.
    """
    config = read_config(model_args.model_name_or_path).get_text_config()
    model = _without_weights(config, args, model_args)
    parameters = backbone_parameters(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = args.per_device_train_batch_size
    step_rows = rows * args.gradient_accumulation_steps * max(1, args.world_size)
    facts = {
        "model": model_args.model_name_or_path,
        "parameters": f"{parameters / 1e9:.2f} B, {trainable / 1e6:.1f} M trained",
        "processes": args.world_size,
    }
    if command == "sft":
        columns = args.canvas_length or args.max_length or 1024
        facts["rows an optimizer step"] = step_rows
        facts["FLOPs an optimizer step"] = (4.0 if model_args.use_peft else 6.0) * parameters * step_rows * columns
    else:
        rollout = Rollout.scheduled(args.max_completion_length, args.generation_config().diffusion_steps)
        view = args.build_estimator().view(rollout, 0, rollout.view_seed, 0)
        columns = _PROMPT + view.input_ids.shape[1]
        facts["completions an optimizer step"] = step_rows
        facts |= _generation_batch(args, parameters, model_args.use_peft)
        facts |= _micro_batch(args, TrainingFlops(model), columns, int((view.targets != IGNORE).sum()))
    memory = estimate_memory(config, args, model_args, parameters, trainable, columns, rows)
    facts |= {f"GiB a GPU: {name}": value / 2**30 for name, value in memory.items() if value}
    facts["GiB a GPU: total"] = sum(memory.values()) / 2**30
    return facts


def _generation_batch(args, parameters: int, frozen_backbone: bool) -> dict:
    """What a generation batch of GRPO is, and what it costs by d2's formula."""
    estimator, steps = args.build_estimator(), args.generation_config().diffusion_steps
    paper = args.paper_flops(args.generation_batch_size, parameters, frozen_backbone, estimator)
    optimizer_steps = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    facts = {
        "completions a generation batch": args.generation_batch_size,
        "prompts a generation batch": args.generation_batch_size // args.num_generations,
        "optimizer steps a generation batch": optimizer_steps,
        "decoding steps a completion": steps,
        "views a completion": estimator.num_views(Rollout.scheduled(args.max_completion_length, steps)),
        "FLOPs of sampling a generation batch (d2 App. C.2)": float(paper.sampling),
        "FLOPs of old and reference log-probs": float(paper.old + paper.reference),
        "FLOPs of its updates": float(paper.updates),
        "flops_paper of a generation batch": float(paper.total),
    }
    if args.max_steps > 0:
        facts["flops_paper of the run"] = float(paper.total * math.ceil(args.max_steps / optimizer_steps))
    return facts


def _micro_batch(args, count: TrainingFlops, columns: int, scored: int) -> dict:
    """Counted operations of a decoding step and of an update on one view, which scores `scored` positions a row."""
    rows, width = args.per_device_train_batch_size, _PROMPT + args.max_completion_length
    sampled = rows * args.generation_config().block_length
    update = count.view(rows, columns, rows * scored, training=True, reference=args.kl_estimator == "full")
    return {
        f"FLOPs of a decoding step of {rows} rows, counted": float(count(rows, width, width, sampled)),
        f"FLOPs of an update on a view of {rows} rows, counted": float(update),
    }


def _without_weights(config, args=None, model_args=None) -> nn.Module:
    """The model that a run would train, with its adapter and checkpointing, on the meta device."""
    from peft import get_peft_model
    from trl import get_peft_config

    register_lora_targets()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapter = get_peft_config(model_args) if model_args else None
        if adapter is not None:
            model = get_peft_model(model, adapter)
    if args is not None and args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    return model.train()


def dry_run(command: str, args, model_args) -> dict:
    """Print `describe` as a table, and return it."""
    return _print(command, describe(command, args, model_args))


def dry_run_decoding(command: str, name: str, config, rows: int, batch_size: int, dtype: str = "bfloat16") -> dict:
    """Print what decoding `rows` canvases costs, and return it."""
    model = read_config(name).get_text_config()
    parameters = count_parameters(model)
    size = 4 if dtype == "float32" else 2
    columns, inside = config.max_new_tokens + _PROMPT, 2 * (8 * model.hidden_size + 3 * model.intermediate_size)
    weights, activations = parameters * size, batch_size * columns * inside + 3 * 64 * model.vocab_size * 4
    facts = {
        "model": f"{name} ({parameters / 1e9:.2f} B parameters)",
        "completions": rows,
        "canvas": config.max_new_tokens,
        "decoding steps a completion": config.diffusion_steps,
        "forwards": -(-rows // batch_size) * config.diffusion_steps,
        "FLOPs (d2 App. C.2)": float(rows * config.max_new_tokens * config.diffusion_steps * 2 * parameters),
        "GiB a GPU: weights": weights / 2**30,
        "GiB a GPU: activations": activations / 2**30,
        "GiB a GPU: total": (weights + activations) / 2**30,
    }
    return _print(command, facts)


def _print(command: str, facts: dict) -> dict:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"trl-dllm {command}: dry run, no weights loaded", show_header=False)
    for name, value in facts.items():
        shown = f"{value:.3g}" if isinstance(value, float) and value >= 1e6 else value
        table.add_row(name, f"{shown:.2f}" if isinstance(shown, float) else str(shown))
    console = Console()
    console.print(table)
    console.print(
        f"Memory is an estimate for prompts of {_PROMPT} tokens; fragmentation and the framework come on top."
    )
    return facts
