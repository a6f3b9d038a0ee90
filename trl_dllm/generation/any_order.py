"""Any-order decoding (d2 Algorithms 1 and 2; docs/methods.md §3.2), in full or with an exact key/value cache.

A masked position attends to the prompt, to what has been revealed and to itself; a revealed token to the prompt, to
what was revealed before it and to itself. So nothing that was computed for a revealed token ever changes, and the
cache is exact: rows that begin together run each distinct prompt once, and each step runs only the tokens that the
step before revealed and the masked positions of the current block.
"""

import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..models import EVERYTHING, NEVER, Attention, Layout, apply_head, order_levels, unwrap, view_inputs
from .denoising import Denoising
from .order import which


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


class SlotDecoding(CachedDecoding):
    """Decoders with an exact cache: what was computed for a column of it never changes.

    Rows keep their cache in slots of their own order of arrival: prompt, then what is finished. A step writes its
    chunk behind a row's last valid slot, finished columns first, then the others; only the finished ones stay valid.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config, device, (rows, width) = self.config, self.prompt_ids.device, self.prompt_ids.shape
        # Room for the widest chunk behind the fullest row: one row may bring two blocks while another has all but its
        # last token cached; and for blocks that prompt and canvas do not fill.
        self.slots = width + config.max_new_tokens + 4 * config.block_length
        self.cache: SlotCache = SlotCache(self.slots)
        self.level = torch.full((rows, self.slots), NEVER, device=device)  # level of each slot; NEVER: not valid
        self.used = torch.full((rows,), width, device=device)  # valid slots of each row
        self.cached_rows: list[int] = []  # which rows the cache holds
        self.group = [0] * rows  # rows with the same prompt
        if self.prompt_ids.numel():
            key = self.prompt_ids.masked_fill(~self.prompt_mask, -1)
            self.group = torch.unique(key, dim=0, return_inverse=True)[1].tolist()

    def step(self) -> None:
        """A step, or the pass of the prompts of rows that begin: one forward."""
        self.admit()
        stays = [place for place, row in enumerate(self.cached_rows) if row in self.active]
        if len(stays) < len(self.cached_rows):  # finished rows leave the cache
            self.cache.select(self.on_device(stays))
            self.cached_rows = [self.cached_rows[place] for place in stays]
        begin = self.active[len(self.cached_rows) :]
        self.cached_rows = list(self.active)
        if begin and self.prompt_ids.shape[1]:
            return self._run_prompts(begin)
        self.cache.grow(len(begin))
        super().step()

    def _run_prompts(self, rows: list[int]) -> None:
        """One pass for the distinct prompts, copied behind the cache's rows for each row that has one."""
        groups = sorted({self.group[row] for row in rows})
        first = self.on_device([next(row for row in rows if self.group[row] == group) for group in groups])
        width, cache = self.prompt_ids.shape[1], self.cache
        self.cache = SlotCache(width)
        self.cache.start(torch.zeros_like(first), 0)
        self._run(
            ids=self.prompt_ids[first],
            positions=self.position_ids[first, :width],
            pattern=self.prompt_attention(first),
            head_rows=first[:0],
            reduce=lambda logits: logits[:, :1],
            keys=width,
        )
        cache.grow(len(rows), self.cache, self.on_device([groups.index(self.group[row]) for row in rows]))
        self.cache, begin = cache, self.on_device(rows)
        self.level[begin, :width] = self.prompt_levels(begin)

    def prompt_attention(self, rows: Tensor) -> Attention:
        """Which columns of the prompts of `rows` each of them attends to."""
        return Attention.padding(self.prompt_mask[rows])

    def prompt_levels(self, rows: Tensor) -> Tensor:
        """Levels of the columns of their prompts in the cache, (n, P)."""
        return torch.zeros_like(self.prompt_ids[rows]).masked_fill(~self.prompt_mask[rows], NEVER)


class CachedAnyOrderDecoding(SlotDecoding):
    """The same draws with the exact cache: a chunk is the tokens revealed last and the block's masked positions."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fresh = torch.zeros_like(self.tokens, dtype=torch.bool)  # revealed in the row's last step, not yet cached

    def forward(self, rows: Tensor, row: Tensor, position: Tensor, reduce, *args: Tensor) -> Tensor:
        """Run the tokens revealed last and the candidates; reduce the candidates' logits."""
        width, canvas_length = self.prompt_ids.shape[1], self.config.max_new_tokens
        fresh, fresh_counts = self.fresh[rows], [self.last[number] for number in self.running]
        flat = which(fresh.flatten(), sum(fresh_counts))
        new_row, new_position = flat // canvas_length, flat % canvas_length
        new_counts = fresh.sum(dim=1)
        mask_counts = torch.zeros_like(new_counts).scatter_add(0, row, torch.ones_like(row))
        new, masks = max(fresh_counts), max(map(self.masked_in_block, self.running))
        # Valid slots of the row that has most: its prompt, and what it revealed before its last step.
        fullest = width + max(canvas_length - self.left[number] - self.last[number] for number in self.running)

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
        own = used[:, None] + self._arange(new + masks)
        keys = fullest + new + masks
        levels = self.level[rows, :keys].scatter(1, own, level)
        self.cache.start(used, fullest)
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
        self.keys, self.values = self._slots(key_states), self._slots(value_states)
        self.is_initialized = True

    def _slots(self, states: Tensor) -> Tensor:
        # Zeros, not garbage: a slot that nobody sees still meets a weight of 0, and 0 times NaN is NaN.
        return states.new_zeros(*states.shape[:2], self.cache.slots, states.shape[-1])

    def grow(self, key_states: Tensor, value_states: Tensor) -> None:
        """Append rows with the given states in their first slots."""
        for name, states in (("keys", key_states), ("values", value_states)):
            rows = self._slots(states)
            rows[:, :, : states.shape[2]] = states
            setattr(self, name, torch.cat([getattr(self, name), rows]) if self.is_initialized else rows)
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

    def start(self, offset: Tensor, largest: int) -> None:
        """Say at which slot each row's next chunk begins, int64 (B,), and the largest of them."""
        self.offset, self._largest = offset, largest

    def end(self, length: int) -> int:
        return self._largest + length

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self._layer(layer_idx).update(key_states, value_states)

    def _layer(self, number: int) -> _SlotLayer:
        while len(self.slot_layers) <= number:
            self.slot_layers.append(_SlotLayer(self))
        return self.slot_layers[number]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        for layer in self.slot_layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def grow(self, count: int, prompts: "SlotCache | None" = None, rows: Tensor | None = None) -> None:
        """Append `count` rows: those that `rows` names of `prompts`, or empty ones."""
        if not count:
            return
        for number, layer in enumerate((self if prompts is None else prompts).slot_layers):
            keys, values = (
                part.new_zeros(count, part.shape[1], 0, part.shape[3]) if rows is None else part[rows]
                for part in (layer.keys, layer.values)
            )
            self._layer(number).grow(keys, values)
