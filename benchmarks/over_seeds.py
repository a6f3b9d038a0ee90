"""What a few seeds say of a difference: its mean, its 95 % interval, and whether a claim holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trl_dllm.reports import curves


Scores = Mapping[int, tuple[float, float]]  # by seed: a score and its standard error over examples


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
    student = curves.over_seeds(values)
    mean = student["mean"]
    half = max(1.96 * math.hypot(*errors) / len(values), student.get("high", mean) - mean)
    half = math.hypot(half, 1.96 * shared)
    return Interval(mean, mean - half, mean + half, tuple(values))


def difference(one: Scores, other: Scores, one_base: bool = False) -> Interval | None:
    """`one` minus `other`, seed by seed; None without a common seed. With `one_base`, `other` is that of all seeds."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    differences = [one[seed][0] - other[seed][0] for seed in seeds]
    if one_base:
        return over_seeds(differences, [one[seed][1] for seed in seeds], shared=other[seeds[0]][1])
    return over_seeds(differences, [math.hypot(one[seed][1], other[seed][1]) for seed in seeds])
