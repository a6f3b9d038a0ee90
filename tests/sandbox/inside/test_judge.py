import os

import pytest

from trl_dllm.sandbox.inside import judge
from trl_dllm.sandbox.inside.judge import CandidateError, StandIn, exception
from trl_dllm.sandbox.inside.wire import Closed, WireError, decode, encode, receive, send


@pytest.fixture
def program(monkeypatch):
    """The program's end of the channel: `answer(message)` before, `asked()` after a call."""
    calls, answers = os.pipe(), os.pipe()
    monkeypatch.setattr(judge, "READ_FROM", answers[0])
    monkeypatch.setattr(judge, "WRITE_TO", calls[1])

    class Program:
        def answer(self, *message):
            send(answers[1], encode(*message))

        def raw(self, message):
            send(answers[1], message)

        def asked(self):
            return decode(receive(calls[0]))

        def close(self):
            os.close(answers[1])

    return Program()


def test_calls_and_values(program):
    f = StandIn()
    program.answer((1, "value", [1, 2.5]))
    program.answer((2, "value", None))
    assert f(1, [2], x=(3,)) == [1, 2.5] and f() is None
    assert program.asked() == (1, (1, [2]), {"x": (3,)}) and program.asked() == (2, (), {})


def test_exceptions(program):
    f = StandIn()
    program.answer((1, "raised", "KeyError", "x"))
    with pytest.raises(KeyError):
        f()
    program.answer((2, "raised", "Strange", "x"))
    with pytest.raises(CandidateError, match="Strange: x"):
        f()


@pytest.mark.parametrize(
    "name",
    ["SystemExit", "KeyboardInterrupt", "BaseException", "StopIteration", "StopAsyncIteration", "print", "", "A.B"],
)
def test_no_other_exception_comes_from_outside(name):
    assert type(exception(name, "x")) is CandidateError


def test_built_in_exceptions():
    assert isinstance(exception("ValueError", "x"), ValueError) and str(exception("ValueError", "x")) == "x"
    assert type(exception("UnicodeDecodeError", "x")) is CandidateError  # which needs other arguments


@pytest.mark.parametrize(
    "reply",
    [
        (2, "value", 9),
        (True, "value", 9),
        (1.0, "value", 9),
        (1, "value"),
        (1, "value", 9, 9),
        (1, "passed"),
        (1, "passed", 9),
        (1, ["value"], 9),
        (1, "raised", "ValueError"),
        (1, "raised", 1, 2),
        [1, "value", 9],
        "ready",
        None,
        9,
    ],
)
def test_replies_that_are_none(program, reply):
    program.answer(reply)
    with pytest.raises(WireError, match="the program answered"):
        StandIn()(1)


def test_messages_that_are_none(program):
    program.raw(b"x")
    with pytest.raises(WireError, match="no value"):
        StandIn()(1)


def test_ready(program):
    program.answer("ready")
    StandIn().wait()
    program.answer((1, "value", 9))
    with pytest.raises(WireError, match="before it was called"):
        StandIn().wait()
    program.close()
    with pytest.raises(Closed):
        StandIn().wait()


def test_arguments_are_data(program):
    with pytest.raises(WireError, match="'function' is not data"):
        StandIn()(lambda: 1)
