"""Fast-dLLM's approximate caches for bidirectional models: `cache="prefix"` and `cache="dual"`.

The first step of a block runs prompt and canvas in full and keeps every layer's keys and values. The block's other
steps run only some columns, and attend to the kept ones for the rest:

- `prefix`: the block and all that follows it; prompt and earlier blocks are kept;
- `dual`: the block alone; what follows it is kept too.

In a bidirectional model every column sees the block, so the kept ones are those of a canvas that has changed since:
what is drawn then is not quite the model's. The first step of each block is exact, and so are blocks of one step.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..models import NEVER, Attention
from .any_order import CachedDecoding


class BlockCachedDenoising(CachedDecoding):
    """Masked diffusion decoding with the keys and values of each block's first step.

    A step is one forward. Rows that begin a block go first, in a forward of their own; the others wait, and nothing
    that they draw changes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cache: BlockCache = BlockCache(min(self.limit, len(self.left)))
        self.place: dict[int, int] = {}  # of each row that is decoded, in the cache

    def next_rows(self) -> list[int]:
        active = super().next_rows()
        return [row for row in active if self._begins(row)] or active

    def _begins(self, row: int) -> bool:
        return self.left[row] % self.config.block_length == 0

    def admit(self) -> None:
        super().admit()
        self.place = {row: place for row, place in self.place.items() if row in self.active}
        free = iter(sorted(set(range(self.cache.num_rows)) - set(self.place.values())))
        for row in self.active:
            if row not in self.place:
                self.place[row] = next(free)

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce: Callable, *args: Tensor) -> Tensor:
        """Run the columns that are not kept, and reduce the logits that predict each (rows[row], position), (n, C)."""
        config, shift = self.config, self.spec.logits_shift
        prompt = self.prompt_ids.shape[1]
        ids = torch.cat([self.prompt_ids[rows], self.tokens[rows]], dim=1)
        level = torch.zeros_like(ids).masked_fill(~self.valid[rows], NEVER)
        everything = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begins = all(map(self._begins, self.running))
        longest = ids.shape[1]
        start, end = torch.zeros_like(ids[:, :1]), torch.full_like(ids[:, :1], ids.shape[1])
        if not begins:
            # In shifted families the row before the block predicts its first position.
            start = prompt + self.block[rows, None] * config.block_length - shift
            blocks = -(-max(self.left[number] for number in self.running) // config.block_length)
            if config.cache == "dual":
                blocks, end = 1, start + shift + config.block_length
            longest = shift + blocks * config.block_length
        column = start + torch.arange(longest, device=ids.device)
        beyond = column >= end  # a row that is further on has fewer columns behind it
        column = column.masked_fill(beyond, 0)
        run = level.gather(1, column).masked_fill(beyond, NEVER)
        reach = torch.zeros_like(column)
        pattern = Attention(run, reach)
        if not begins:
            kept = level.masked_fill((everything >= start) & (everything < end), NEVER)
            pattern = Attention(torch.cat([kept, run], dim=1), reach, ids.shape[1] + everything[:, : column.shape[1]])
        self.cache.start(self.on_device([self.place[number] for number in self.running]), keep=begins)
        place = prompt + position - shift - start[row, 0]
        return self._run(
            ids.gather(1, column),
            self.position_ids[rows].gather(1, column),
            pattern,
            row * column.shape[1] + place,
            reduce,
            pattern.level.shape[1],
            *args,
        )


class BlockCache(Cache):
    """Keys and values of every column, written by forwards that keep them and read by the others."""

    def __init__(self, rows: int):
        self.kept: list[tuple[Tensor, Tensor]] = []  # of each layer, (rows, H, S, D) each
        self.num_rows, self.rows, self.keep = rows, torch.zeros(0, dtype=torch.int64), False
        super().__init__(layers=[])

    def start(self, rows: Tensor, keep: bool) -> None:
        """Say which rows the next forward runs, and whether it runs and keeps all their columns."""
        self.rows, self.keep = rows, keep

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = (key_states, value_states)
        if not self.keep:
            kept = self.kept[layer_idx]
            return tuple(torch.cat([old[self.rows], new], dim=2) for old, new in zip(kept, states, strict=True))
        if len(self.kept) <= layer_idx:
            self.kept.append(tuple(new.new_zeros(self.num_rows, *new.shape[1:]) for new in states))
        for old, new in zip(self.kept[layer_idx], states, strict=True):
            old[self.rows] = new
        return states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
