"""What LoRA adapts where nobody names its modules."""

from .dream import DreamConfig
from .llada import LLaDAConfig


# The linear projections of a layer, which the families share. For stock decoders PEFT takes q and v alone.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def register_lora_targets() -> None:
    """Have PEFT adapt all linear projections of our families in a `LoraConfig` without `target_modules`.

    A function, because importing PEFT takes seconds; the trainers call it when they are imported.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

    for model_type in (LLaDAConfig.model_type, DreamConfig.model_type):
        targets.setdefault(model_type, list(LORA_TARGETS))
