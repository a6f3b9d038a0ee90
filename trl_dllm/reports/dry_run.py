"""What a run will do, before any weight is loaded: batches, floating-point operations and memory a GPU.

The batches and d2's formula (App. C.2) are arithmetic. Memory and counted operations are measured: the step itself is
run on fake tensors (`fake.py`), on one process, and `memory.py` says what sharding makes of that.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ..models import DreamConfig, LLaDAConfig, backbone_parameters
from ..models.eso_lm import EsoLMConfig
from ..models.illada import ILLaDAConfig
from ..models.llada_moe import LLaDAMoEConfig
from ..models.tiny import create_tiny_model
from ..recipe import load_recipe, recipe_paths
from ..rollout import Rollout
from .memory import Sharding


if TYPE_CHECKING:
    from .fake import Measured


def _dream() -> DreamConfig:
    return DreamConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )


def _smollm2() -> LlamaConfig:
    """SmolLM2-135M as `make language` makes it a masked diffusion model."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    config.is_causal, config.mask_token_id = False, 0
    return config


def _tiny(family: str):
    return create_tiny_model(family)[0].config


# Shapes of published checkpoints, for a machine that cannot reach the Hub: the first that a name contains. And those
# that `trl-dllm init-tiny` writes where the tiny recipes look.
_PUBLISHED: dict[str, Callable[[], Any]] = {
    "illada": ILLaDAConfig,
    "llada-moe": LLaDAMoEConfig,
    "llada-8b": LLaDAConfig,
    "llada-1.5": LLaDAConfig,
    "anyorder_causal_llada": LLaDAConfig,
    "dream": _dream,
    "diffucoder": _dream,
    **{f"tiny_{name}/init": partial(_tiny, name) for name in ("llada", "sdar")},
    "eso_lm": EsoLMConfig,  # converted
    "language/init": _smollm2,
}


def first_stage(name: str) -> str:
    """The model itself or, for a folder that is not there and that a recipe writes, what that recipe starts from."""
    while not Path(name).exists():
        recipes = map(load_recipe, recipe_paths().values())
        before = next((recipe["model_name_or_path"] for recipe in recipes if recipe.get("output_dir") == name), None)
        if before is None:
            return name
        name = before
    return name


def read_config(name: str):
    """The model's config: from its folder or the Hub, else the published shapes of a known family."""
    name = first_stage(name)
    try:
        return AutoConfig.from_pretrained(name)
    except OSError:
        for family, config in _PUBLISHED.items():
            if family in name.lower():
                return config()
        raise


def count_parameters(config) -> int:
    """Parameters of a model of this config, without making any."""
    with torch.device("meta"):
        return backbone_parameters(AutoModelForCausalLM.from_config(config))


def measure(command: str, args, model_args) -> "Measured":
    """What a step takes on one process."""
    from ..trainer.stock import with_facts
    from . import fake  # and with it the trainers

    config = with_facts(read_config(model_args.model_name_or_path), args)
    measures = {"grpo": fake.measure_grpo, "sft": fake.measure_sft, "dpo": fake.measure_dpo}
    return measures[command](args, model_args, config)


def describe(
    command: str, args, model_args, sharding: Sharding | None = None, measured: "Measured | None" = None
) -> dict:
    """The numbers of a run of `grpo`, `sft` or `dpo`, by name.

    FLOPs are of all processes, memory is of one: both for prompts of 200 tokens, and completions that fill their
    canvas. `sharding` says how the step is spread over them; None reads it from the settings. `measured` saves a
    measurement where only that differs.
    """
    measured = measured or measure(command, args, model_args)
    sharding = sharding or Sharding.of(args)
    sharding = replace(sharding, gathers=getattr(args, "ds3_gather_for_generation", True))
    name, processes = model_args.model_name_or_path, max(1, args.world_size)
    base, parameters = first_stage(name), count_parameters(read_config(name))
    facts = {
        "model": name if base == name else f"{name}, not there yet: as {base}",
        "parameters": f"{parameters / 1e9:.2f} B, {measured.footprint.parameters / 1e6:.1f} M trained",
        "processes": f"{processes}, {sharding.kind}" if processes > 1 else processes,
    }
    step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    flops = {part: float(number * processes) for part, number in measured.flops.items()}
    if command != "grpo":
        facts["pairs an optimizer step" if command == "dpo" else "rows an optimizer step"] = step_rows
        facts |= {f"FLOPs an optimizer step, counted: forwards {part}": number for part, number in flops.items()}
    else:
        facts["completions an optimizer step"] = step_rows
        facts |= generation_batch(args, parameters, measured.footprint.parameters < parameters)
        facts |= {f"FLOPs of a generation batch, counted: {part}": number for part, number in flops.items()}
        facts["flops of a generation batch"] = sum(flops.values())
    memory = sharding.memory(measured.footprint)
    return facts | {f"GiB a GPU: {part}": value / 2**30 for part, value in memory.items() if value}


def generation_batch(args, parameters: int, frozen_backbone: bool) -> dict:
    """What a generation batch of GRPO is, and what it costs by d2's formula: the log's `flops_paper`."""
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


def dry_run(
    command: str, args, model_args, sharding: Sharding | None = None, measured: "Measured | None" = None
) -> dict:
    """Print `describe` as a table, and return it."""
    return _print(command, describe(command, args, model_args, sharding, measured))


def dry_run_decoding(command: str, name: str, config, rows: int, batch_size: int, dtype: str = "bfloat16") -> dict:
    """Print what decoding `rows` canvases costs, and return it."""
    from .fake import measure_decoding

    model = read_config(name)
    parameters = count_parameters(model)
    together = min(rows, batch_size)
    flops, weights, activations = measure_decoding(model, config, together, dtype)
    facts = {
        "model": f"{name} ({parameters / 1e9:.2f} B parameters)",
        "completions": rows,
        "canvas": config.max_new_tokens,
        "decoding steps a completion": config.diffusion_steps,
        "forwards": -(-rows // batch_size) * config.diffusion_steps,
        "FLOPs (d2 App. C.2)": float(rows * config.max_new_tokens * config.diffusion_steps * 2 * parameters),
        "FLOPs, counted": float(flops * rows / together),
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
        "Memory is that of the step, run on fake tensors with prompts of 200 tokens and full canvases; fragmentation, "
        "CUDA's context and its kernels' workspaces come on top."
    )
    return facts
