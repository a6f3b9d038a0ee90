"""Write docs/settings.md from the configs themselves: `python docs/tools/settings.py`."""

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from trl import DPOConfig, GRPOConfig, ScriptArguments, SFTConfig

from trl_dllm import DiffusionDPOConfig, DiffusionGRPOConfig, DiffusionSFTConfig
from trl_dllm.generation import DecodingArguments, DiffusionGenerationConfig
from trl_dllm.scripts.common import TaskArguments
from trl_dllm.scripts.dpo import DiffusionDPOScriptArguments
from trl_dllm.scripts.grpo import DiffusionGRPOScriptArguments
from trl_dllm.trainer.meaning import MACHINE, MEANING, SCHEDULE


PAGE = Path(__file__).parents[1] / "settings.md"

PREFACE = """<!-- Written by `python docs/tools/settings.py`; edit the fields' help, not this page. -->
# Settings

Every field that this library adds to TRL's configs. The same name is an argument of the config class in Python, a
key of a recipe, and `--name value` on the command line. TRL's own fields keep their meaning;
[trl_options.md](trl_options.md) says of each what becomes of it, and `trl-dllm recipe NAME` prints a complete example.
A value of the wrong type, out of range or in contradiction to another is an error before any weight is loaded.

The last column is what another value does to a run that is resumed ([runs.md](runs.md#meaning-schedule-machine)):
*meaning* is refused, *schedule* is taken over and said, *machine* is ignored."""

# heading -> (what stands below it, the config, the class whose fields are not listed)
SECTIONS: dict[str, tuple[str, type, type | None]] = {
    "GRPO": (
        "`DiffusionGRPOConfig`: TRL's `GRPOConfig`, the fields below, and those of [decoding](#decoding). The canvas "
        "length is TRL's `max_completion_length`, the temperature TRL's `temperature`.",
        DiffusionGRPOConfig,
        GRPOConfig,
    ),
    "Decoding": (
        "Fields of `DiffusionGRPOConfig` and `DiffusionGenerationConfig`; flags of `generate`, `eval`, `report` and "
        "`trace`.",
        DecodingArguments,
        None,
    ),
    "Generation": (
        "`DiffusionGenerationConfig`, for `generate(…)` without a trainer: the fields of [decoding](#decoding), and",
        DiffusionGenerationConfig,
        DecodingArguments,
    ),
    "SFT": ("`DiffusionSFTConfig`: TRL's `SFTConfig`, and", DiffusionSFTConfig, SFTConfig),
    "DPO": ("`DiffusionDPOConfig`: TRL's `DPOConfig`, and", DiffusionDPOConfig, DPOConfig),
    "The commands": (
        "Of `trl-dllm grpo`, `sft` and `dpo`: TRL's `ScriptArguments` (`dataset_name`, …) and `ModelConfig` "
        "(`model_name_or_path`, `use_peft`, `lora_r`, `load_in_4bit`, …), and",
        TaskArguments,
        ScriptArguments,
    ),
    "Of grpo alone": ("", DiffusionGRPOScriptArguments, TaskArguments),
    "Of dpo alone": ("", DiffusionDPOScriptArguments, TaskArguments),
}


def added(config: type, beyond: type | None) -> list[Field]:
    """The fields of a config that a base has not, or has with another default; decoding's have their own section."""
    base = {f.name: f for f in fields(beyond)} if beyond else {}
    own = {f.name for f in fields(DecodingArguments)} if config is DiffusionGRPOConfig else set()
    found = [f for f in fields(config) if f.name != "_" and f.name not in own]
    return [f for f in found if f.name not in base or default(f) != default(base[f.name])]


def default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def row(field: Field, hints: dict[str, Any]) -> str:
    kind = inspect.formatannotation(hints[field.name]).replace("typing.", "").replace(" | ", " or ")  # `|` ends a cell
    text = field.metadata["help"].replace("%%", "%")
    others = [name for name, names in (("schedule", SCHEDULE), ("machine", MACHINE)) if field.name in names]
    cells = [
        f"`{field.name}`",
        f"`{kind}`",
        "required" if default(field) is MISSING else f"`{default(field)!r}`",
        text,
        (others or ["meaning" if field.name in MEANING else ""])[0],
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def markdown() -> str:
    parts = [PREFACE]
    for heading, (text, config, beyond) in SECTIONS.items():
        hints = get_type_hints(config)
        head = "| setting | type | default | what it does | resumed with another value |\n|---|---|---|---|---|"
        rows = [row(field, hints) for field in added(config, beyond)]
        parts.append("\n\n".join(part for part in (f"## {heading}", text, "\n".join([head, *rows])) if part))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(markdown())
