"""What LoRA adapts where nobody names its modules."""

from .families import FAMILIES


# The linear projections of a layer, by the names that almost all families share; the others' classes have their own
# `lora_targets`. For stock decoders PEFT takes q and v alone.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def register_lora_targets() -> None:
    """Have PEFT adapt all linear projections of our families in a `LoraConfig` without `target_modules`.

    A function, because importing PEFT takes seconds; the trainers call it when they are imported.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

    for config, model in FAMILIES.values():
        targets.setdefault(config.model_type, list(getattr(model, "lora_targets", LORA_TARGETS)))
