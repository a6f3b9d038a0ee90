import os

import pytest

from trl_dllm.sandbox.inside import meter
from trl_dllm.sandbox.inside.meter import OFTEN, SELDOM, Look, Meter
from trl_dllm.sandbox.inside.request import Limits
from trl_dllm.sandbox.inside.usage import OpenFiles


MiB = 1 << 20
LIMITS = Limits(1.0, 512 * MiB, MiB, 64 * MiB, 64, 100)


class Tree:
    def __init__(self, memory=0, buffers=0):
        self.taken, self.buffers = memory, buffers

    def pids(self):
        return ["1", "2"]

    def memory(self, pids):
        assert pids == self.pids()
        return self.taken

    def open_files(self, pids):
        return OpenFiles(self.buffers, 0)


@pytest.mark.parametrize(
    "memory, buffers, disk, reason",
    [
        (0, 0, 0, None),
        (512 * MiB, 0, 64 * MiB, None),
        (512 * MiB + 1, 0, 0, "memory"),
        (511 * MiB, 2 * MiB, 0, "memory"),
        (0, 0, 64 * MiB + 1, "disk"),
    ],
)
def test_reasons(memory, buffers, disk, reason):
    assert Meter(LIMITS, Tree(memory, buffers), lambda pids: disk).look().reason == reason


def test_the_less_is_left_the_sooner_the_next_look(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    waits = [Meter(LIMITS, Tree(used * MiB), lambda pids: 0).look().wait for used in (0, 256, 384, 510)]
    assert waits == sorted(waits, reverse=True) and waits[0] <= SELDOM and OFTEN <= waits[-1] < 2 * SELDOM / 10
    # No more than what is left can be taken until then, by as many cores as there are.
    for used, wait in zip((0, 256, 384), waits, strict=False):
        assert 8 * meter.RATE * wait <= (512 - used) * MiB * 1.2
    nearly = Meter(LIMITS, Tree(), lambda pids: 63 * MiB).look()
    assert nearly.wait < waits[0]


def test_looking_takes_a_fifth_of_the_time_at_most(monkeypatch):
    clock = iter([0.0, 0.1])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(clock))
    assert Meter(LIMITS, Tree(), lambda pids: 0).look() == Look(None, pytest.approx(0.4))
