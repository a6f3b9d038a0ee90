"""Eso-LM (190M), converted: Starcoder2 with a bias on its head, for any-order decoding of one token a step.

Its Hub checkpoints are a diffusion transformer whose norms and gates follow the time; but time conditioning is off,
so they are the same at every time and fold into stock weights, once: `trl-dllm convert eso_lm`. That cannot be undone,
and what trains is not quite what trained before: weight decay and LoRA act on the folded weights, the gates are gone,
and the attention's biases, zero at first, are new.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Starcoder2Config, Starcoder2ForCausalLM

from .hub import HubConfig, HubKeys


# The Hub's config name -> the converted one's. `cond_dim`, the width of the time's embedding, folds away.
_CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "mask_index": "mask_token_id",
    "model_length": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}
_PREFIX = "backbone."
_TABLE = "rotary_emb.inv_freq"  # a buffer that the config determines


class EsoLMConfig(HubConfig, Starcoder2Config):
    """Config of a converted Eso-LM.

    Args:
        mask_token_id (`int`, defaults to 50257): id of the mask token.
        is_causal (`bool`, defaults to `False`): which position sees which is the decoding order's to say.
    """

    model_type = "eso_lm"
    hub_fixed = {"hidden_act": ("gelu_pytorch_tanh",), "sliding_window": (None,), "use_bias": (True,)}  # noqa: RUF012

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = 50256
    mask_token_id: int = 50257
    is_causal: bool = False


class EsoLMForCausalLM(HubKeys, Starcoder2ForCausalLM):
    """A converted Eso-LM: the row at a position predicts that position."""

    config_class = EsoLMConfig
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")

    def __init__(self, config: EsoLMConfig, **unknown: Any) -> None:
        super().__init__(config, **unknown)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()


class EsoLMHubConfig(PreTrainedConfig):
    """What a folder of the Hub calls itself before it is converted: it says so."""

    model_type = "EsoLM"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"model_type={cls.model_type!r} is Eso-LM as it stands on the Hub, which needs its own code to run. "
            "Convert it once: trl-dllm convert eso_lm FOLDER OUTPUT_DIR, and name OUTPUT_DIR."
        )


def convert_config(hub: Mapping[str, Any], state: Mapping[str, Tensor]) -> EsoLMConfig:
    """The converted config of a Hub checkpoint's `config.json` and weights.

    Raises:
        ValueError: time conditioning, or a field that is missing or not a whole number.
    """
    if hub.get("time_conditioning"):
        raise ValueError(
            f"time_conditioning={hub['time_conditioning']!r} in the config: norms and gates of this checkpoint follow "
            "the time, and cannot be folded into weights. Use one that was trained without it, as Eso-LM-B's are."
        )
    missing = [name for name in _CONFIG_NAMES if not isinstance(hub.get(name), int)]
    if missing:
        raise ValueError(
            f"{', '.join(f'{name}={hub.get(name)!r}' for name in missing)} in the config, where Eso-LM's has a whole "
            "number. Give the config.json of the Hub's export (model_type EsoLM), not a training run's."
        )
    if hub["hidden_size"] % hub["n_heads"]:
        raise ValueError(
            f"hidden_size={hub['hidden_size']} is no multiple of n_heads={hub['n_heads']} in the config. Take the "
            "config.json that came with the weights."
        )
    fields = {name: hub[original] for original, name in _CONFIG_NAMES.items()}
    mlp = state.get(f"{_PREFIX}blocks.0.mlp.0.weight")
    width = 4 * hub["hidden_size"] if mlp is None else mlp.shape[0]
    return EsoLMConfig(**fields, num_key_value_heads=hub["n_heads"], intermediate_size=width)


def fold(config: EsoLMConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `EsoLMForCausalLM` that compute what Eso-LM's own (keys below `backbone.`) do without a time.

    A norm's output is `norm(x)·weight·(1 + scale) + shift` and a branch adds `gate·branch(x)`, with scale, shift and
    gate of the constant embedding of time 0. Folded in float64, and rounded once.

    Raises:
        ValueError: keys that are missing, unknown, or of another shape than the config says.
    """
    state = {key.removeprefix(_PREFIX): value for key, value in state.items() if not key.endswith(_TABLE)}
    _check_keys(config, state)
    weights = {key: value.double() for key, value in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    # The embedding of time 0: cosines of 0, then sines of 0.
    half = weights["sigma_map.mlp.0.weight"].shape[1] // 2
    zero = torch.cat([torch.ones(half), torch.zeros(half)]).double()
    silu = nn.functional.silu
    time = silu(linear(silu(linear(zero, "sigma_map.mlp.0")), "sigma_map.mlp.2"))

    embeddings = weights["vocab_embed.embedding"]
    head = {part: weights[f"output_layer.linear.{part}"] for part in ("weight", "bias")}
    shift, scale = linear(time, "output_layer.adaLN_modulation").chunk(2)
    folded = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": weights["output_layer.norm_final.weight"] * (1 + scale),
        "model.norm.bias": shift,
        "lm_head.weight": head["weight"],
        "lm_head.bias": head["bias"],
    }
    for n in range(config.num_hidden_layers):
        block, layer = f"blocks.{n}", f"model.layers.{n}"
        first, second = linear(time, f"{block}.adaLN_modulation").chunk(2)  # of the attention, of the MLP
        for name, norm, modulation in (
            ("input_layernorm", "norm1", first),
            ("post_attention_layernorm", "norm2", second),
        ):
            shift, scale, _ = modulation.chunk(3)
            folded[f"{layer}.{name}.weight"] = weights[f"{block}.{norm}.weight"] * (1 + scale)
            folded[f"{layer}.{name}.bias"] = shift
        attention, mlp = first.chunk(3)[2][:, None], second.chunk(3)[2]  # the gates
        projections = dict(zip("qkv", weights[f"{block}.attn_qkv.weight"].chunk(3), strict=True))
        projections["o"] = attention * weights[f"{block}.attn_out.weight"]
        for name, weight in projections.items():
            folded[f"{layer}.self_attn.{name}_proj.weight"] = weight
            folded[f"{layer}.self_attn.{name}_proj.bias"] = weight.new_zeros(len(weight))
        folded[f"{layer}.mlp.c_fc.weight"] = weights[f"{block}.mlp.0.weight"]
        folded[f"{layer}.mlp.c_fc.bias"] = weights[f"{block}.mlp.0.bias"]
        folded[f"{layer}.mlp.c_proj.weight"] = mlp[:, None] * weights[f"{block}.mlp.2.weight"]
        folded[f"{layer}.mlp.c_proj.bias"] = mlp * weights[f"{block}.mlp.2.bias"]
    dtype = state["vocab_embed.embedding"].dtype
    return {key: value.to(dtype).contiguous() for key, value in folded.items()}


