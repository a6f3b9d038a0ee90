"""What a few seeds say of a difference: its mean, its 95 % interval, and whether a claim holds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trl_dllm.reports.samples import t_quantile


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval: the wider of Student's over seeds and of the normal over examples.

    Three seeds that happen to agree better than their numbers of examples allow would make Student's alone too narrow.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def text(self, scale: float = 1, digits: int = 2) -> str:
        """Mean and interval of a difference, and in how many seeds it is above 0."""
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        above, number = sum(value > 0 for value in self.values), len(self.values)
        return f"{mean} ({low} to {high}), above 0 in {above} of {number} seed{'s' * (number > 1)}"

    def verdict(self, positive: bool = True) -> str:
        """Of a claim that the mean is above 0 (or below it)."""
        if self.low <= 0 <= self.high:
            return "undecided"
        return "borne out" if (self.low > 0) == positive else "contradicted"


def over_seeds(values: Sequence[float], errors: Sequence[float], shared: float = 0) -> Interval:
    """Of one value a seed and its standard error over examples; `shared` is that of the one base of all seeds."""
    mean, number = statistics.fmean(values), len(values)
    half = 1.96 * math.hypot(*errors) / number
    if number > 1:
        half = max(half, t_quantile(number - 1) * statistics.stdev(values) / math.sqrt(number))
    half = math.hypot(half, 1.96 * shared)
    return Interval(mean, mean - half, mean + half, tuple(values))
