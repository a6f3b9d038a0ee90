"""benchmarks/rollout.py at toy size: the layers take ten times the head's operations, and parts add up to a step."""

import importlib.util
import re
from pathlib import Path

import pytest


SMALL = "--hidden_size 32 --num_layers 2 --vocab_size 600 --prompt_length 6 --max_new_tokens 16 --block_length 8"


@pytest.fixture(scope="module")
def rollout():
    path = Path(__file__).parents[2] / "benchmarks" / "rollout.py"
    spec = importlib.util.spec_from_file_location("rollout_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("more", ["", "--temperature 0.7 --remasking entropy --rows 3", "--dtype bfloat16"])
def test_it_measures_a_step(rollout, capsys, more):
    found = rollout.main(rollout.make_parser().parse_args([*SMALL.split(), *more.split(), "--repeats", "3"]))
    assert found["operations"] == pytest.approx(10, rel=0.05)  # one unit of a tiny MLP is that much
    parts = sum(found[name] for name in ("layers", "head", "log-probs", "draw", "measure", "rest"))
    assert parts == pytest.approx(found["step"]) and found["ratio"] == found["step"] / found["bare forward"] > 1
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"step / bare forward: \d+\.\d{3}", printed) and "thread_time" in printed
    assert "1 thread(s)" in printed and "vocabulary 600" in printed


def test_layers_that_are_too_many_are_refused(rollout):
    args = rollout.make_parser().parse_args([*SMALL.split(), "--num_layers", "40"])
    with pytest.raises(ValueError, match="num_layers=40 take more than 10 times"):
        rollout.main(args)
