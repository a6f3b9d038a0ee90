import os
import signal
import time

import pytest
from helpers_inside import in_child

from trl_dllm.sandbox.inside.meter import Look
from trl_dllm.sandbox.inside.monitor import Pipe, children_left, explain, reap, watch


def exited(status):
    return status << 8


@pytest.mark.parametrize(
    "status, nonce, left, reason",
    [
        (exited(0), True, False, "passed"),
        (exited(0), True, True, "left processes"),
        (exited(0), False, False, "exited early"),
        (exited(120), True, False, "exited early"),
        (exited(1), True, False, "failed"),
        (exited(7), False, False, "failed"),
        (exited(121), False, False, "sandbox"),
        (exited(122), True, False, "sandbox"),
        (signal.SIGKILL, True, False, "killed by signal 9"),
        (signal.SIGXCPU, False, False, "timeout"),
    ],
)
def test_reasons_of_an_end(status, nonce, left, reason):
    assert explain(status, nonce, left) == reason


def test_a_pipe_keeps_so_much_and_reads_all():
    pipe = Pipe(5)
    os.write(pipe.writing, b"abc")
    pipe.drain()
    os.write(pipe.writing, b"defg" + bytes(60_000))
    pipe.drain()
    assert pipe.content == b"abcde" and pipe.text == "abcde" and not pipe.closed
    os.write(pipe.writing, bytes(60_000))  # there is room again
    os.close(pipe.writing)
    pipe.drain()
    pipe.drain()
    assert pipe.closed and pipe.content == b"abcde"
    odd = Pipe(2)
    os.write(odd.writing, "é€".encode())
    odd.drain()
    assert odd.text == "é"


def fork(function):
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    return pid


class Meter:
    def __init__(self, *looks):
        self.looks = list(looks)

    def look(self):
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


ALL_WELL = Look(None, 0.01)


def test_watching():
    def child():
        def end(function, meter=ALL_WELL, seconds=10.0, abandoned=lambda: False):
            pid = fork(function)
            start = time.monotonic()
            looks = meter if isinstance(meter, tuple) and not isinstance(meter, Look) else (meter,)
            found = watch(pid, [Pipe(10)], start + seconds, Meter(*looks), abandoned)
            if not isinstance(found, int):
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            return found, time.monotonic() - start < 5

        sleep = lambda: time.sleep(60)  # noqa: E731
        return [
            end(lambda: os._exit(3)),
            end(sleep, seconds=0.2),
            end(sleep, (ALL_WELL, ALL_WELL, Look("memory", 0.0))),
            end(sleep, Look("disk", 0.0)),
            end(sleep, abandoned=lambda: True),
        ]

    status, text = in_child(child)
    assert status == 0, text
    assert eval(text) == [(3 << 8, True), ("timeout", True), ("memory", True), ("disk", True), ("abandoned", True)]


def test_processes_that_are_left():
    def child():
        quick, slow = fork(lambda: None), fork(lambda: time.sleep(60))
        time.sleep(0.2)
        found = [reap(quick), children_left()]
        os.kill(slow, 9)
        os.waitid(os.P_PID, slow, os.WEXITED | os.WNOWAIT)
        return [*found, children_left()]

    assert in_child(child) == (0, "[0, True, False]")
