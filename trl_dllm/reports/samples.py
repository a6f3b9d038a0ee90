"""What sampled texts are like beside their reward: how varied, how long, and how likely to a model that is no judge.

A policy that games its reward shows here first: it repeats itself (distinct-n falls), never ends (no EOS), or writes
what the model it came from would not (cross-entropy rises).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..likelihood import Estimator, token_logps
from ..rollout import Rollout


def distinct(texts: Sequence[str], n: int, group: int | None = None) -> float:
    """The share of different ones among all runs of `n` words (Li et al. 2016), in lower case; 0 if there are none.

    The more texts, the more they share: with `group`, the mean over groups of that many texts (the last may be
    smaller), which can be compared between samples of different sizes.
    """
    if group is not None and len(texts) > group:
        parts = [texts[i : i + group] for i in range(0, len(texts), group)]
        return sum(distinct(part, n) for part in parts) / len(parts)
    runs = []
    for text in texts:
        words = text.lower().split()
        runs += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


def mean_interval(values: Sequence[float], z: float = 1.959964) -> dict[str, float]:
    """`mean` of the values and its normal 95 % interval, `low` to `high`; one value alone has no width.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values=[] has no mean; pass at least one.")
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    half = z * math.sqrt(variance / len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def t_quantile(df: int, coverage: float = 0.95) -> float:
    """How many standard errors the central interval of Student's t with `df` degrees of freedom reaches to each side.

    Raises:
        ValueError: no degree of freedom.
    """
    if df < 1:
        raise ValueError(f"df={df} must be at least 1: an interval needs two values.")

    def covered(t: float) -> float:  # P(|T| < t), a finite sum for whole df (Abramowitz and Stegun 26.7.3, 26.7.4)
        angle = math.atan(t / math.sqrt(df))
        cosine, term, total = math.cos(angle), 1.0, 1.0
        for k in range(2 + df % 2, df - 1, 2):
            term *= (k - 1) / k * cosine**2
            total += term
        if df % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * cosine * total if df > 1 else 0.0))

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) < coverage else (low, middle)
    return low


@torch.no_grad()
def cross_entropy(model: nn.Module, rollout: Rollout, estimator: Estimator, batch_size: int | None = None) -> float:
    """Mean negative log-prob a counted token, in nats, that `model` gives to what another one drew.

    Costs `estimator.num_views(rollout)` forwards a row. Scored at temperature 1, whatever the rollout's.
    """
    scores = token_logps(model, rollout, estimator, temperature=1.0, batch_size=batch_size)
    return float(-scores.logps.sum() / rollout.counted.sum().clamp(min=1))  # 0 where nothing is counted
