"""What a run will do, before any weight is loaded: batches, forwards, floating-point operations and memory a GPU."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..models import DreamConfig, LLaDAConfig
from ..rollout import Rollout


# Shapes of published checkpoints, for a machine that cannot reach the Hub.
_PUBLISHED = {
    "llada-8b": lambda: LLaDAConfig(),
    "llada-1.5": lambda: LLaDAConfig(),
    "dream": lambda: DreamConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
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
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def lora_parameters(config, model_args) -> int:
    """Parameters of the adapter that the recipe puts on it."""
    from peft import get_peft_model
    from trl import get_peft_config

    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), get_peft_config(model_args))
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def estimate_memory(config, args, model_args, parameters: int, trainable: int, columns: int, rows: int) -> dict:
    """Bytes a GPU, by part: weights, gradients, optimizer states, activations of one view, the reference model."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(str(model_args.dtype), 2)
    weight = 0.55 if model_args.load_in_4bit else 1 if model_args.load_in_8bit else size
    stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) or 0
    world = max(1, args.world_size)
    adapter = trainable if trainable < parameters else 0
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # With checkpointing a layer keeps its input and one layer at a time its inside, else every layer its inside.
    inside = 2 * (8 * hidden + 3 * config.intermediate_size)
    token = 2 * hidden * layers + inside if args.gradient_checkpointing else layers * inside
    reference = getattr(args, "beta", 0) != 0 and trainable == parameters
    return {
        "weights": (parameters * weight + adapter * 4) / (world if stage == 3 else 1),
        "gradients": trainable * size / (world if stage >= 2 else 1),
        "optimizer": trainable * 8 / (world if stage >= 1 else 1),
        "activations": rows * columns * token + 3 * 64 * config.vocab_size * 4,  # and the tiles of the head
        "reference": parameters * size / (world if stage == 3 else 1) if reference else 0,
    }


def describe(command: str, args, model_args) -> dict:
    """The numbers of a run of `grpo` or `sft`, by name."""
    config = read_config(model_args.model_name_or_path).get_text_config()
    parameters = count_parameters(config)
    trainable = lora_parameters(config, model_args) if model_args.use_peft else parameters
    rows = args.per_device_train_batch_size
    step_rows = rows * args.gradient_accumulation_steps * max(1, args.world_size)
    facts = {
        "model": model_args.model_name_or_path,
        "parameters": f"{parameters / 1e9:.2f} B, {trainable / 1e6:.1f} M of them trained",
        "processes": args.world_size,
    }
    if command == "sft":
        columns = args.canvas_length or args.max_length or 1024
        facts["rows an optimizer step"] = step_rows
        facts["FLOPs an optimizer step"] = 6.0 * parameters * step_rows * columns
    else:
        columns, canvas_length = args.max_completion_length + 200, args.max_completion_length
        generation = args.generation_config()
        views = args.build_estimator().num_views(_longest(canvas_length, generation.diffusion_steps))
        completions = args.generation_batch_size
        sampling = canvas_length * generation.diffusion_steps * 2 * parameters
        old = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
        scoring = canvas_length * views * 2 * parameters * (old + (args.beta != 0))
        update = canvas_length * views * (4 if trainable < parameters else 6) * parameters
        facts |= {
            "completions a generation batch": completions,
            "prompts a generation batch": completions // args.num_generations,
            "completions an optimizer step": step_rows,
            "optimizer steps a generation batch": args.steps_per_generation
            * args.num_iterations
            / args.gradient_accumulation_steps,
            "decoding steps a completion": generation.diffusion_steps,
            "views a completion": views,
            "FLOPs of sampling a generation batch (d2 App. C.2)": float(sampling * completions),
            "FLOPs of old and reference log-probs": float(scoring * completions),
            "FLOPs of its updates": float(update * completions * args.num_iterations),
        }
    memory = estimate_memory(config, args, model_args, parameters, trainable, columns, rows)
    facts |= {f"GiB a GPU: {name}": value / 2**30 for name, value in memory.items() if value}
    facts["GiB a GPU: total"] = sum(memory.values()) / 2**30
    return facts


def dry_run(command: str, args, model_args) -> dict:
    """Print `describe` as a table, and return it."""
    return _print(command, describe(command, args, model_args))


def dry_run_decoding(command: str, name: str, config, rows: int, batch_size: int, dtype: str = "bfloat16") -> dict:
    """Print what decoding `rows` canvases costs, and return it."""
    model = read_config(name).get_text_config()
    parameters = count_parameters(model)
    size = 4 if dtype == "float32" else 2
    columns, inside = config.max_new_tokens + 200, 2 * (8 * model.hidden_size + 3 * model.intermediate_size)
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
    console.print("Memory is an estimate for prompts of 200 tokens; fragmentation and the framework come on top.")
    return facts


def _longest(canvas_length: int, steps: int) -> Rollout:
    """A rollout of one row that took `steps` steps, for estimators that count their views from one."""
    zeros = torch.zeros(1, canvas_length, dtype=torch.int64)
    return Rollout(
        prompt_ids=zeros[:, :0],
        prompt_mask=zeros[:, :0].bool(),
        completion_ids=zeros,
        unmask_step=torch.arange(canvas_length)[None] * steps // canvas_length,
        logps=zeros.float(),
        counted=torch.ones_like(zeros, dtype=torch.bool),
        view_seed=zeros[:, 0],
        mask_token_id=-1,
    )
