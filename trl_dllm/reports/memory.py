"""Memory of a training step: what is alive while it runs, and what of it sharding divides.

`Memory` watches every operation, on real tensors or on fake ones, and counts storages from their making to their end.
It tells gradients and optimizer states from the rest (activations, head tiles, masks, a cache), so that one
measurement on one process says what every way of sharding takes: see `Sharding`.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(NamedTuple):
    """Bytes of what changes while a step runs."""

    gradients: int
    optimizer: int
    activations: int


class Memory(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while the mode is on, and is still alive.

    What exists before (weights) is not counted; see `weight_bytes`. Of a fake tensor its value is asked in vain: it is
    1 where an operation reads one back, and every entry of it counts where an operation looks for those that do.

    Args:
        models (`nn.Module`): whose weights are not counted, and whose gradients are told from other tensors; the
            trained one first.
    """

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.models, self.phase = models, "training"
        self._kind = "activations"
        self._live = dict.fromkeys([*Live._fields, "weights"], 0)
        self._kinds: dict[int, str] = {}  # of each storage alive
        self._most: dict[tuple[str, int, int], int] = {}  # (phase, gradients, optimizer): most activations beside them
        self._hooks: list[Any] = []

    def __enter__(self):
        for model in self.models:  # whose views are no new tensors
            for storage in storages_of(model):
                self._kinds[storage._cdata] = "weights"
        parameters = [p for model in self.models for p in model.parameters() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in parameters]
        # What an optimizer makes, states and temporaries, is as large as its part of the weights.
        self._hooks.append(register_optimizer_step_pre_hook(lambda *_: setattr(self, "_kind", "optimizer")))
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: setattr(self, "_kind", "activations")))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        out = func(*args, **(kwargs or {}))
        for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    @property
    def peaks(self) -> dict[str, list[Live]]:
        """For each phase, the moments of which one is the fullest, whatever part of each kind is counted.

        Optimizer states that are there at the end were made by the first step, and stay: they are at each moment.
        """
        out: dict[str, list[Live]] = {}
        for (phase, gradients, optimizer), activations in self._most.items():
            out.setdefault(phase, []).append(Live(gradients, max(optimizer, self._live["optimizer"]), activations))
        return out

    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max((sum(live) for moments in self.peaks.values() for live in moments), default=0)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what is alive to a phase of its own."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def put_gradients(self) -> None:
        """Give each trained weight of the first model a gradient, as an earlier backward pass would have."""
        before, self._kind = self._kind, "gradients"
        for parameter in self.models[0].parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        self._kind = before

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = self._kind
        self._live[self._kind] += size
        weakref.finalize(storage, self._remove, key, size)
        self._look()

    def _remove(self, key: int, size: int) -> None:
        self._live[self._kinds.pop(key)] -= size

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        kind = self._kinds.get(storage._cdata)
        if kind not in (None, "gradients"):
            self._kinds[storage._cdata] = "gradients"
            self._live[kind] -= storage.nbytes()
            self._live["gradients"] += storage.nbytes()
            self._look()

    def _look(self) -> None:
        live = self._live
        key = (self.phase, live["gradients"], live["optimizer"])
        if live["activations"] > self._most.get(key, -1):
            self._most[key] = live["activations"]


def weight_bytes(model: nn.Module, trained: bool | None = None) -> int:
    """Bytes of a model's parameters and buffers; of the trained ones or the others alone, if told so."""
    return sum(storage.nbytes() for storage in storages_of(model, trained))


def storages_of(model: nn.Module, trained: bool | None = None) -> list[torch.UntypedStorage]:
    """The storages behind them, each once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if trained is None or tensor.requires_grad == trained:
            state = getattr(tensor, "quant_state", None)
            for part in [tensor, *(_state_tensors(state) if state is not None else ())]:
                found[part.untyped_storage()._cdata] = part.untyped_storage()
    return list(found.values())


def _state_tensors(state: Any) -> list[Tensor]:
    """The tensors of bitsandbytes' state of a 4-bit weight."""
    parts = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        parts += _state_tensors(state.state2)
    return [part for part in parts if isinstance(part, Tensor)]


