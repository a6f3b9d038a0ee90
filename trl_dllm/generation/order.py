"""Which of the tokens drawn in a step are kept."""

import torch
from torch import Tensor


# Names of `remasking`. A larger measure is revealed first.
MEASURES = ("low_confidence", "margin", "entropy", "random", "left_to_right")
VALUE_INDEPENDENT = ("margin", "entropy", "random", "left_to_right")


def draw_tokens(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Exact categorical samples, int64 (n,), from log-probs (n, V) and one uniform a row.

    Inverse of the cumulative distribution in float64: a third of the cost of Gumbel noise for every token, and without
    the truncated tail that noise of low precision has.
    """
    cumulative = log_p.double().exp().cumsum(dim=-1)
    # Scaled by the last entry, which rounding leaves near 1 and not at it, and kept below it, which the product's
    # rounding may not do; right=True then never picks a token of probability 0.
    total = cumulative[:, -1]
    point = torch.minimum(uniform.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1)
    return token.clamp(max=log_p.shape[-1] - 1)


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
    return torch.zeros_like(
        uniform, dtype=log_p.dtype
    )  # left_to_right: all equal, and ties go to the smaller position


def reveal(measures: Tensor, candidates: Tensor, count: Tensor, threshold: float | None) -> Tensor:
    """Positions to reveal, bool (B, W), among `candidates` (B, W).

    The `count` (B,) largest measures, ties to the smaller position; or, with a threshold, every measure above it and
    at least one.
    """
    order = measures.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1, stable=True)
    if threshold is not None:
        return candidates & ((measures > threshold) | (rank < 1))
    return candidates & (rank < count[:, None])
