"""Attention patterns, and the form that each attention backend takes them in.

Every pattern of this library is one rule on two integers a position: **row q sees column k iff key[k] <= query[q], or
q is k**. A column of level `NEVER` is seen by itself alone (padding, isolated masks), so no row is ever empty: an
empty softmax is NaN. Patterns stay two small vectors until the model is called.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Attention:
    """Which columns each row of a view attends to.

    Args:
        key (`Tensor` of shape (B, S), int64): level from which a column is visible, `NEVER` for padding.
        query (`Tensor` of shape (B, S), int64, *optional*): highest level that a row sees. None means that every row
            sees every column that is not padding: the plain denoiser, which every backend runs without a 4D mask.
    """

    key: Tensor
    query: Tensor | None = None

    @staticmethod
    def padding(mask: Tensor) -> "Attention":
        """Full attention over the columns where `mask` (B, S) is True."""
        return Attention(key=torch.zeros_like(mask, dtype=torch.int64).masked_fill(~mask.bool(), NEVER))

    def __getitem__(self, rows: slice | Tensor) -> "Attention":
        return Attention(self.key[rows], None if self.query is None else self.query[rows])

    def allowed(self) -> Tensor:
        """The rule written out, bool (B, S, S): rows are queries, columns keys."""
        size = self.key.shape[1]
        query = torch.zeros_like(self.key) if self.query is None else self.query
        itself = torch.eye(size, dtype=torch.bool, device=self.key.device)
        return (self.key[:, None, :] <= query[:, :, None]) | itself


def attention_mask(attention: Attention, implementation: str, dtype: torch.dtype):
    """The pattern in the form that an attention backend of transformers takes.

    Padding-only patterns give the (B, S) mask that every backend knows (FlashAttention included). The others give a
    bool (B, 1, S, S) mask for `sdpa`, an additive one for `eager` (which mishandles bool), a `BlockMask` for
    `flex_attention`.

    Raises:
        ValueError: the backend has no form for the pattern, as FlashAttention has not.
    """
    if attention.query is None:
        return (attention.key != NEVER).long()
    if implementation == "sdpa":
        return attention.allowed()[:, None]
    if implementation == "eager":
        # finfo.min and not -inf: -inf turns a row that sees nothing into NaN for the whole batch.
        minimum = torch.finfo(dtype).min
        return torch.zeros((), dtype=dtype, device=attention.key.device).masked_fill(
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

    key, query = attention.key, attention.query
    rows, size = key.shape

    def rule(batch, head, q, k):
        return (key[batch, k] <= query[batch, q]) | (q == k)

    return create_block_mask(rule, B=rows, H=None, Q_LEN=size, KV_LEN=size, device=key.device)
