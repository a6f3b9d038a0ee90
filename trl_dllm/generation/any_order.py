"""Any-order decoding (d2 Algorithms 1 and 2; docs/methods.md §3.2), in full or with an exact key/value cache.

A masked position attends to the prompt, to what has been revealed and to itself; a revealed token to the prompt, to
what was revealed before it and to itself. So nothing that was computed for a revealed token ever changes, and the
cache is exact: the prompt is run once for each distinct prompt, and each step runs only the tokens that the step
before revealed and the masked positions of the current block.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..models import EVERYTHING, NEVER, Attention, Layout, apply_head, order_levels, unwrap, view_inputs
from .denoising import Denoising


class AnyOrderDecoding(Denoising):
    """Every step runs prompt and canvas in full: d2 Algorithm 2 as printed, the oracle of the cached decoder."""

    def attention(self, rows: Tensor) -> Attention:
        step = self.unmask_step[rows]
        level, _ = order_levels(step)
        # A masked position is seen by itself alone, and sees all that is revealed.
        sees = level.masked_fill(step < 0, EVERYTHING)
        prompt = torch.zeros_like(self.prompt_ids[rows])
        return Attention(
            level=torch.cat([prompt.masked_fill(~self.prompt_mask[rows], NEVER), level], dim=1),
            reach=torch.cat([prompt, sees], dim=1),
        )


class CachedDecoding(Denoising):
    """A decoder whose forwards run some columns and find the others in its cache."""

    cache: Cache

    def _run(self, ids, positions, pattern, head_rows, reduce, keys, *args) -> Tensor:
        layout = Layout(ids, positions, pattern)
        with _dense_attention(unwrap(self.model)):
            inputs = view_inputs(self.model, layout, dense=True) | {"past_key_values": self.cache, "use_cache": True}
            out = apply_head(self.model, inputs, head_rows, reduce, *args)
        self.num_forwards += 1
        self.flops += self.count_flops(len(ids), ids.shape[1], keys, len(head_rows))
        return out


class CachedAnyOrderDecoding(CachedDecoding):
    """The same draws with the exact cache.

    Rows keep their cache in slots of their own order of arrival: prompt, then tokens as they were revealed. A step
    writes its chunk behind a row's last valid slot, new tokens first, then masked positions; only the new tokens stay
    valid.
    """

    def __init__(self, model, prompt_ids, prompt_mask, config, seeds, spec):
        super().__init__(model, prompt_ids, prompt_mask, config, seeds, spec)
        rows, width = prompt_ids.shape
        device = prompt_ids.device
        # Room for the widest chunk behind the fullest row: one row may bring a whole block of new tokens and a whole
        # block of masks while another has all but its last token cached.
        self.slots = width + config.max_new_tokens + 2 * config.block_length
        self.cache: SlotCache = SlotCache(self.slots)
        self.level = torch.full((rows, self.slots), NEVER, device=device)  # level of each slot; NEVER: not valid
        self.used = torch.full((rows,), width, device=device)  # valid slots of each row
        self.cached_rows = torch.arange(rows, device=device)  # which rows the cache holds
        self.fresh = torch.zeros_like(self.tokens, dtype=torch.bool)  # revealed in the row's last step, not yet cached

    def start(self, still_running: Callable[[bool], bool]) -> None:
        prompts = self.prompt_ids.numel() > 0
        if still_running(prompts):
            self._run_prompts() if prompts else self.spare_forward()

    def _run_prompts(self) -> None:
        """One pass for the distinct prompts, copied to the rows that share them."""
        key = self.prompt_ids.masked_fill(~self.prompt_mask, -1)
        _, group = torch.unique(key, dim=0, return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(group), device=group.device)
        first = first.scatter_reduce(0, group, torch.arange(len(group), device=group.device), "amin")
        width = self.prompt_ids.shape[1]
        self.cache.start(torch.zeros(len(first), dtype=torch.int64, device=group.device))
        self._run(
            ids=self.prompt_ids[first],
            positions=self.position_ids[first, :width],
            pattern=Attention.padding(self.prompt_mask[first]),
            head_rows=first.new_zeros(0),
            reduce=lambda logits: logits[:, :1],
            keys=width,
        )
        self.cache.select(group)
        self.level[:, :width] = torch.zeros_like(self.prompt_ids).masked_fill(~self.prompt_mask, NEVER)

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce, *args: Tensor) -> Tensor:
        """Run the tokens revealed last and the candidates; reduce the candidates' logits."""
        width = self.prompt_ids.shape[1]
        if len(rows) < len(self.cached_rows):  # finished rows leave the cache
            self.cache.select(torch.isin(self.cached_rows, rows).nonzero().squeeze(1))
            self.cached_rows = rows
        fresh = self.fresh[rows]
        new_row, new_position = fresh.nonzero(as_tuple=True)
        new_counts, mask_counts = fresh.sum(dim=1), torch.bincount(row, minlength=len(rows))
        new, masks = int(new_counts.max()), int(mask_counts.max())

        # The chunk of each row: its new tokens, padding, its masked positions, padding. Padding has position 0 and
        # level NEVER.
        new_place = _place_in_row(new_row, new_counts)
        mask_place = new + _place_in_row(row, mask_counts)
        chunk = torch.zeros(len(rows), new + masks, dtype=torch.int64, device=rows.device)
        order, _ = order_levels(self.unmask_step[rows])
        level = torch.full_like(chunk, NEVER)
        level[new_row, new_place] = order[new_row, new_position]
        sees = torch.zeros_like(chunk)
        sees[new_row, new_place] = order[new_row, new_position]
        sees[row, mask_place] = EVERYTHING
        chunk[new_row, new_place] = new_position
        chunk[row, mask_place] = position
        ids = torch.full_like(chunk, self.spec.mask_token_id)
        ids[new_row, new_place] = self.tokens[rows[new_row], new_position]

        used = self.used[rows]
        own = used[:, None] + torch.arange(new + masks, device=rows.device)
        keys = int(used.max()) + new + masks
        levels = self.level[rows, :keys].scatter(1, own, level)
        self.cache.start(used)
        out = self._run(
            ids,
            self.position_ids[rows[:, None], width + chunk],
            Attention(levels, sees, own),
            row * (new + masks) + mask_place,
            reduce,
            keys,
            *args,
        )
        # Only new tokens stay: what lies behind them is overwritten by the next chunk.
        place = self.used[rows[new_row]] + new_place
        self.level[rows[new_row], place] = order[new_row, new_position]
        self.used[rows] += new_counts
        self.fresh[rows] = False
        return out

    def on_reveal(self, row: Tensor, position: Tensor) -> None:
        self.fresh[row, position] = True


