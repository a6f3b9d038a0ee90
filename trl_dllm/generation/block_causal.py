"""Decoding of block-causal models (SDAR, LLaDA2; docs/methods.md §3.1), in full or with an exact key/value cache.

A position sees its own block and those before it, so that what was computed for a finished block never changes: the
prompt's whole blocks are run once for each distinct prompt, and each step runs the row's current block alone, and once
more the block that was finished before it. Where blocks are counted from the prompt's first token, the prompt's last
ones share the first block of the canvas and are run with it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..models import NEVER, Attention
from .any_order import SlotDecoding
from .denoising import Denoising


def block_attention(block: Tensor) -> Attention:
    """A block-causal model's own attention, from the block of each column (B, S); -1 for padding."""
    return Attention(level=block.masked_fill(block < 0, NEVER), reach=block.clamp(min=0))


class BlockCausalDenoising(Denoising):
    """Every step runs prompt and canvas in full: the oracle of the cached decoder."""

    def attention(self, rows: Tensor) -> Attention:
        return block_attention(self.column_block[rows])


class CachedBlockCausalDenoising(SlotDecoding):
    """The same draws with the exact cache: a chunk is the block finished last and the current one."""

    def __init__(self, model, prompt_ids, prompt_mask, config, seeds, spec):
        super().__init__(model, prompt_ids, prompt_mask, config, seeds, spec)
        length = prompt_mask.sum(dim=1)
        # The column, of prompt ⊕ canvas with its padding, at which block 0 begins or would.
        self.origin = prompt_ids.shape[1] - length - spec.blocks.offset(length)
        self.fresh = torch.zeros_like(self.active)  # rows whose block before the current one is not cached yet

    def prompt_attention(self, rows: Tensor) -> Attention:
        return block_attention(self.column_block[rows, : self.prompt_ids.shape[1]])

    def prompt_levels(self) -> Tensor:
        block = self.column_block[:, : self.prompt_ids.shape[1]]
        whole = (block >= 0) & (block < self.first_block[:, None])
        return block.masked_fill(~whole, NEVER)

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce: Callable, *args: Tensor) -> Tensor:
        """Run the rows' current blocks, and those finished last; reduce the logits of each (rows[row], position)."""
        self.keep(rows)
        size, fresh = self.config.block_length, self.fresh[rows]
        before = size * bool(fresh.any())  # columns of a chunk in front of the current block
        current = self.first_block[rows] + self.block[rows]
        start = self.origin[rows] + current * size - before
        column = start[:, None] + torch.arange(before + size, device=rows.device)
        block = self.column_block[rows]
        inside = (column >= 0) & (column < block.shape[1])
        column = column.clamp(0, block.shape[1] - 1)
        block = block.gather(1, column)
        wanted = (block == current[:, None]) | ((block == current[:, None] - 1) & fresh[:, None])
        pattern = block_attention(block.masked_fill(~(inside & wanted), -1))

        used = self.used[rows]
        own = used[:, None] + torch.arange(before + size, device=rows.device)
        keys = int(used.max()) + before + size
        levels = self.level[rows, :keys].scatter(1, own, pattern.level)
        self.cache.start(used)
        out = self._run(
            torch.cat([self.prompt_ids[rows], self.tokens[rows]], dim=1).gather(1, column),
            self.position_ids[rows].gather(1, column),
            Attention(levels, pattern.reach, own),
            row * (before + size) + self.prompt_ids.shape[1] + position - start[row],
            reduce,
            keys,
            *args,
        )
        # Only the finished block stays: what lies behind it is overwritten by the next chunk.
        if before:
            done = rows[fresh]
            self.level[done[:, None], own[fresh, :size]] = pattern.level[fresh, :size]
            self.used[done] += size
            self.fresh[rows] = False
        return out

    def _next_block(self, active: Tensor) -> None:
        before = self.block.clone()
        super()._next_block(active)
        self.fresh |= self.block > before
