"""What a run asks of the model's modules, checked on a copy without weights before the real ones are loaded."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def check_architecture(
    model: Any, config: Any, args: Any, peft_config: Any = None, trainable_modules: Sequence[str] | None = None
) -> None:
    """Check the attention implementation and the names of modules that an adapter or the user would train.

    Only for a model given by name; it costs a tenth of a second for 8B parameters.

    Args:
        model (`str` or module): what the trainer was given.
        config: the model's config.
        args: the trainer's settings, of which `model_init_kwargs` is read.
        peft_config (`PeftConfig`, *optional*): of a new adapter.
        trainable_modules (`Sequence[str]`, *optional*): ends of the names of modules to train.

    Raises:
        ValueError: naming the setting and what the model has.
        ImportError: an attention implementation whose package is missing.
    """
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not isinstance(model, str) or model_class is None:
        return
    config = copy.deepcopy(config)
    config._attn_implementation = (args.model_init_kwargs or {}).get("attn_implementation")
    with torch.device("meta"):
        bare = model_class(config)
    if trainable_modules is not None:
        find_modules(bare, "trainable_modules", trainable_modules)
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, list | tuple | set):  # else a pattern, or all of them
        find_modules(bare, "target_modules of the adapter (in a recipe lora_target_modules)", sorted(targets))


def find_modules(model: nn.Module, setting: str, names: Sequence[str]) -> list[nn.Module]:
    """The modules whose dotted name ends with one of `names`, as `setting` has them.

    Raises:
        ValueError: a name that no module's name ends with.
    """
    found = []
    for name in names:
        modules = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        if not modules:
            ends = sorted({path.rsplit(".", 2)[-2] for path, _ in model.named_parameters()})
            raise ValueError(
                f"{setting}={list(names)}: no module's name ends with {name!r}. Modules with parameters end with: "
                f"{', '.join(ends)}."
            )
        found += modules
    return found
