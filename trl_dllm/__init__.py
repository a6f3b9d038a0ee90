"""TRL's GRPO for masked diffusion language models.

    from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer

Importing the package registers the model families with transformers; the trainers load TRL only when they are asked
for.
"""

from importlib import import_module

from . import models  # noqa: F401  registers LLaDA, Dream, …
from ._version import __version__
from .rollout import Rollout


_LAZY = {
    "DiffusionDPOConfig": ".trainer.dpo_config",
    "DiffusionDPOTrainer": ".trainer.dpo_trainer",
    "DiffusionGRPOConfig": ".trainer.grpo_config",
    "DiffusionGRPOTrainer": ".trainer.grpo_trainer",
    "DiffusionSFTConfig": ".trainer.sft_config",
    "DiffusionSFTTrainer": ".trainer.sft_trainer",
}

__all__ = ["Rollout", "__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
