"""The monitor: starts the program, watches it, and leaves nothing behind."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from .main import EXITED_EARLY
from .meter import Meter
from .program import NO_FILTER, NOT_STARTED, become_program, payload
from .request import Report, Request
from .syscalls import PR_SET_DUMPABLE, anonymous_file, prctl
from .usage import ProcessTree


VERDICT_BYTES = 4096


class Surroundings(NamedTuple):
    """
    What a kind of sandbox provides.

    Attributes:
        tree: the processes below the monitor.
        disk: what files take, see `Meter`.
        uid, gid: the program's user and group, None for the monitor's own.
        end: ends every process that is left; unneeded in a PID namespace, which ends with the monitor.
        abandoned: has the caller gone? Where the kernel would end the monitor too, it need not ask.
    """

    tree: ProcessTree
    disk: Callable[[list[str]], int]
    uid: int | None = None
    gid: int | None = None
    end: Callable[[], None] = lambda: None
    abandoned: Callable[[], bool] = lambda: False


class Pipe:
    """What the program writes to one of its descriptors, up to a limit; the rest is read and dropped."""

    def __init__(self, limit: int):
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.limit = limit
        self.content = b""
        self.closed = False

    def drain(self) -> None:
        """Read what is there, a megabyte at most: endless output must not keep the monitor from its clock."""
        for _ in range(16):
            try:
                part = os.read(self.reading, 65536)
            except BlockingIOError:
                return
            if not part:
                self.closed = True
                return
            self.content += part[: max(0, self.limit - len(self.content))]

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


def monitor(request: Request, around: Surroundings) -> Report:
    """Run the program and return the report."""
    prctl(PR_SET_DUMPABLE, 0)  # a program of the same user could otherwise write to this process's memory
    nonce = os.urandom(16).hex().encode()
    stdin = anonymous_file(request.stdin.encode("utf-8", "surrogatepass"))
    source = anonymous_file(payload(request, nonce))
    stdout, stderr = (Pipe(request.limits.output_bytes) for _ in range(2))
    verdict = Pipe(VERDICT_BYTES)
    pipes = [stdout, stderr, verdict]
    new_processes = around.tree.works()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            descriptors = (stdin, *(pipe.writing for pipe in pipes), source)
            become_program(request, descriptors, around.uid, around.gid, new_processes)
        except BaseException as error:
            os.write(2, (f"{type(error).__name__}: {error}\n").encode())
        finally:
            os._exit(NOT_STARTED)
    for fd in (source, stdin, *(pipe.writing for pipe in pipes), *request.channel):
        os.close(fd)
    meter = Meter(request.limits, around.tree, around.disk)
    end = watch(child, pipes, start + request.limits.timeout, meter, around.abandoned)
    left = False
    if isinstance(end, int):
        for pipe in pipes:  # what they still hold was written before the end
            pipe.drain()
        left = children_left()
    seconds = time.monotonic() - start
    around.end()
    reason = explain(end, verdict.content == nonce, left) if isinstance(end, int) else end
    return Report(reason, stdout.text, stderr.text, seconds)


def watch(child: int, pipes: list[Pipe], deadline: float, meter: Meter, abandoned: Callable[[], bool]) -> int | str:
    """The status with which the program ended, or else why it has to be stopped."""
    poller, handle = select.poll(), None
    for pipe in pipes:
        poller.register(pipe.reading, select.POLLIN)
    with contextlib.suppress(AttributeError, OSError):
        handle = os.pidfd_open(child)
        poller.register(handle, select.POLLIN)
    next_look = 0.0
    while True:
        if time.monotonic() > deadline:
            return "timeout"
        if time.monotonic() >= next_look:
            if abandoned():
                return "abandoned"
            look = meter.look()
            if look.reason is not None:
                return look.reason
            next_look = time.monotonic() + look.wait
        wait = min(deadline, next_look) - time.monotonic() if handle is not None else 0.005
        ready = {fd for fd, _ in poller.poll(1000 * max(wait, 0.0))}
        for pipe in pipes:
            if pipe.reading in ready:
                pipe.drain()
                if pipe.closed:
                    poller.unregister(pipe.reading)
        status = reap(child)
        if status is not None:
            return status


def reap(child: int) -> int | None:
    """Collect what has died; the status of `child` if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def children_left() -> bool:
    """Is there a live process still? Orphans have come to this process by now."""
    deadline = time.monotonic() + 0.05  # one that is just ending may take that long
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.002)


def explain(status: int, has_nonce: bool, left: bool) -> str:
    """The reason of a program that ended by itself; `left` says whether it left processes behind."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "timeout" if number == signal.SIGXCPU else f"killed by signal {number}"
    code = os.WEXITSTATUS(status)
    if code in (NO_FILTER, NOT_STARTED):
        return "sandbox"
    if code == EXITED_EARLY or (code == 0 and not has_nonce):
        return "exited early"
    if code != 0:
        return "failed"
    return "left processes" if left else "passed"
