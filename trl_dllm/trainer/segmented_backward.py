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
from dataclasses import replace

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
    unscored_logps: Tensor | None,
) -> Tensor:
    """Back-propagate a loss through all views but the last, and return a scalar that completes it.

    Args:
        num_views (`int`): N, the same on every process.
        score (`Callable`): scores view n, with gradients where they are enabled.
        loss (`Callable`): the loss of assembled scores; called with `record=True` exactly once.
        backward (`Callable`): back-propagates a scalar, without an optimizer step.
        defer_sync (`Callable`): context in which gradients are accumulated without being synchronised between
            processes.
        unscored_logps (`Tensor` of shape (B, L), *optional*): for a token-separable loss, the log-probs that stand
            where a view scores nothing (the old policy's: ratio 1). None: not separable, it needs a first pass.

    Returns:
        A scalar with the value of the whole loss and the gradient of the last view's part.
    """
    if unscored_logps is None:
        with torch.no_grad():
            everything = TokenScores.sum(score(n) for n in range(num_views))
        value, slopes = _slopes(loss, everything, record=True)
    seen: list[TokenScores] = []
    for n in range(num_views):
        last = n == num_views - 1
        with nullcontext() if last else defer_sync():
            scores = score(n)
            if unscored_logps is not None:
                detached = scores.map(Tensor.detach)
                seen.append(detached)
                # Positions of other views get the old policy's log-prob, so that the loss is finite. Their slopes meet
                # zeros in this view's table and add nothing.
                here = replace(detached, logps=torch.where(scores.scored, detached.logps, unscored_logps))
                _, slopes = _slopes(loss, here, record=False)
            surrogate = torch.stack(
                [
                    (slope * table).sum()
                    for slope, table in zip(slopes, scores.tables, strict=True)
                    if table.requires_grad
                ]
            ).sum()
            if not last:
                backward(surrogate)
    if unscored_logps is not None:
        with torch.no_grad():
            value = loss(TokenScores.sum(seen), True)
    return surrogate + (value - surrogate).detach()


def _slopes(loss: Loss, scores: TokenScores, record: bool) -> tuple[Tensor, list[Tensor]]:
    """Value of the loss, and its gradient with respect to each table of the scores."""
    leaves = scores.map(lambda table: table.detach().requires_grad_())
    with torch.enable_grad():
        value = loss(leaves, record)
    slopes = torch.autograd.grad(value, leaves.tables, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.tables, slopes, strict=True)
    ]
