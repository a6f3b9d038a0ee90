import pytest
from helpers_inside import in_child

from trl_dllm.sandbox.inside.candidate import answer
from trl_dllm.sandbox.inside.wire import decode


def test_values():
    names = {"f": lambda x, y=1: [x, y]}
    assert decode(answer(3, names, "f", (1,), {"y": 2})) == (3, "value", [1, 2])


class Odd(KeyError):
    pass


class Worse(BaseException):
    def __str__(self):
        raise ValueError


def raising(error):
    def function():
        raise error

    return {"f": function}


@pytest.mark.parametrize(
    "names, kind, text",
    [
        (raising(ValueError("why")), "ValueError", "ValueError: why"),
        (raising(Odd("why")), "KeyError", "Odd"),
        (raising(KeyboardInterrupt()), "KeyboardInterrupt", "KeyboardInterrupt"),
        (raising(Worse()), "BaseException", "Worse"),
        (raising(ValueError("\ud800")), "ValueError", "?"),
        ({}, "NameError", "name 'f' is not defined"),
        ({"f": 3}, "TypeError", "not callable"),
        ({"f": lambda x: x}, "TypeError", "missing 1 required"),
    ],
)
def test_exceptions(names, kind, text):
    number, outcome, name, explanation = decode(answer(1, names, "f", (), {}))
    assert (number, outcome, name) == (1, "raised", kind) and text in explanation


def test_values_that_are_no_data_are_an_exception():
    deep = []
    deep.append(deep)
    assert decode(answer(1, {"f": lambda: deep}, "f", (), {}))[1:3] == ("raised", "ValueError")
    assert len(answer(1, raising(ValueError("x" * 10**6)), "f", (), {})) < 11_000


def test_an_exit_is_the_end_of_the_process():
    assert in_child(answer, 1, raising(SystemExit(0)), "f", (), {})[0] == 120
