"""How much of its limits a program has used, and how soon one has to look again."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from .request import Limits
from .usage import ProcessTree


RATE = 4 << 30  # bytes a second that one core can make resident, or write, at most: twice what was measured
SELDOM, OFTEN = 0.05, 0.001  # seconds between two looks
PATIENCE = 4  # a look takes no more than a fifth of the time, however many processes there are


class Look(NamedTuple):
    """`reason` to stop the program ("memory" or "disk", None for none), and `wait`, seconds until the next look."""

    reason: str | None
    wait: float


class Meter:
    """
    Looks at a program's processes so often that they cannot take much more than their limits between two looks.

    Args:
        disk: what their files take in bytes, given their ids; where the file system itself sets a limit, 0.
    """

    def __init__(self, limits: Limits, tree: ProcessTree, disk: Callable[[list[str]], int]):
        self.limits, self.tree, self.disk = limits, tree, disk
        self.cores = min(os.cpu_count() or 1, limits.processes)

    def look(self) -> Look:
        start = time.monotonic()
        pids = self.tree.pids()
        memory_left = self.limits.memory_bytes - self.tree.memory(pids) - self.tree.open_files(pids).buffers
        if memory_left < 0:
            return Look("memory", 0.0)
        disk_left = self.limits.disk_bytes - self.disk(pids)
        if disk_left < 0:
            return Look("disk", 0.0)
        left = min(memory_left, disk_left) if disk_left < self.limits.disk_bytes else memory_left
        wait = min(max(left / (self.cores * RATE), OFTEN), SELDOM)
        return Look(None, max(wait, PATIENCE * (time.monotonic() - start)))
