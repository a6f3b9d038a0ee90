"""A rollout: prompts, the completions drawn for them, and how they were drawn."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks


_CANVAS_FIELDS = ("completion_ids", "unmask_step", "logps", "counted")


@dataclass(frozen=True)
class Rollout:
    """Completions with the trajectory that produced them, aligned by row.

    Args:
        prompt_ids (`Tensor` of shape (B, P), int64): left-padded prompts; P may be 0.
        prompt_mask (`Tensor` of shape (B, P), bool): True on prompt tokens, False on padding.
        completion_ids (`Tensor` of shape (B, L), int64): the final canvas; a position never revealed holds the mask
            token.
        unmask_step (`Tensor` of shape (B, L), int64): the decoding step that revealed the position, -1 for never.
        logps (`Tensor` of shape (B, L), float): nats; the sampler's log-prob of each revealed token, 0 elsewhere.
        counted (`Tensor` of shape (B, L), bool): positions that the loss counts.
        view_seed (`Tensor` of shape (B,), int64): everything random in a row's views is a function of it.
        support (`Tensor` of shape (B, L, K), int32, *optional*): where the draw was truncated (top-k, top-p, min-p),
            the tokens that could be drawn at each revealed position, -1 for none; every policy is scored among them.
            None: all tokens.
        advantages (`Tensor` of shape (B,) or (B, L), *optional*): of the rows, where a loss is computed; an estimator
            may read their sign (`Estimator.signed`).
        mask_token_id (`int`): id of the mask token.
        temperature (`float`): sampling temperature; log-probs of a greedy rollout (0) are taken at 1.
        steps (`int`, *optional*): T of the schedule that drew every row, also those that stopped at their EOS. None:
            each row took its own number, as with a threshold or in a block-causal model.
        blocks (`Blocks`, *optional*): in which the model was shown the canvas; None: all of it at once.
        num_forwards (`int`): model calls that drew this batch.
        flops (`int`): forward floating-point operations counted for them.

    Raises:
        ValueError: shapes disagree, or a position's step and its token contradict each other.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    unmask_step: Tensor
    logps: Tensor
    counted: Tensor
    view_seed: Tensor
    mask_token_id: int
    temperature: float = 1.0
    num_forwards: int = 0
    flops: int = 0
    support: Tensor | None = None
    advantages: Tensor | None = None
    steps: int | None = None
    blocks: Blocks | None = None

    def __post_init__(self):
        object.__setattr__(self, "prompt_mask", self.prompt_mask.bool())
        object.__setattr__(self, "counted", self.counted.bool())
        rows, canvas_length = self.completion_ids.shape
        for name in _CANVAS_FIELDS:
            shape = tuple(getattr(self, name).shape)
            if shape != (rows, canvas_length):
                raise ValueError(
                    f"Rollout.{name} has shape {shape}; it must be {(rows, canvas_length)} like completion_ids."
                )
        if self.prompt_ids.shape != self.prompt_mask.shape or self.prompt_ids.shape[0] != rows:
            raise ValueError(
                f"Rollout.prompt_ids {tuple(self.prompt_ids.shape)} and prompt_mask {tuple(self.prompt_mask.shape)} "
                f"must both be ({rows}, P)."
            )
        if self.support is not None and tuple(self.support.shape[:2]) != (rows, canvas_length):
            raise ValueError(
                f"Rollout.support has shape {tuple(self.support.shape)}; it must be ({rows}, {canvas_length}, K)."
            )
        if tuple(self.view_seed.shape) != (rows,):
            raise ValueError(f"Rollout.view_seed has shape {tuple(self.view_seed.shape)}; it must be ({rows},).")

    def validate(self) -> "Rollout":
        """Check the values too (this reads them back from the device) and return self.

        Raises:
            ValueError: prompts that are not left-padded, a step that contradicts its token, or a counted position that
                was never revealed.
        """
        if (self.prompt_mask[:, :-1] & ~self.prompt_mask[:, 1:]).any():
            raise ValueError("Rollout.prompt_mask has padding to the right of a token; prompts must be left-padded.")
        revealed = self.unmask_step >= 0
        if (revealed & (self.completion_ids == self.mask_token_id)).any():
            raise ValueError(
                "Rollout.unmask_step says that a position was revealed whose token is the mask "
                f"({self.mask_token_id})."
            )
        if (~revealed & (self.completion_ids != self.mask_token_id)).any():
            raise ValueError(
                "Rollout.completion_ids holds a token where unmask_step is -1; positions never revealed must hold "
                f"mask_token_id ({self.mask_token_id})."
            )
        if (self.counted & ~revealed).any():
            raise ValueError("Rollout.counted includes a position that was never revealed.")
        if self.steps is not None and (self.unmask_step >= self.steps).any():
            raise ValueError(f"Rollout.unmask_step has steps beyond the schedule's, steps={self.steps}.")
        if self.support is not None:
            possible = (self.support == self.completion_ids[..., None]).any(dim=-1)
            if (revealed & ~possible).any():
                raise ValueError("Rollout.support leaves out a token that was drawn.")
        return self

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "Rollout":
        """The given rows (a slice, an index tensor or a boolean mask)."""
        return replace(self, **{name: value[rows] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rollout with its tensors on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    @property
    def num_steps(self) -> Tensor:
        """Decoding steps that each row took, int64 (B,)."""
        return self.unmask_step.amax(dim=1) + 1

    @property
    def scheduled_steps(self) -> Tensor:
        """Decoding steps T that each row would have taken without its EOS, int64 (B,)."""
        taken = self.num_steps
        return taken if self.steps is None else torch.full_like(taken, self.steps)

    @property
    def revealed(self) -> Tensor:
        """Positions that were revealed, bool (B, L)."""
        return self.unmask_step >= 0

    def replayed_steps(self) -> tuple[Tensor, Tensor]:
        """The steps that a likelihood replays: (step of each position, -1 for never; their number T), (B, L) each.

        A row's own, or in a block-causal model those of the position's block: finished blocks never change, so that
        all blocks can be replayed at once.
        """
        if self.blocks is None or not self.blocks.causal:
            return self.unmask_step, self.scheduled_steps[:, None].expand_as(self.unmask_step)
        canvas_length = self.unmask_step.shape[1]
        block = self.blocks.number(self.prompt_mask, canvas_length)[:, self.prompt_mask.shape[1] :]
        block = block - block[:, :1]
        first = torch.full_like(self.unmask_step, canvas_length).scatter_reduce(
            1, block, self.unmask_step.masked_fill(~self.revealed, canvas_length), "amin"
        )
        last = torch.full_like(self.unmask_step, -1).scatter_reduce(1, block, self.unmask_step, "amax")
        first, last = first.gather(1, block), last.gather(1, block)
        return (self.unmask_step - first).masked_fill(~self.revealed, -1), (last - first + 1).clamp(min=0)

    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    @staticmethod
    def scheduled(canvas_length: int, steps: int, blocks: Blocks | None = None) -> "Rollout":
        """One row without a prompt, all of whose canvas was revealed evenly in `steps` steps, left to right.

        It stands for a run's rollouts where only shapes matter: an estimator's number of views and their width.
        """
        zeros = torch.zeros(1, canvas_length, dtype=torch.int64)
        return Rollout(
            prompt_ids=zeros[:, :0],
            prompt_mask=zeros[:, :0].bool(),
            completion_ids=zeros,
            unmask_step=torch.arange(canvas_length)[None] * steps // canvas_length,
            logps=zeros.float(),
            counted=torch.ones_like(zeros, dtype=torch.bool),
            view_seed=zeros[:, 0],
            mask_token_id=-1,
            blocks=blocks,
        )

    @staticmethod
    def cat(rollouts: list["Rollout"]) -> "Rollout":
        """Stack rollouts that have equal widths; counters add up."""
        first = rollouts[0]
        if first.support is not None:
            supports = widen([r.support for r in rollouts if r.support is not None])
            rollouts = [replace(r, support=support) for r, support in zip(rollouts, supports, strict=True)]
        stacked: dict[str, Any] = {name: torch.cat([getattr(r, name) for r in rollouts]) for name in first._tensors()}
        counters = {name: sum(getattr(r, name) for r in rollouts) for name in ("num_forwards", "flops")}
        return replace(first, **stacked, **counters)


def widen(supports: list[Tensor]) -> list[Tensor]:
    """Supports (…, K) of one K, the largest, filled up with -1."""
    width = max(support.shape[-1] for support in supports)
    return [torch.nn.functional.pad(support, (0, width - support.shape[-1]), value=-1) for support in supports]


def count_until_eos(completion_ids: Tensor, unmask_step: Tensor, eos_token_ids: tuple[int, ...] | list[int]) -> Tensor:
    """Revealed positions up to and including the first revealed end-of-sequence token, bool (B, L).

    This is how TRL and d1 cut a completion (`loss_tokens: eos`).
    """
    revealed = unmask_step >= 0
    eos = torch.tensor(list(eos_token_ids), dtype=completion_ids.dtype, device=completion_ids.device)
    is_eos = torch.isin(completion_ids, eos) & revealed
    behind = (is_eos.long().cumsum(dim=1) - is_eos.long()) > 0  # an EOS stands strictly before
    return revealed & ~behind


def left_pad(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of prompts as a table, int64 (B, P) padded on the left, and its mask, bool (B, P)."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], dtype=torch.bool)
    return ids.view(len(rows), width), mask.view(len(rows), width)
