"""What a masked diffusion language model is to transformers.

Importing this package registers the native families, so that `AutoConfig`, `AutoModelForCausalLM` and TRL load their
Hub checkpoints without remote code.
"""

from .attention import EVERYTHING, NEVER, Attention, Layout, attention_mask, order_levels, view_inputs
from .dream import DreamConfig, DreamModel
from .families import FAMILIES, register_families
from .flops import FlopsCounter, ForwardFlops, PaperFlops, TrainingFlops, backbone_parameters, paper_flops
from .head import TILE_ROWS, apply_head, entropy, hidden_rows, hidden_rows_and_head, log_probs, restrict, unwrap
from .llada import LLaDAConfig, LLaDAModelLM
from .spec import MaskedDiffusionSpec
from .tiny import create_tiny_model


__all__ = [
    "EVERYTHING",
    "FAMILIES",
    "NEVER",
    "TILE_ROWS",
    "Attention",
    "DreamConfig",
    "DreamModel",
    "FlopsCounter",
    "ForwardFlops",
    "LLaDAConfig",
    "LLaDAModelLM",
    "Layout",
    "MaskedDiffusionSpec",
    "PaperFlops",
    "TrainingFlops",
    "apply_head",
    "attention_mask",
    "backbone_parameters",
    "create_tiny_model",
    "entropy",
    "hidden_rows",
    "hidden_rows_and_head",
    "log_probs",
    "order_levels",
    "paper_flops",
    "restrict",
    "unwrap",
    "view_inputs",
]

register_families()
