"""What a masked diffusion language model is to transformers.

Importing this package registers the native families, so that `AutoConfig`, `AutoModelForCausalLM` and TRL load their
Hub checkpoints without remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .attention import EVERYTHING, NEVER, Attention, Layout, attention_mask, order_levels, view_inputs
from .dream import DreamConfig, DreamModel
from .flops import FlopsCounter, ForwardFlops, PaperFlops, TrainingFlops, backbone_parameters, paper_flops
from .head import TILE_ROWS, apply_head, entropy, hidden_rows, log_probs, restrict, unwrap
from .llada import KEY_RENAMING, LLaDAConfig, LLaDAModelLM
from .spec import MaskedDiffusionSpec
from .tiny import FAMILIES, create_tiny_model


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
    "log_probs",
    "order_levels",
    "paper_flops",
    "restrict",
    "unwrap",
    "view_inputs",
]

for _config, _model in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    # AutoModel too: Dream's checkpoints, and LLaDA's, name only that one in their auto_map.
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
register_checkpoint_conversion_mapping("LLaDAModelLM", KEY_RENAMING, overwrite=True)
