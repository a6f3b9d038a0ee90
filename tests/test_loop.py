"""benchmarks/loop.py: what a loop costs is counted, so that a change which runs more fails here."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ratios():
    path = Path(__file__).parents[1] / "benchmarks" / "loop.py"
    spec = importlib.util.spec_from_file_location("loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(module.make_parser().parse_args(["--shares", "0.46", "0.5", "0.75", "1.0"]))


def test_a_loop_costs_less_than_the_released_one(ratios):
    assert ratios["AnyOrder 0.75"] >= 8
    assert ratios["StepMerge N = 8 0.75"] >= 1.15 and ratios["StepMerge N = 8 0.46"] >= 1.5
    assert ratios["StepMerge N = 8 0.75 stopped"] >= 1.2 and ratios["StepMerge N = 8 0.46 stopped"] >= 1.85


def test_an_update_costs_what_is_counted(ratios):
    assert ratios["StepMerge N = 8 0.5 ± 0.0"] <= 0.6 and ratios["AnyOrder 0.5 ± 0.0"] <= 0.7
    assert ratios["StepMerge N = 8 1.0 ± 0.0"] <= 1 and ratios["AnyOrder 1.0 ± 0.0"] <= 1
