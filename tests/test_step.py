"""benchmarks/step.py at toy size: its limit runs exactly the pairs that the trainer runs."""

import importlib.util
import time
from pathlib import Path

import pytest

from trl_dllm.trainer import grpo_trainer


TOY = "--hidden_size 64 --num_layers 1 --vocab_size 256 --lora_r 2 --prompt_length 24 --canvas 32 --steps 8 --cycles 2"


@pytest.fixture(scope="module")
def step():
    path = Path(__file__).parents[1] / "benchmarks" / "step.py"
    spec = importlib.util.spec_from_file_location("step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def args(step):
    return step.make_parser().parse_args(TOY.split())


@pytest.mark.parametrize("name", ["StepMerge N = 8", "AnyOrder"])
def test_the_limit_runs_what_the_trainer_runs(step, args, name):
    steps = step.measure(args, step.ESTIMATORS[name])
    assert len(steps) == 4
    for number, found in enumerate(steps):
        assert set(found.seconds) == set(step.PARTS)
        draws, first = number % 2 == 0, name == "StepMerge N = 8"
        # What the trainer has counted and the limit has not is the sampling: nothing where nothing is drawn.
        assert (found.operations["sampling"] > 0) == (found.seconds["sampling"] > 0) == draws
        scored = {"forward", "backward"} | ({"reference"} | ({"old"} if first else set()) if draws else set())
        assert {part for part, value in found.limit.items() if value > 0} == scored
        assert {part for part, value in found.operations.items() if value} - {"sampling"} == scored
        assert found.scoring == pytest.approx(sum(found.seconds.values()) - found.seconds["sampling"])
        assert found.scoring > found.limit.total() > 0


@pytest.mark.slow
def test_work_that_is_no_forward_counts_against_the_step(step, args, monkeypatch):
    before = step.main(args)["AnyOrder"]
    record = grpo_trainer.record_entropy

    def slow(*given):
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        return record(*given)

    monkeypatch.setattr(grpo_trainer, "record_entropy", slow)
    assert step.main(args)["AnyOrder"] > 2 * before
