"""benchmarks/any_order_decoding.py and any_order_loop.py at toy size: both sides compute the same."""

import importlib.util
import sys
from pathlib import Path

import pytest


SMALL = (
    "--hidden_size 64 --num_layers 1 --vocab_size 90 --prompt_length 5 --max_new_tokens 16 --block_length 8 --rows 2"
)


@pytest.fixture
def load(monkeypatch):
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_cached_and_uncached_decoding_draw_the_same(load, capsys):
    module = load("any_order_decoding")
    found = module.main(module.make_parser().parse_args([*SMALL.split(), "--repeats", "2"]))
    assert found["same_tokens"] == 1 and found["gap"] < 1e-4 and found["flops"] > 1 and found["time"] > 0
    assert "thread_time, best of 2" in capsys.readouterr().out


def test_both_loops_have_the_same_losses(load, capsys):
    load("any_order_decoding")
    module = load("any_order_loop")
    found = module.main(module.make_parser().parse_args([*SMALL.split(), "--repeats", "2"]))
    assert found["same_tokens"] == 1 and found["loss_gap"] < 1e-4 and found["ratio"] > 0
    assert "2 row(s), P=5, L=16" in " ".join(capsys.readouterr().out.split())
