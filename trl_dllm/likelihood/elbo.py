"""The evidence lower bound, and its coupled form (LLaDA's likelihood evaluation; ESPO, GDPO; DiffuCoder's coupling).

Draw how many of the R counted positions to mask, l, uniformly in 1..R, mask l of them without replacement, and weight
their log-probs by R / l:

    log p(y) >= E_l E_U:|U|=l [ R/l · Σ_{i in U} log p(y_i | y_-U) ].

(A weight of 1/t with t uniform would have infinite variance.)
"""

from torch import Tensor

from ..noise import Purpose, random_ranks, uniform
from ..rollout import Rollout
from .view import Estimator, View, canvas_view


class Elbo(Estimator):
    """Monte-Carlo evidence lower bound over the counted positions (ESPO, GDPO).

    Its R / l-weighted terms are no log-probs of tokens, and exponentiating their differences is meaningless: the bound
    is a number of the sequence. So a row's estimate, which is unbiased, is spread evenly over its R counted positions,
    ELBO / R on each. A ratio is then exp((ELBO_θ - ELBO_old) / R) at the token and at the sequence level alike, the k3
    KL is that of the mean difference, and every loss keeps its meaning. Costs `num_samples` forwards of P + L tokens a
    row.

    Args:
        num_samples (`int`): M, draws that are averaged.
        coupled (`bool`): draws come in complementary pairs, U and its complement (DiffuCoder), so that every position
            is scored exactly once a pair, with weight 1: an average of log-probs, which stays per token, and no longer
            the bound. M must be even.
        stratified (`bool`): how many positions the draws mask is spread evenly over 1..R, from a common random start
            (GDPO's fixed points, moved): the same mean, and less variance.
    """

    stochastic = True

    def __init__(self, num_samples: int = 2, coupled: bool = False, stratified: bool = False):
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        if coupled and num_samples % 2:
            raise ValueError(f"num_samples={num_samples} must be even with coupled=True: draws come in pairs.")
        self.num_samples, self.coupled, self.stratified = num_samples, coupled, stratified
        self.disjoint = coupled and num_samples == 2
        self.per_token = coupled

    def num_views(self, rollout: Rollout) -> int:
        return self.num_samples

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        draw = n // 2 if self.coupled else n
        counted = rollout.counted
        total = counted.sum(dim=1, keepdim=True)
        place = uniform(seeds, Purpose.VIEW, iteration, 0 if self.stratified else draw, 0)[:, None]
        if self.stratified:
            place = ((place + draw) / (self.num_samples // 2 if self.coupled else self.num_samples)).clamp(
                max=1 - 1e-9
            )
        number = 1 + (place * total).long()  # l in 1..R
        order = random_ranks(counted, seeds, Purpose.VIEW, iteration, draw, 1)
        chosen = counted & ((order >= number) if self.coupled and n % 2 else (order < number))
        if n >= self.num_samples:  # asked for by a process that needs more views than this one
            chosen = chosen & False
        weight = 1 / (self.num_samples // 2) if self.coupled else (total / number) / self.num_samples
        view_weight = rollout.logps.new_ones(counted.shape) * weight
        return canvas_view(rollout, rollout.revealed & ~chosen, chosen, view_weight.to(rollout.logps.dtype))

    def scored(self, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        return rollout.counted

    def assemble(self, logps: Tensor, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        if self.coupled:
            return logps
        counted = rollout.counted
        return counted * (logps.sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1))


class CoupledElbo(Elbo):
    """`Elbo(coupled=True)` under a name of its own: DiffuCoder's complementary pairs. Costs `num_samples` forwards."""

    def __init__(self, num_samples: int = 2):
        super().__init__(num_samples, coupled=True)
