"""Attention patterns, and the form that each attention backend takes them in.

Every pattern of this library is one rule on three integers a position: **row q sees column k iff level[k] <= reach[q]
and segment[k] is 0 or q's own, or q is k**. A column of level `NEVER` is seen by itself alone (padding, isolated
masks), so no row is ever empty: an empty softmax is NaN. Patterns stay small vectors until the model is called.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .head import unwrap


NEVER = torch.iinfo(torch.int64).max  # level of a column that only its own row sees
EVERYTHING = NEVER - 1  # reach of a row that sees every column of another level


@dataclass(frozen=True)
class Attention:
    """Which columns each row of a view attends to.

    Args:
        level (`Tensor` of shape (B, S), int64): level from which a column is visible, `NEVER` for padding.
        reach (`Tensor` of shape (B, S), int64, *optional*): highest level that a row sees. None means that every row
            sees every column that is not padding: the plain denoiser, which every backend runs without a 4D mask.
        column (`Tensor` of shape (B, Q), int64, *optional*): the column that each row is itself, where the Q rows of
            `reach` are fewer than the columns (a cache holds the others). None means column q.
        segment (`Tensor` of shape (B, S), int64, *optional*): columns of a segment above 0 are seen by its own rows
            alone, so that levels of different streams do not mix. None means that all are of segment 0.
    """

    level: Tensor
    reach: Tensor | None = None
    column: Tensor | None = None
    segment: Tensor | None = None

    @staticmethod
    def padding(mask: Tensor) -> "Attention":
        """Full attention over the columns where `mask` (B, S) is True."""
        return Attention(level=torch.zeros_like(mask, dtype=torch.int64).masked_fill(~mask.bool(), NEVER))

    def __getitem__(self, rows: slice | Tensor) -> "Attention":
        return self.map(lambda part: part[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Attention":
        """The same with `function` applied to each table."""
        parts = (self.level, self.reach, self.column, self.segment)
        level, *others = (None if part is None else function(part) for part in parts)
        assert level is not None
        return Attention(level, *others)

    @staticmethod
    def cat(patterns: list["Attention"]) -> "Attention":
        """The rows of all patterns, which are of one form, in one."""

        def stack(name: str) -> Tensor | None:
            parts = [getattr(pattern, name) for pattern in patterns]
            return None if parts[0] is None else torch.cat(parts)

        level = stack("level")
        assert level is not None
        return Attention(level, stack("reach"), stack("column"), stack("segment"))

    def allowed(self) -> Tensor:
        """The rule written out, bool (B, Q, S): rows are queries, columns keys."""
        columns = torch.arange(self.level.shape[1], device=self.level.device)
        reach = torch.zeros_like(self.level) if self.reach is None else self.reach
        column = columns[: reach.shape[1]] if self.column is None else self.column
        sees = self.level[:, None, :] <= reach[:, :, None]
        if self.segment is not None:
            own = self.segment if self.column is None else self.segment.gather(1, self.column)
            own = own[:, : reach.shape[1], None]
            sees &= (self.segment[:, None, :] == 0) | (self.segment[:, None, :] == own)
        return sees | (column[..., None] == columns)


@dataclass(frozen=True)
class Layout:
    """What a model is run on.

    Args:
        input_ids (`Tensor` of shape (B, S), int64): what the model sees.
        position_ids (`Tensor` of shape (B, S), int64): counted without left padding.
        attention (`Attention`): which columns each row attends to.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention: Attention


def order_levels(unmask_step: Tensor) -> tuple[Tensor, Tensor]:
    """The order of a canvas as levels: (level of each token, highest level below each token's step), (B, L) each.

    Tokens are ordered by step, and within a step from left to right. A position never revealed has level `NEVER`.
    """
    canvas_length = unmask_step.shape[1]
    position = torch.arange(canvas_length, device=unmask_step.device)
    level = (1 + unmask_step * canvas_length + position).masked_fill(unmask_step < 0, NEVER)
    return level, (unmask_step * canvas_length).clamp(min=0)


def view_inputs(model: nn.Module, layout: Layout, dense: bool = False) -> dict:
    """The arguments of a model's forward for a layout, a `View` included: the one path from here to a model.

    With `dense` the attention is a mask of every (row, column) even where padding is all that it hides.
    """
    bare = unwrap(model)
    implementation: str = bare.config._attn_implementation
    return {
        "input_ids": layout.input_ids,
        "attention_mask": attention_mask(layout.attention, implementation, bare.dtype, dense),
        "position_ids": layout.position_ids,
    }


def attention_mask(attention: Attention, implementation: str, dtype: torch.dtype, dense: bool = False):
    """The pattern in the form that an attention backend of transformers takes.

    Padding-only patterns give the (B, S) mask that every backend knows (FlashAttention included). The others give a
    bool (B, 1, S, S) mask for `sdpa`, an additive one for `eager` (which mishandles bool), a `BlockMask` for
    `flex_attention`.

    Raises:
        ValueError: the backend has no form for the pattern, as FlashAttention has not.
    """
    if attention.reach is None and not dense:
        return (attention.level != NEVER).long()
    if implementation == "sdpa":
        return attention.allowed()[:, None]
    if implementation == "eager":
        # finfo.min and not -inf: -inf turns a row that sees nothing into NaN for the whole batch.
        minimum = torch.finfo(dtype).min
        return torch.zeros((), dtype=dtype, device=attention.level.device).masked_fill(
            ~attention.allowed()[:, None], minimum
        )
    if implementation == "flex_attention":
        return _block_mask(attention)
    raise ValueError(
        f"attn_implementation={implementation!r} cannot run this estimator's attention pattern; load the model with "
        "attn_implementation='sdpa', 'flex_attention' or 'eager'."
    )


def _block_mask(attention: Attention):
    from torch.nn.attention.flex_attention import create_block_mask

    level, reach, segment = attention.level, attention.reach, attention.segment
    rows, size = level.shape

    def rule(batch, head, q, k):
        return (level[batch, k] <= reach[batch, q]) | (q == k)

    def rule_with_segments(batch, head, q, k):
        of_row = (segment[batch, k] == 0) | (segment[batch, k] == segment[batch, q])
        return (level[batch, k] <= reach[batch, q]) & of_row | (q == k)

    return create_block_mask(
        rule if segment is None else rule_with_segments, B=rows, H=None, Q_LEN=size, KV_LEN=size, device=level.device
    )
