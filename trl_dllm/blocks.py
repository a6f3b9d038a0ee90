"""Blocks of positions that a model is shown in their order."""

from dataclasses import dataclass

import torch
from torch import Tensor


ALIGNMENTS = ("position", "canvas")


@dataclass(frozen=True)
class Blocks:
    """How prompt and canvas are cut into blocks, none of which sees a later one.

    Args:
        size (`int`): positions of a block.
        alignment (`str`): where blocks begin: "position" counts from the first token of the prompt, so that the last
            tokens of a prompt share a block with the first of its canvas (SDAR, LLaDA2); "canvas" from the first
            position of the canvas, and backwards through the prompt.
        causal (`bool`): True for a block-causal model, in which a position sees its own block and those before it.
            False for a bidirectional model on a canvas that grows: it sees every block that is there already.
    """

    size: int
    alignment: str = "position"
    causal: bool = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"block_size={self.size} must be at least 1 position, or None for full attention.")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(
                f"block_alignment={self.alignment!r} is unknown; choose {' or '.join(map(repr, ALIGNMENTS))}."
            )

    def number(self, prompt_mask: Tensor, canvas_length: int) -> Tensor:
        """The block of each column of prompt ⊕ canvas, int64 (B, P + L), counted from 0; -1 for padding.

        Left padding takes no part: a prompt (B, P) has the same blocks in a wider batch.
        """
        length = prompt_mask.sum(dim=1, keepdim=True)
        prompt = self.of(prompt_mask.long().cumsum(dim=1) - 1, length).masked_fill(~prompt_mask, -1)
        canvas = self.of(length + torch.arange(canvas_length, device=length.device), length)
        return torch.cat([prompt, canvas], dim=1)

    def of(self, position: Tensor, length: Tensor) -> Tensor:
        """The block of each position (B, S), counted without padding, behind prompts of `length` (B, 1) tokens."""
        return (position + self.offset(length)) // self.size

    def offset(self, length: Tensor) -> Tensor:
        """Positions that the first block lacks at its front, for prompts of `length` tokens."""
        return torch.zeros_like(length) if self.alignment == "position" else -length % self.size
