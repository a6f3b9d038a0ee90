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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        length, width = self.prompt_mask.sum(dim=1), self.prompt_ids.shape[1]
        # The column, of prompt ⊕ canvas with its padding, at which block 0 begins or would.
        self.origin = width - length - self.spec.blocks.offset(length)
        self.fresh: set[int] = set()  # rows whose block before the current one is not cached yet
        self.filled = [width] * len(self.left)  # `used`, on the host

    def prompt_attention(self, rows: Tensor) -> Attention:
        return block_attention(self.column_block[rows, : self.prompt_ids.shape[1]])

    def prompt_levels(self, rows: Tensor) -> Tensor:
        block = self.column_block[rows, : self.prompt_ids.shape[1]]
        whole = (block >= 0) & (block < self.first_block[rows, None])
        return block.masked_fill(~whole, NEVER)

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce: Callable, *args: Tensor) -> Tensor:
        """Run the rows' current blocks, and those finished last; reduce the logits of each (rows[row], position)."""
        size, fresh = self.config.block_length, [number in self.fresh for number in self.running]
        before = size * any(fresh)  # columns of a chunk in front of the current block
        current = self.first_block[rows] + self.block[rows]
        start = self.origin[rows] + current * size - before
        column = start[:, None] + self._arange(before + size)
        block = self.column_block[rows]
        inside = (column >= 0) & (column < block.shape[1])
        column = column.clamp(0, block.shape[1] - 1)
        block = block.gather(1, column).masked_fill(~inside, -1)
        finished = self.on_device([place for place, new in enumerate(fresh) if new])
        oldest = current.index_add(0, finished, torch.ones_like(finished), alpha=-1)
        pattern = block_attention(block.masked_fill((block < oldest[:, None]) | (block > current[:, None]), -1))

        used = self.used[rows]
        own = used[:, None] + self._arange(before + size)
        fullest = max(self.filled[number] for number in self.running)
        levels = self.level[rows, : fullest + before + size].scatter(1, own, pattern.level)
        self.cache.start(used, fullest)
        out = self._run(
            torch.cat([self.prompt_ids[rows], self.tokens[rows]], dim=1).gather(1, column),
            self.position_ids[rows].gather(1, column),
            Attention(levels, pattern.reach, own),
            row * (before + size) + self.prompt_ids.shape[1] + position - start[row],
            reduce,
            fullest + before + size,
            *args,
        )
        # Only finished blocks stay: what lies behind them is overwritten by the next chunk.
        done = rows[finished]
        self.level[done[:, None], own[finished, :before]] = pattern.level[finished, :before]
        self.used[done] += size
        for number in self.fresh.intersection(self.running):
            self.filled[number] += size
        self.fresh.difference_update(self.running)
        return out

    def step(self) -> None:
        left = list(self.left)
        starts = {number: self.block_bounds(number)[0] for number in self.active}
        super().step()
        if self.left != left:  # a step, not a pass of prompts
            self.fresh |= {number for number in self.active if self.block_bounds(number)[0] > starts.get(number, 0)}
