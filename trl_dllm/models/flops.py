"""Floating-point operations of a run: counted from the shapes that were run, and by d2's formula.

The counted figure takes every matrix product of a forward, and of a training step also what the backward pass and its
recomputations multiply: two operations a multiply-add. Norms, rotary embeddings, softmaxes and dequantisation are left
out (under 1 %). `paper_flops` is the estimate that d2 plots its results against.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .head import in_tiles, kept_rows, unwrap


# The order in which the parts of a decoder layer run; parts with the same number do not read each other.
_STAGES = {
    "input_layernorm": 0,
    "q_proj": 1,
    "k_proj": 1,
    "v_proj": 1,
    "q_norm": 2,
    "k_norm": 2,
    "o_proj": 4,
    "post_attention_layernorm": 5,
    "gate": 6,  # a router, and the experts' fused matrices
    "gate_up_proj": 6,
    "gate_proj": 6,
    "up_proj": 6,
    "c_fc": 6,
    "down_proj": 7,
    "c_proj": 7,
}
_ATTENTION = 3

# What PEFT puts into the name of a weight that it wraps or copies.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")

# (layer, stage, 1 behind an adapter's first matrix): sorts a model's parts by when they run.
Position = tuple[int, int, int]
_EMBEDDINGS: Position = (-1, 0, 0)


class _Matrix(NamedTuple):
    """A weight that each token is multiplied with."""

    name: str
    cost: int  # operations of one product with one token
    adapter: str | None = None  # the LoRA adapter that it belongs to
    in_head: bool = False
    routed: bool = False  # a router's or an expert's, which are parameters and no linear layers


class ForwardFlops:
    """Operations of forwards of `model`, wrapped or not; under PEFT of the adapters that are active at the call.

    Linear layers (LoRA's two matrices too) cost 2·in·out a token, attention 4·heads·head_dim a (query, key) pair and
    layer whatever its mask, and the head 2·hidden·V for each row that it is applied to, in whole tiles. Of adapters,
    LoRA's are counted; of a layer's experts, as many as a token is sent to.
    """

    def __init__(self, model: nn.Module):
        bare = cast(PreTrainedModel, unwrap(model))
        config = bare.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None)
        width: int = config.num_attention_heads * head_dim if head_dim else config.hidden_size  # of all heads together
        self.per_pair = 4 * width * self.num_layers
        self._matrices = _matrices(bare)
        # PEFT switches all layers together, so that one of them says which adapters run.
        self._adapted: Any = next((module for module in bare.modules() if isinstance(module, _adapted_layers())), None)

    def __call__(self, rows: int, queries: int, keys: int, head_rows: int, together: int = 1) -> int:
        """Operations of a forward.

        Args:
            rows (`int`): rows of the batch; prompts that several completions share are run, and count, once.
            queries (`int`): positions that are run in each row: P + L, P + 2L, or fewer with a cache.
            keys (`int`): positions that each of them attends to.
            head_rows (`int`): results that are wanted of the head, in the whole batch.
            together (`int`): rows of hidden states that a result is reduced from (2 with guidance).
        """
        tokens = rows * queries
        head = together * in_tiles(head_rows) * self.per_head_row
        return tokens * (self.per_token + keys * self.per_pair) + head

    @property
    def per_token(self) -> int:
        """Operations of the linear layers for a token."""
        return self._cost(self._active_adapters())

    @property
    def per_head_row(self) -> int:
        """Operations of the output head for a row of hidden states."""
        return self._cost(self._active_adapters(), in_head=True)

    def _cost(self, adapters: tuple[str, ...], in_head: bool = False) -> int:
        return sum(m.cost for m in self._matrices if m.in_head == in_head and m.adapter in (None, *adapters))

    def _active_adapters(self) -> tuple[str, ...]:
        layer = self._adapted
        return () if layer is None or layer.disable_adapters or layer.merged else tuple(layer.active_adapters)


class TrainingFlops(ForwardFlops):
    """Operations of scoring and training on views, of a model whose trained parameters are fixed by now.

    The backward pass multiplies once more for the gradient of a matrix's input, where anything before it is trained,
    and once more for the matrix's own gradient, where it is trained itself; attention takes 2.5 forwards (2 if
    `eager`, less where training begins at some of q, k and v). Gradient checkpointing adds a forward of each layer,
    without its last product unless it is reentrant (recomputation stops where nothing more is needed). Tiles of the
    head whose logits are not kept are computed twice.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._model = cast(PreTrainedModel, unwrap(model))
        self._layers = [m for m in self._model.modules() if isinstance(m, GradientCheckpointingLayer)]
        fused = self._model.config.get_text_config()._attn_implementation != "eager"
        self._fused = fused
        self._reference_adapters = ("ref",) if any(m.adapter == "ref" for m in self._matrices) else ()
        self._embeddings = _name_of(self._model, self._model.get_input_embeddings())
        self._head = _name_of(self._model, self._model.get_output_embeddings())
        trained = {
            _WRAPPERS.sub("", name)
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        self._trained = {
            m for m in self._matrices if _WRAPPERS.sub("", m.name if m.routed else f"{m.name}.weight") in trained
        }
        self._positions = {m: self._position(m.name) for m in self._matrices}
        self._first = min(map(self._position, trained), default=None)

    def _position(self, name: str) -> Position:
        """Where a module or parameter stands among the model's parts."""
        parts = name.split(".")
        behind = int("lora_B" in parts)
        if _inside(name, self._embeddings):
            return _EMBEDDINGS
        if _inside(name, self._head):
            return self.num_layers, 1, behind
        layer = next((int(part) for part in parts if part.isdigit()), self.num_layers)
        return layer, next((_STAGES[part] for part in parts if part in _STAGES), 0), behind

    def view(self, rows: int, width: int, head_rows: int, training: bool, reference: bool = False) -> int:
        """Operations of running a view of `rows` rows of `width` tokens (P + L, P + 2L), the head at `head_rows` rows.

        Args:
            training (`bool`): with gradients; the backward pass is counted too.
            reference (`bool`): with the reference model run on the same view without gradients, for the full KL.
        """
        tokens, tile_rows = rows * width, in_tiles(head_rows)
        total = self(rows, width, width, head_rows)
        if reference:
            total += tokens * (self._cost(self._reference_adapters) + width * self.per_pair)
            total += tile_rows * self._cost((), in_head=True) * (1 + training)
        # Beside a reference no tile is kept.
        kept = 0 if reference else kept_rows(self._model.get_output_embeddings(), head_rows, self._model.dtype)
        return total + (self._backward(tokens, width, tile_rows, tile_rows - kept) if training else 0)

    def _backward(self, tokens: int, width: int, tile_rows: int, again: int) -> int:
        # The first position whose output has a gradient. Transformers gives the embeddings' one by a hook, which comes
        # with checkpointing.
        first = _EMBEDDINGS if getattr(self._model, "_require_grads_hook", None) is not None else self._first
        if first is None:
            return 0
        per_token = per_head_row = recomputed = 0
        running = [m for m in self._matrices if m.adapter in (None, *self._active_adapters())]
        for matrix in running:
            gradients = (first < self._positions[matrix]) + (matrix in self._trained)
            if matrix.in_head:
                per_head_row += matrix.cost * gradients
                recomputed += matrix.cost
            else:
                per_token += matrix.cost * gradients
        attention = sum(self._attention(n, first) for n in range(self.num_layers) if first < (n, _ATTENTION, 0))
        for number, layer in enumerate(self._layers):
            if layer.gradient_checkpointing and layer.training and first < (number + 1, 0, 0):
                inside = [m for m in running if self._positions[m][0] == number]
                per_token += sum(m.cost for m in inside)
                attention += 1
                reentrant = getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
                last = max(reversed(inside), key=self._positions.__getitem__, default=None)
                # What an expert gives is needed: the routing weight that multiplies it has a gradient.
                if last is not None and not reentrant and not last.routed:
                    per_token -= last.cost
        per_pair = int(attention * self.per_pair / self.num_layers)
        return tokens * (per_token + width * per_pair) + tile_rows * per_head_row + again * recomputed

    def _attention(self, layer: int, first: Position) -> float:
        """Forwards of a layer's attention that its backward pass takes: a product for each of v, the weights, q, k."""
        stage = (layer, _STAGES["q_proj"], 0)
        needed = {m.name.split("_proj")[0][-1] for m in self._trained if self._positions[m][:2] == stage[:2]}
        if self._fused or first < stage or not needed:
            return 2.5 if self._fused else 2.0
        return len(needed) / 2 + (0.5 if needed & {"q", "k"} else 0)


def backbone_parameters(model: nn.Module) -> int:
    """Weights of the model itself, embeddings and head included, without the adapters that PEFT put on it.

    Packed 4-bit weights count as what they stand for, and those that other processes hold (ZeRO-3) are counted too.
    """
    bare = unwrap(model)
    adapters = {
        id(parameter)
        for module in bare.modules()
        if isinstance(module, _peft_wrappers())
        for name in cast(Any, module).adapter_layer_names
        if isinstance(holder := getattr(module, name, None), nn.Module)
        for parameter in holder.parameters()
    }
    return sum(_numel(parameter) for parameter in bare.parameters() if id(parameter) not in adapters)


class PaperFlops(NamedTuple):
    """Operations of a generation batch and of all updates on it, by d2 App. C.2."""

    sampling: int
    old: int
    reference: int
    updates: int

    @property
    def total(self) -> int:
        return sum(self)


def paper_flops(
    *,
    parameters: int,
    canvas_length: int,
    completions: int,
    steps: int,
    views: int,
    inner_iterations: int,
    frozen_backbone: bool,
    scores_old: bool,
    scores_reference: bool,
    draws: int = 1,
    full_kl: bool = False,
) -> PaperFlops:
    """d2's estimate (App. C.2), for G completions on canvases of L tokens, sampled in T steps and scored on N views.

    Sampling L·G·T·2P; old and reference log-probs L·G·N·2P each; an update L·G·N·4P through a frozen backbone, 6P if
    all of it is trained. Prompts, attention and adapters are left out: P, `parameters`, are the backbone's (see
    `backbone_parameters`), as the paper counts 8 billion for LLaDA-8B with LoRA.

    Args:
        inner_iterations (`int`): μ, updates on a generation batch.
        scores_old, scores_reference (`bool`): whether these policies' log-probs are computed before the updates.
        draws (`int`): times that they are, if views are redrawn in each inner iteration.
        full_kl (`bool`): the reference is run in each update (L·G·N·2P more).
    """
    forward = 2 * parameters * canvas_length * completions
    update = (2 if frozen_backbone else 3) + full_kl
    return PaperFlops(
        sampling=forward * steps,
        old=forward * views * draws * scores_old,
        reference=forward * views * draws * scores_reference,
        updates=forward * views * inner_iterations * update,
    )


@dataclass
class FlopsCounter:
    """A run's operations so far on this process, in training alone.

    Args:
        counted (`int`): from the shapes that were run.
        paper (`int`): by d2's formula; a generation batch brings all updates on it at once.
    """

    counted: int = 0
    paper: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"counted": self.counted, "paper": self.paper}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counted, self.paper = state["counted"], state["paper"]


