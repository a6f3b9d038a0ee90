"""How a completion is drawn."""

from .config import DiffusionGenerationConfig, resolve_schedule
from .denoising import default_eos, generate


__all__ = ["DiffusionGenerationConfig", "default_eos", "generate", "resolve_schedule"]
