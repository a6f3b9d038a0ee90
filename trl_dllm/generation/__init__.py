"""How a completion is drawn."""

from .config import DecodingArguments, DiffusionGenerationConfig, resolve_schedule
from .decode import LogitsNotFinite, generate
from .denoising import default_eos


__all__ = [
    "DecodingArguments",
    "DiffusionGenerationConfig",
    "LogitsNotFinite",
    "default_eos",
    "generate",
    "resolve_schedule",
]