def _place_in_row(row: Tensor, counts: Tensor) -> Tensor:
    """Number of each entry within its row, for entries sorted by row."""
    start = counts.cumsum(0) - counts
    return torch.arange(len(row), device=row.device) - start[row]


@contextmanager
def _dense_attention(model: PreTrainedModel):
    """FlexAttention would be compiled anew for every chunk; small rectangular masks go to sdpa."""
    before = model.config._attn_implementation
    if before == "flex_attention":
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer in preallocated slots, (B, H, slots, D) each."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = weakref.proxy(cache)  # a circle would keep keys and values until Python looks for circles

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, size = key_states.shape
        # Zeros, not garbage: a slot that nobody sees still meets a weight of 0, and 0 times NaN is NaN.
        self.keys = key_states.new_zeros(rows, heads, self.cache.slots, size)
        self.values = value_states.new_zeros(rows, heads, self.cache.slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[2]
        slot = self.cache.offset[:, None] + torch.arange(length, device=key_states.device)
        row = torch.arange(len(slot), device=key_states.device)[:, None]
        self.keys[row, :, slot] = key_states.transpose(1, 2)
        self.values[row, :, slot] = value_states.transpose(1, 2)
        end = self.cache.end(length)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end(query_length), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.slots


class SlotCache(Cache):
    """A key/value cache in which each row writes behind its own last valid slot."""

    def __init__(self, slots: int):
        self.slots = slots
        self.offset = torch.zeros(0, dtype=torch.int64)  # the first slot of each row's next chunk
        self._largest = 0
        self.slot_layers: list[_SlotLayer] = []
        super().__init__(layers=[])

    def start(self, offset: Tensor) -> None:
        """Say at which slot each row's next chunk begins, int64 (B,)."""
        self.offset, self._largest = offset, int(offset.max())

    def end(self, length: int) -> int:
        return self._largest + length

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        while len(self.slot_layers) <= layer_idx:
            self.slot_layers.append(_SlotLayer(self))
        return self.slot_layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        for layer in self.slot_layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
