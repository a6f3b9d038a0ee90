"""Which of the tokens drawn in a step are kept."""

import math

import torch
from torch import Tensor


# Names of `remasking`. A larger measure is revealed first.
MEASURES = ("low_confidence", "margin", "entropy", "random", "left_to_right")
VALUE_INDEPENDENT = ("margin", "entropy", "random", "left_to_right")
OF_PROBABILITIES = ("low_confidence", "margin", "entropy")

_BLOCK = 512  # tokens whose cumulative probabilities are formed to draw one of them
_ROWS = 16  # rows that are in float64 at a time: copies beyond 32 MB cost a CPU more to get than to fill


def draw_tokens(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Exact categorical samples, int64 (n,), from log-probs (n, V) and one uniform a row.

    Inverse of the cumulative distribution in float64, in two steps: among blocks of the vocabulary by their sums, then
    among the tokens of one block. A cumulative sum over the vocabulary takes longer than the softmax, and Gumbel noise
    for every token three times as long; noise of low precision has a truncated tail besides.
    """
    vocab = log_p.shape[-1]
    size = min(_BLOCK, vocab)
    whole = vocab // size * size
    sums = []
    for part in log_p.split(_ROWS):
        p = part.to(torch.float64, copy=True).exp_()
        blocks = [p[:, :whole].unflatten(1, (-1, size)).sum(dim=-1), p[:, whole:].sum(dim=-1, keepdim=True)]
        sums.append(torch.cat(blocks, dim=1))
    cumulative = torch.cat(sums).cumsum(dim=-1)
    # Scaled by the last entry, which rounding leaves near 1 and not at it.
    point = uniform.double()[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, point)
    before = cumulative.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0)
    token = block * size + torch.arange(size, device=log_p.device)
    p = log_p.gather(1, token.clamp(max=vocab - 1)).double().exp().masked_fill(token >= vocab, 0)
    place = _first_above(p.cumsum(dim=-1), point - before)
    return (block * size + place).squeeze(1).clamp(max=vocab - 1)


def _first_above(cumulative: Tensor, point: Tensor) -> Tensor:
    """The first entry of each row of `cumulative` (n, K) that is above `point` (n, 1), int64 (n, 1).

    A point that rounding put at the end or behind it goes to the last part that has any probability.
    """
    end = cumulative[:, -1:]
    inside = torch.minimum(point, torch.nextafter(end, torch.zeros_like(end)))
    # right=True never picks a part of probability 0; NaN is above everything.
    return torch.searchsorted(cumulative, inside, right=True).clamp(max=cumulative.shape[-1] - 1)


def which(mask: Tensor, count: int) -> Tensor:
    """Indices of the entries of `mask` (n,) that are True, int64 (count,), where it is known that there are `count`.

    `nonzero` would wait for the device to say how many there are.
    """
    return (~mask).byte().argsort(stable=True)[:count]


def truncate(log_p: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float | None = None) -> Tensor:
    """Tokens that may be drawn, bool (n, V): top-k, then top-p of what is left, then min-p, as TRL's sampler has them.

    Ties with the k-th token stay, the most probable token always does, and one of probability 0 (the mask) never.
    """
    keep = log_p > torch.finfo(log_p.dtype).min / 8  # `log_probs` gives the mask a quarter of the minimum
    if 0 < top_k < log_p.shape[-1]:
        keep &= log_p >= log_p.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1:
        p, order = log_p.masked_fill(~keep, -torch.inf).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it do not reach top_p yet.
        keep &= torch.zeros_like(keep).scatter(1, order, p.cumsum(dim=-1) - p < top_p)
    if min_p:
        keep &= log_p >= log_p.amax(dim=-1, keepdim=True) + math.log(min_p)
    return keep


def named(keep: Tensor) -> Tensor:
    """The tokens that `keep` (n, V) marks, int32 (n, K) with K the most that a row has, filled up with -1."""
    row, token = keep.nonzero(as_tuple=True)
    count = keep.sum(dim=1)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    out = torch.full((len(keep), int(count.max())), -1, dtype=torch.int32, device=keep.device)
    return out.index_put((row, place), token.int())


def measure(remasking: str, log_p: Tensor, tokens: Tensor, uniform: Tensor) -> Tensor:
    """How early a position is to be revealed, (n,): larger is earlier.

    Args:
        log_p (`Tensor` of shape (n, V)): un-tempered log-probs.
        tokens (`Tensor` of shape (n,)): the tokens drawn.
        uniform (`Tensor` of shape (n,)): draws for the random order.
    """
    if remasking == "low_confidence":
        return log_p.gather(1, tokens[:, None]).squeeze(1).exp()
    if remasking == "margin":
        top = log_p.topk(2, dim=-1).values.exp()
        return top[:, 0] - top[:, 1]
    if remasking == "entropy":
        return (log_p.exp() * log_p).sum(dim=-1)
    if remasking == "random":
        return uniform.to(log_p.dtype)
    if remasking == "left_to_right":  # all equal, and ties go to the smaller position
        return torch.zeros_like(uniform, dtype=log_p.dtype)
    raise ValueError(f"remasking={remasking!r} is unknown; choose one of {', '.join(MEASURES)}.")


def choose(measures: Tensor, candidates: Tensor, count: Tensor, threshold: float | None) -> Tensor:
    """Positions to reveal, bool (B, W), among `candidates` (B, W).

    The `count` (B,) largest measures, ties to the smaller position; or, with a threshold, every measure above it and
    at least one.
    """
    order = measures.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1, stable=True)
    if threshold is not None:
        return candidates & ((measures > threshold) | (rank < 1))
    return candidates & (rank < count[:, None])
