"""Tables of all recipes, read from the files: settings from their YAML, what to notice from their head comments."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..recipe import RECIPES, head_comment, load_recipe, recipe_paths
from ..trainer.dpo_config import DiffusionDPOConfig
from ..trainer.grpo_config import DiffusionGRPOConfig
from ..trainer.sft_config import DiffusionSFTConfig


Row = dict[str, str]
_CONFIGS = {"grpo": DiffusionGRPOConfig, "sft": DiffusionSFTConfig, "dpo": DiffusionDPOConfig}


def recipe_tables() -> dict[str, list[Row]]:
    """`{folder: rows}` of all recipes; a row is `{column: text}`, and each command has columns of its own."""
    tables: dict[str, list[Row]] = {}
    for name, path in recipe_paths().items():
        folder, _, short = name.rpartition("/")
        columns = _COLUMNS[path.parent.name](_settings(path))
        row = {"recipe": short, "method": method(path), **columns, "what to notice": notice(path)}
        tables.setdefault(folder, []).append(row)
    return tables


def method(path: Path) -> str:
    """The first paragraph of the recipe's head comment, up to the command."""
    lines = head_comment(path)
    end = next((i for i, line in enumerate(lines) if not line or line.startswith(" ")), len(lines))
    return " ".join(lines[:end])


def notice(path: Path) -> str:
    """What its head comment says after "Notice:"."""
    _, _, text = " ".join(head_comment(path)).partition("Notice: ")
    return text


def markdown() -> str:
    """The page `docs/recipes.md`."""
    parts = [_PREFACE]
    for folder, rows in recipe_tables().items():
        columns = list(rows[0])
        lines = [f"## {folder}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in rows:
            link = f"[{row['recipe']}](../{RECIPES.name}/{folder}/config_{row['recipe']}.yaml)"
            lines.append("| " + " | ".join([link, *list(row.values())[1:]]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_PREFACE = """<!-- Written by `trl-dllm recipe --markdown > docs/recipes.md`; edit the recipes, not this page. -->
# Recipes

`trl-dllm grpo --config llada_8b/grpo/gsm8k_step_merge` runs a recipe by its name, from any folder; `trl-dllm recipe
llada_8b/grpo/gsm8k_step_merge > mine.yaml` writes it out complete, to start your own from. Which numbers are a
paper's, which its code's and which ours stands in the head of each file; what each paper is, in the
[paper index](paper_index.md).

A recipe with a `base`, the path of a file from its own folder, gives what differs from that file. A value replaces the
base's as a whole, lists and mappings too; `null` is a value like any other; a base has no base."""


def _settings(path: Path) -> dict[str, Any]:
    """A recipe's settings, and the trainer's defaults for what it leaves out."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(_CONFIGS[path.parent.name])
    } | load_recipe(path)


def _grpo_columns(s: dict[str, Any]) -> Row:
    arguments = {"num_segments": s["num_segments"], **(s["estimator_kwargs"] or {})}
    arguments |= {key: s[key] for key in ("p_mask_prompt", "score_temperature")}
    steps = f"{s['max_completion_length']} tokens in {s['diffusion_steps']} steps, blocks of {s['block_length']}"
    decoding = [steps, s["remasking"], f"temperature {s['temperature']}"]
    if s["decoding"] != "denoising":
        decoding += [f"decoding {s['decoding']}", f"cache {s['cache']}"]
    loss = [s["loss_type"], f"scale_rewards {s['scale_rewards']}"]
    if s["ratio_denominator"] == "current":
        loss.append("no ratio")
    elif s["loss_type"] != "wd1":  # which has none either
        loss.append(f"epsilon {s['epsilon']:g}")
    if s["importance_sampling_level"] != "token":
        loss.append(f"ratio of a {s['importance_sampling_level']}")
    if s["loss_tokens"] != "eos":
        loss.append(f"loss_tokens {s['loss_tokens']}")
    return {
        "estimator": ", ".join([s["estimator"], *(f"{key} {value}" for key, value in arguments.items() if value)]),
        "decoding": ", ".join(decoding),
        "loss": ", ".join(loss),
        "KL": f"beta {s['beta']:g}, {s['kl_estimator']}" if s["beta"] else "none",
        "inner iterations": str(s["num_iterations"]),
    }


def _sft_columns(s: dict[str, Any]) -> Row:
    adapter = [f"LoRA r {s['lora_r']} on {', '.join(s['lora_target_modules'])}"] if s.get("use_peft") else None
    return {
        "objective": s["objective"],
        "trained": ", ".join(adapter or s["trainable_modules"] or ["all"]),
        "blocks of": str(s["block_length"] or "none"),
        "learning rate": f"{s['learning_rate']:g}",
    }


def _dpo_columns(s: dict[str, Any]) -> Row:
    losses = [s["loss_type"]] if isinstance(s["loss_type"], str) else s["loss_type"]
    weights = s["loss_weights"] or [1] * len(losses)
    return {
        "likelihood": f"{s['estimator']}, num_samples {s['num_samples']}",
        "loss": " + ".join(
            loss if weight == 1 else f"{weight:g} {loss}" for loss, weight in zip(losses, weights, strict=True)
        ),
        "beta": f"{s['beta']:g}",
        "learning rate": f"{s['learning_rate']:g}",
    }


_COLUMNS = {"grpo": _grpo_columns, "sft": _sft_columns, "dpo": _dpo_columns}
