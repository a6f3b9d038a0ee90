"""How a completion is drawn."""

from .config import DiffusionGenerationConfig, resolve_schedule
from .decode import generate
from .denoising import default_eos


__all__ = ["DiffusionGenerationConfig", "default_eos", "generate", "resolve_schedule"]
