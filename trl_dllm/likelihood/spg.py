"""SPG's bounds from both sides: a completion that is to become likelier is scored by an evidence lower bound, one that
is to become less likely by an evidence upper bound (Wang et al., arXiv 2510.09541; docs/methods.md §2.9).

Both are read off the same M draws. In draw j the set U_j of the R counted positions is masked, with weight
w_ij = R / |U_j| at its members and 0 elsewhere:

    lower = 1/M Σ_j Σ_i w_ij log π_ij
    upper = R/|S| Σ_{i in S} 1/β log( Σ_j w_ij π_ij^β / Σ_j w_ij ),   S = the positions that some draw masks,

and a row of negative advantage counts ω · upper + (1 - ω) · lower.
"""

import torch
from torch import Tensor

from ..noise import Purpose, random_ranks, uniform
from ..rollout import Rollout
from .view import Estimator, View, canvas_view


class SandwichedBounds(Estimator):
    """SPG: the lower bound where a row's advantage is at least 0 or not known, else a mix of upper and lower bound.

    The sign is that of `Rollout.advantages`, which the trainer sets. As `Elbo`'s, the number is of the row, and 1/R of
    it stands at each counted position. Costs `num_samples` forwards of P + L tokens a row, and as many again without
    gradients in an update, since the upper bound's weights need all draws.

    A draw masks a random part of one block, 1 to all of its counted positions with equal probability; blocks before it
    are clean, and everything behind it is masked. All masked positions that are counted are scored. The draws of a row
    are of different blocks, as far as its completion has some.

    Args:
        num_samples (`int`): M, draws.
        eubo_beta (`float`): β of the upper bound, above 0; the paper takes 1 and more.
        mix_weight (`float`): ω, the share of the upper bound where the advantage is negative, in [0, 1]: 1 is "SPG w/
            EUBO", 0 the lower bound for all rows.
        block_length (`int`, *optional*): positions of a block, the sampler's; the last one may be shorter. None: the
            canvas is one block, so that a draw masks a random set of any size.
        p_mask_clean (`float`): probability with which a position of the blocks before is masked all the same, in each
            draw.
    """

    stochastic = True
    per_token = False
    apart = True
    signed = True

    def __init__(
        self,
        num_samples: int = 2,
        eubo_beta: float = 1.5,
        mix_weight: float = 0.5,
        block_length: int | None = None,
        p_mask_clean: float = 0.0,
    ):
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1; SPG draws 2.")
        if not 0 < eubo_beta < torch.inf:
            raise ValueError(f"eubo_beta={eubo_beta} must be a number above 0; SPG takes 1.0 to 2.0.")
        if not 0 <= mix_weight <= 1:
            raise ValueError(
                f"mix_weight={mix_weight} must be in [0, 1]; SPG takes 0.5, or 1 for the upper bound alone."
            )
        if block_length is not None and block_length < 1:
            raise ValueError(f"block_length={block_length} must be at least 1, or None for one block.")
        if not 0 <= p_mask_clean < 1:
            raise ValueError(f"p_mask_clean={p_mask_clean} must be in [0, 1); SPG takes 0.15.")
        self.num_samples, self.eubo_beta, self.mix_weight = num_samples, eubo_beta, mix_weight
        self.block_length, self.p_mask_clean = block_length, p_mask_clean

    def num_views(self, rollout: Rollout) -> int:
        return self.num_samples

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        visible, masked = self._draw(rollout, n, seeds, iteration)
        return canvas_view(rollout, visible, masked, self._weight(rollout, masked))

    def scored(self, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        return rollout.counted

    def _draw(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """What draw n shows, and what it scores, bool (B, L) each."""
        counted = rollout.counted
        length, device = counted.shape[1], counted.device
        size = self.block_length or length
        position = torch.arange(length, device=device)
        block = position // size
        members = block == torch.arange(-(-length // size), device=device)[:, None]  # (blocks, L)
        used = (counted[:, None] & members).any(dim=2)  # (B, blocks)
        order = random_ranks(used, seeds, Purpose.VIEW, iteration, 0, 0)
        drawn = used & (order == n % used.sum(dim=1, keepdim=True).clamp(min=1))
        current = drawn.long().argmax(dim=1, keepdim=True)

        inside = counted & (block == current)
        place = uniform(seeds, Purpose.VIEW, iteration, n, 1)[:, None]
        number = 1 + (place * inside.sum(dim=1, keepdim=True)).long()
        chosen = inside & (random_ranks(inside, seeds, Purpose.VIEW, iteration, n, 2) < number)
        hit = uniform(seeds[:, None], Purpose.VIEW, iteration, n, 3, position) < self.p_mask_clean
        before = block < current
        # What no loss counts is not shown from the drawn block on: the bounds are of the counted tokens.
        visible = (before & rollout.revealed & ~(hit & counted)) | (inside & ~chosen)
        masked = counted & ~visible
        return visible, masked & False if n >= self.num_samples else masked

    def _weight(self, rollout: Rollout, masked: Tensor) -> Tensor:
        """w / M at masked positions, 0 elsewhere, (B, L)."""
        total = rollout.counted.sum(dim=1, keepdim=True).to(rollout.logps.dtype)
        return masked * total / masked.sum(dim=1, keepdim=True).clamp(min=1) / self.num_samples

    def assemble(self, logps: Tensor, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        counted, total = rollout.counted, rollout.counted.sum(dim=1).clamp(min=1)
        row = logps.sum(dim=(0, 2))
        if rollout.advantages is not None and self.mix_weight > 0:
            masked = torch.stack([self._draw(rollout, n, seeds, iteration)[1] for n in range(len(logps))])
            weight = torch.stack([self._weight(rollout, part) for part in masked]).to(logps.dtype)
            upper = total * self._upper(logps, weight, masked)
            negative = (rollout.advantages.view(len(counted), -1) < 0).any(dim=1)
            row = torch.where(negative, self.mix_weight * upper + (1 - self.mix_weight) * row, row)
        return counted * (row / total)[:, None]

    def _upper(self, weighted: Tensor, weight: Tensor, masked: Tensor) -> Tensor:
        """The upper bound of each row a position, (B,), of weighted log-probs (M, B, L) and their weights."""
        some = masked.any(dim=0)

        def log_sum(exponent: Tensor) -> Tensor:
            # Where no draw masks a position there is no number, and no gradient that could be NaN.
            return torch.where(some, exponent.masked_fill(~masked, -torch.inf), 0).logsumexp(dim=0)

        log_weight = weight.masked_fill(~masked, 1).log()
        logps = weighted / weight.masked_fill(~masked, 1)
        token = (log_sum(self.eubo_beta * logps + log_weight) - log_sum(log_weight)) / self.eubo_beta
        return (token * some).sum(dim=1) / some.sum(dim=1).clamp(min=1)
