"""PEFT adapters: loaded whole or refused, those trained under a family's original module names among them.

Public adapters of LLaDA were trained on its remote code, whose modules have other names (`transformer.blocks.0.ff_out`
is `layers.0.mlp.down_proj` here). PEFT alone loads nothing of them and warns; here their names are translated by the
rules that rename the checkpoint's own keys.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.other import get_pattern_key
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .head import unwrap


_PREFIX = "base_model.model."  # of the keys in an adapter's file, before the wrapped model's own names
_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What a LoRA config may also say about modules, and what no public adapter of a renamed family uses.
_NOT_TRANSLATED = ("target_parameters", "trainable_token_indices", "layer_replication")


def load_adapter(model, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a model, quantised or not.

    Args:
        model (`PreTrainedModel`): the base model; it is changed in place.
        folder (`str`): folder or Hub name of the adapter.
        is_trainable (`bool`): whether its weights get gradients.

    Returns:
        `PeftModel` with the adapter as "default".

    Raises:
        ValueError: weights in the file that the model has no place for, or places that the file has no weights for;
            an adapter that adds virtual tokens; under original names, any other than LoRA.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise ValueError(
            f"{folder}: a {type(config).__name__} adapter puts virtual tokens before the prompt, which moves every "
            "row that the sampler and the scorer read. Use LoRA."
        )
    names = _native_names(model, load_peft_weights(str(folder), device="cpu"))
    if any(key != name for key, name in names.items()):
        _translate(config, names, folder)
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = model.name_or_path or None  # PEFT warns where it was another folder
    adapted = get_peft_model(model, config)
    load_adapter_weights(adapted, folder)
    return adapted


def load_adapter_weights(model: PeftModel, folder: str | Path, adapter: str = "default") -> None:
    """Load the weights of a saved adapter into the adapter of that name which `model` has.

    Raises:
        ValueError: weights in the file that the model has no place for, or places that the file has no weights for.
    """
    weights = load_peft_weights(str(folder), device="cpu")
    names = _native_names(model, weights)
    state = {names[key]: value for key, value in weights.items()}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(model.peft_config[adapter].peft_type)]
    try:
        result: Any = set_peft_model_state_dict(  # annotated as `namedtuple`, which has no fields
            model, state, adapter_name=adapter
        )
    except KeyError as error:  # of a module that is trained as a whole (modules_to_save)
        missing, unexpected = {error.args[0]}, set()
    else:
        # PEFT before 0.20 names them as in the model, with the adapter's name.
        found = {key.replace(f".{adapter}.", ".") for key in result.unexpected_keys}
        unexpected = {key for key, name in names.items() if name in found}
        missing = {key for key in result.missing_keys if prefix in key and f".{adapter}" in key}
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what}: {_shown(keys)}"
            for what, keys in (
                ("weights of the adapter that the model has no place for", unexpected),
                ("places in the model that the adapter has no weights for", missing),
            )
            if keys
        ]
        raise ValueError(
            f"The adapter {folder} does not fit this {unwrap(model).config.model_type!r} model: {'; '.join(parts)}. "
            "Load it onto the model that it was trained on."
        )


def resume_adapters(model, checkpoint: str | Path) -> None:
    """Load every adapter of a training checkpoint that `model` has; a no-op for a model without PEFT.

    PEFT saves the adapter "default" in the folder itself and any other in one of its name.
    """
    for adapter in getattr(model, "peft_config", {}) if isinstance(model, PeftModel) else ():
        folder = Path(checkpoint) if adapter == "default" else Path(checkpoint) / adapter
        if any((folder / name).is_file() for name in _FILES):
            load_adapter_weights(model, folder, adapter)


# ------------------------------------------------------------------------------------------------------ original names


def _native_names(model, keys: Iterable[str]) -> dict[str, str]:
    """Keys of an adapter's file -> the same with this library's module names."""
    rules = [rule for rule in get_model_conversion_mapping(unwrap(model)) if isinstance(rule, WeightRenaming)]
    names = {}
    for key in keys:
        name = key
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        names[key] = name
    return names


def _translate(config: PeftConfig, names: dict[str, str], folder: str | Path) -> None:
    """Rewrite what a LoRA config says about modules in native names.

    The modules are read off the file's keys. The config's own list does not say which: it may name modules that the
    original model does not have and this one has, and the original `ff_out` is both an MLP's second matrix and the
    head.
    """
    unknown = [name for name in _NOT_TRANSLATED if getattr(config, name, None)]
    if not isinstance(config, LoraConfig) or unknown:
        what = f"its {unknown[0]}={getattr(config, unknown[0])!r}" if unknown else f"peft_type={config.peft_type}"
        raise ValueError(
            f"{folder}: the adapter was trained under the original module names, and {what} cannot be translated to "
            "this library's. Only LoRA on whole modules can; merge it with the code that trained it."
        )
    adapted, whole = {}, set()
    for key, name in names.items():
        if ".lora_" in key:
            adapted[_module(key, ".lora_")] = _module(name, ".lora_")
        else:
            whole.add(name.removeprefix(_PREFIX).rpartition(".")[0])
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, pattern) or {}
        matches = {native: get_pattern_key(list(values), original) for original, native in adapted.items()}
        setattr(config, pattern, {native: values[key] for native, key in matches.items() if key in values})
    config.target_modules = sorted(adapted.values())
    config.modules_to_save = sorted(whole) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _module(key: str, end: str) -> str:
    return key.removeprefix(_PREFIX).split(end)[0]


def _shown(keys: set[str], most: int = 8) -> str:
    first = sorted(keys)[:most]
    return ", ".join(first) + (f" and {len(keys) - most} more" if len(keys) > most else "")