@dataclass(frozen=True)
class Footprint:
    """What a step takes on one process that has everything.

    Args:
        frozen, trained, reference (`int`): bytes of weights.
        parameters (`int`): number of trained weights.
        size (`int`): bytes of one of them.
        mixed (`bool`): whether it is trained in mixed precision, as it is where `bf16` or `fp16` is set.
        largest (`int`): bytes of the largest part of the model that is gathered at a time under ZeRO-3 and FSDP2.
        peaks (`dict`): of `Memory`.
    """

    frozen: int
    trained: int
    reference: int
    parameters: int
    size: int
    mixed: bool
    largest: int
    peaks: dict[str, list[Live]] = field(repr=False)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        moments = [sum(live) for moments in self.peaks.values() for live in moments]
        return self.frozen + self.trained + self.reference + max(moments)


SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Sharding:
    """How a step is spread over processes.

    Args:
        kind (`str`): one of `SHARDINGS`.
        processes (`int`): among which what is divided is divided.
        gathers (`bool`): under ZeRO-3, whether the whole policy is gathered while completions are drawn.
    """

    kind: str = "none"
    processes: int = 1
    gathers: bool = True

    def __post_init__(self):
        if self.kind not in SHARDINGS:
            raise ValueError(f"sharding={self.kind!r} is unknown; choose one of {', '.join(SHARDINGS)}.")

    @staticmethod
    def of(args: Any) -> "Sharding":
        """That of a run which was launched, or of one that is given DeepSpeed's or FSDP's settings."""
        stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", None)
        processes = max(1, args.world_size)
        kind = f"zero{stage}" if stage else "fsdp2" if args.fsdp else "ddp" if processes > 1 else "none"
        return Sharding(kind, processes)

    def memory(self, footprint: Footprint) -> dict[str, int]:
        """Bytes a GPU at the fullest moment, by part; `total` is their sum.

        The stage's own rules, on what one process measured. ZeRO-1 divides optimizer states, ZeRO-2 gradients too,
        ZeRO-3 and FSDP2 weights too, which are gathered a part at a time. In mixed precision DeepSpeed has trained
        weights in two bytes and steps on float32 copies, whose states are float32 like them, and FSDP2 trains in
        float32. DDP reduces gradients in buckets beside them.
        """
        part, kind = 1 / self.processes, self.kind
        deepspeed, whole = kind.startswith("zero"), kind in ("zero3", "fsdp2")
        size = footprint.size
        if footprint.mixed:
            size = 2 if deepspeed else 4 if kind == "fsdp2" else size
        scale, share = size / footprint.size, part if whole else 1.0
        weights = (footprint.frozen + footprint.trained * scale) * share
        master = 4 * footprint.parameters * part if deepspeed and size < 4 else 0
        per_gradient = scale * (part if whole or kind == "zero2" else 1.0) + (kind == "ddp")
        per_state = 4 / footprint.size * part if deepspeed or whole else 1.0
        found: dict[str, int] = {}
        for phase, moments in footprint.peaks.items():
            gathered = footprint.largest if whole else 0
            if kind == "zero3" and phase == "sampling" and self.gathers:
                gathered = footprint.frozen + footprint.trained
            for live in moments:
                parts = {
                    "weights": weights,
                    "gathered weights": gathered,
                    "gradients": live.gradients * per_gradient,
                    "optimizer": live.optimizer * per_state + master,
                    "activations": live.activations,
                    "reference": footprint.reference * share,
                }
                total = sum(parts.values())
                if total > found.get("total", -1):
                    found = {name: int(value) for name, value in parts.items()} | {"total": int(total)}
        return found
