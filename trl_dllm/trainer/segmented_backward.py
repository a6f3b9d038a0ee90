"""One forward and one backward at a time, for a loss on log-probs that come from several views.

Memory does not grow with the number of views, and it is the only form of a multi-view step that survives ZeRO-3 with
LoRA. The loss itself stays TRL's: it is evaluated on detached log-probs, its gradient with respect to them is taken,
and each view's graph is pulled back through a linear surrogate,

    ∇θ L(logp(θ)) = Σ_n ∇θ <dL/dlogp, logp_n(θ)>,   logp = Σ_n logp_n.

If dL/dlogp_i depends on logp_i alone (a token-separable loss) and no position is scored twice, the coefficients of a
view are known as soon as it has run: N forwards and N backwards. Otherwise a first pass without gradients finds all
log-probs: 2N forwards.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..likelihood import TokenScores


Loss = Callable[[TokenScores, bool], Tensor]  # (scores, whether to record metrics) -> scalar


def segmented_backward(
    num_views: int,
    score: Callable[[int], TokenScores],
    loss: Loss,
    backward: Callable[[Tensor], None],
    defer_sync: Callable[[], AbstractContextManager],
    filler: Tensor | None,
) -> Tensor:
    """Back-propagate a loss through all views but the last, and return a scalar that completes it.

    Args:
        num_views (`int`): N, the same on every process.
        score (`Callable`): scores view n, with gradients where they are enabled.
        loss (`Callable`): the loss of assembled scores; called with `record=True` exactly once.
        backward (`Callable`): back-propagates a scalar, without an optimizer step.
        defer_sync (`Callable`): context in which gradients are accumulated without being synchronised between
            processes.
        filler (`Tensor` of shape (B, L), *optional*): for a token-separable loss, log-probs to put where a view scores
            nothing (the old policy's: ratio 1); None if the loss is not separable, and a first pass is needed.

    Returns:
        A scalar with the value of the whole loss and the gradient of the last view's part.
    """
    separable = filler is not None
    if not separable:
        with torch.no_grad():
            everything = _sum(score(n) for n in range(num_views))
        value, slopes = _slopes(loss, everything, record=True)
    seen = None
    for n in range(num_views):
        last = n == num_views - 1
        with nullcontext() if last else defer_sync():
            scores = score(n)
            if separable:
                detached = _detach(scores)
                seen = detached if seen is None else seen + detached
                here = TokenScores(
                    torch.where(scores.scored, detached.logps, filler), detached.entropies, scores.scored
                )
                _, slopes = _slopes(loss, here, record=False)
                slopes = [slope.masked_fill(~scores.scored, 0) for slope in slopes]
            surrogate = (slopes[0] * scores.logps).sum()
            if scores.entropies.requires_grad:
                surrogate = surrogate + (slopes[1] * scores.entropies).sum()
            if not last:
                backward(surrogate)
    if separable:
        with torch.no_grad():
            value = loss(seen, True)
    return surrogate + (value - surrogate).detach()


def _sum(parts) -> TokenScores:
    total = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _detach(scores: TokenScores) -> TokenScores:
    return TokenScores(scores.logps.detach(), scores.entropies.detach(), scores.scored)


def _slopes(loss: Loss, scores: TokenScores, record: bool) -> tuple[Tensor, list[Tensor]]:
    """Value of the loss, and its gradient with respect to log-probs and entropies."""
    leaves = [scores.logps.detach().requires_grad_(), scores.entropies.detach().requires_grad_()]
    with torch.enable_grad():
        value = loss(TokenScores(*leaves, scores.scored), record)
    slopes = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, slopes, strict=True)]
