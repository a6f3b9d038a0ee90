"""How a completion is drawn."""

from .config import DecodingArguments, DiffusionGenerationConfig, resolve_schedule
from .decode import LogitsNotFinite, generate
from .denoising import default_eos
from .saved import decoding_of, read_decoding, save_decoding, saved_decoding_config


__all__ = [
    "DecodingArguments",
    "DiffusionGenerationConfig",
    "LogitsNotFinite",
    "decoding_of",
    "default_eos",
    "generate",
    "read_decoding",
    "resolve_schedule",
    "save_decoding",
    "saved_decoding_config",
]