def _check_keys(config: EsoLMConfig, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the keys, without their prefix, and their shapes are those of Eso-LM."""
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    first = state.get("sigma_map.mlp.0.weight", torch.empty(0, 0))
    time, waves = first.shape if first.dim() == 2 else (0, 0)
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (vocab, hidden),
        "sigma_map.mlp.0.weight": (time, waves),
        "sigma_map.mlp.0.bias": (time,),
        "sigma_map.mlp.2.weight": (time, time),
        "sigma_map.mlp.2.bias": (time,),
        "output_layer.norm_final.weight": (hidden,),
        "output_layer.linear.weight": (vocab, hidden),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * hidden, time),
        "output_layer.adaLN_modulation.bias": (2 * hidden,),
    }
    for n in range(config.num_hidden_layers):
        parts: dict[str, tuple[int, ...]] = {
            "norm1.weight": (hidden,),
            "attn_qkv.weight": (3 * hidden, hidden),
            "attn_out.weight": (hidden, hidden),
            "norm2.weight": (hidden,),
            "mlp.0.weight": (mlp, hidden),
            "mlp.0.bias": (mlp,),
            "mlp.2.weight": (hidden, mlp),
            "mlp.2.bias": (hidden,),
            "adaLN_modulation.weight": (6 * hidden, time),
            "adaLN_modulation.bias": (6 * hidden,),
        }
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in parts.items()}
    for kind, keys in (("missing", shapes.keys() - state.keys()), ("unknown", state.keys() - shapes.keys())):
        if keys:
            raise ValueError(
                f"{_some(keys)} {'is' if len(keys) == 1 else 'are'} {kind} among the weights: they are not those "
                f"of an Eso-LM with n_blocks={config.num_hidden_layers}. Take config.json and weights of one "
                "checkpoint of the Hub (Eso-LM-B-alpha-1)."
            )
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"{_PREFIX}{key} has the shape {tuple(state[key].shape)}, and config.json says {shape}. Take both of "
                "one checkpoint."
            )


def _some(keys: set[str]) -> str:
    names = sorted(_PREFIX + key for key in keys)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
