"""The families with a class of their own: one row a family. A new one is a file beside this and a row here."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .a2d import (
    A2DLlamaConfig,
    A2DLlamaLMHeadModel,
    A2DQwen2Config,
    A2DQwen2LMHeadModel,
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
)
from .dream import DreamConfig, DreamModel, DreamTokenizer
from .eso_lm import EsoLMConfig, EsoLMForCausalLM, EsoLMHubConfig
from .hub import HubConfig, HubKeys
from .illada import ILLaDAConfig, ILLaDAForCausalLM
from .llada import LLaDAConfig, LLaDAModelLM
from .llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from .llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from .sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM


FAMILIES: dict[str, tuple[type[HubConfig], type[HubKeys]]] = {
    "llada": (LLaDAConfig, LLaDAModelLM),
    "llada_moe": (LLaDAMoEConfig, LLaDAMoEModelLM),
    "illada": (ILLaDAConfig, ILLaDAForCausalLM),
    "dream": (DreamConfig, DreamModel),
    "a2d_qwen3": (A2DQwen3Config, A2DQwen3LMHeadModel),
    "a2d_qwen2": (A2DQwen2Config, A2DQwen2LMHeadModel),
    "a2d_llama": (A2DLlamaConfig, A2DLlamaLMHeadModel),
    "sdar": (SDARConfig, SDARForCausalLM),
    "sdar_moe": (SDARMoeConfig, SDARMoeForCausalLM),
    "llada2": (LLaDA2MoeConfig, LLaDA2MoeModelLM),
    "eso_lm": (EsoLMConfig, EsoLMForCausalLM),
}


def register_families() -> None:
    """Have `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` take the native classes."""
    for config, model in FAMILIES.values():
        if config is not LLaDAMoEConfig:  # which LLaDAConfig, of the same model_type, gives way to
            AutoConfig.register(config.model_type, config, exist_ok=True)
        # AutoModel too: some checkpoints name only that one in their auto_map.
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        if model.hub_conversion:
            register_checkpoint_conversion_mapping(model.__name__, model.hub_conversion, overwrite=True)
    AutoConfig.register(EsoLMHubConfig.model_type, EsoLMHubConfig, exist_ok=True)
    AutoTokenizer.register(DreamConfig, DreamTokenizer, exist_ok=True)
