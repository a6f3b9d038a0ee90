"""Intervals over seeds: by formula, and by how often they hold the truth."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest


_spec = importlib.util.spec_from_file_location(
    "over_seeds", Path(__file__).parents[2] / "benchmarks" / "over_seeds.py"
)
module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module)


def test_the_wider_of_seeds_and_examples_is_taken():
    agreeing = module.over_seeds([0.5, 0.5, 0.5], [0.1, 0.1, 0.1])
    assert agreeing.high - agreeing.mean == pytest.approx(1.96 * 0.1 / math.sqrt(3))
    apart = module.over_seeds([0.0, 0.5, 1.0], [0.1, 0.1, 0.1])
    assert apart.high - apart.mean == pytest.approx(4.3026527 * 0.5 / math.sqrt(3))
    many = module.over_seeds([0.0, 1.0] * 5, [0.1] * 10)
    assert many.high - many.mean == pytest.approx(2.2622 * (10 / 36) ** 0.5 / 10**0.5, rel=1e-4), "of ten seeds"


def test_more_seeds_do_not_make_the_one_base_surer():
    found = module.over_seeds([0.5] * 5, [0.0] * 5, shared=0.1)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196))


@pytest.mark.parametrize("number", [1, 3, 5])
def test_it_holds_the_truth_nineteen_times_of_twenty(number):
    """Seeds that differ, each and the base measured with an error: a difference of 0 is called one in 5 % at most."""
    rng = np.random.default_rng(number)
    spread = 0.0 if number == 1 else 0.05  # one seed says nothing of others
    held = 0
    for _ in range(2000):
        base = rng.normal(0, 0.04)
        values = rng.normal(0, spread, number) + rng.normal(0, 0.04, number) - base
        held += module.over_seeds(list(values), [0.04] * number, shared=0.04).verdict() == "undecided"
    assert 0.94 < held / 2000 < 0.99


def test_it_says_what_was_found():
    found = module.Interval(0.25, -0.05, 0.55, (0.5, 0.0))
    assert found.text() == "+0.25 (-0.05 to +0.55), above 0 in 1 of 2 seeds"
    assert found.text(100, 1) == "+25.0 (-5.0 to +55.0), above 0 in 1 of 2 seeds"
    assert [module.Interval(1, 0.5, 2, ()).verdict(more) for more in (True, False)] == ["borne out", "contradicted"]
    assert [module.Interval(-1, -2, -0.5, ()).verdict(more) for more in (True, False)] == ["contradicted", "borne out"]