def _adapted_layers() -> tuple[type, ...]:
    """PEFT's layers with an adapter; none where PEFT was never imported, as importing this package does not."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return () if tuners is None else (tuners.BaseTunerLayer,)


def _peft_wrappers() -> tuple[type, ...]:
    """Those, and PEFT's wrappers of modules that it copies and trains."""
    other = sys.modules.get("peft.utils.other")
    return _adapted_layers() if other is None else (*_adapted_layers(), other.AuxiliaryTrainingWrapper)


def _matrices(model: PreTrainedModel) -> list[_Matrix]:
    head = _name_of(model, model.get_output_embeddings())
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", 0)
    found = []
    for name, module in model.named_modules():
        found += [_Matrix(f"{name}.{part}", cost, routed=True) for part, cost in _routed(module, top_k)]
        # A wrapper shows the shape of what it wraps, and a copy that PEFT trains has the shape of its original.
        wrapper = isinstance(module, _peft_wrappers()) or "modules_to_save" in name
        if wrapper or not hasattr(module, "in_features") or not hasattr(module, "out_features"):
            continue
        # in_features, not numel(): 4-bit weights are packed and ZeRO-3 weights are partitioned.
        cost = 2 * cast(int, module.in_features) * cast(int, module.out_features)
        parts = name.split(".")
        adapter = parts[-1] if parts[-2:-1] in (["lora_A"], ["lora_B"]) else None
        found.append(_Matrix(name, cost, adapter, _inside(name, head)))
    return found


def _routed(module: nn.Module, top_k: int) -> Iterator[tuple[str, int]]:
    """Weights of a router or of a layer's experts, which are no linear layers, and a token's operations with each."""
    weights = {name: _numel(parameter) for name, parameter in module.named_parameters(recurse=False)}
    if hasattr(module, "top_k") and "weight" in weights:
        yield "weight", 2 * weights["weight"]
    elif "gate_up_proj" in weights:
        for name in ("gate_up_proj", "down_proj"):
            yield name, 2 * weights[name] // cast(Any, module).num_experts * top_k


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _inside(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _numel(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
