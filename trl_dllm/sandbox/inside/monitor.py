"""The monitor: starts the program, watches it, and leaves nothing behind."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from .program import become_program
from .request import Limits, Report, Request
from .syscalls import PR_SET_DUMPABLE, anonymous_file, prctl
from .usage import resident_bytes, written_bytes


LOOK_EVERY = 0.05  # seconds between two counts of memory and disk
VERDICT_BYTES = 4096


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


def monitor(
    request: Request, uid: int | None = None, gid: int | None = None, kill_all: Callable[[], None] | None = None
) -> Report:
    """
    Run the program and return the report.

    In a PID namespace everything ends with this process. Elsewhere `kill_all()` ends what is left, and memory and disk
    are those of the user and of the working directory.
    """
    prctl(PR_SET_DUMPABLE, 0)  # a program of the same user could otherwise write to this process's memory
    nonce = os.urandom(16).hex().encode()
    source = anonymous_file(nonce + request.code.encode("utf-8", "surrogatepass"))
    stdin = anonymous_file(request.stdin.encode("utf-8", "surrogatepass"))
    stdout, stderr = (Pipe(request.limits.output_bytes) for _ in range(2))
    verdict = Pipe(VERDICT_BYTES)
    pipes = [stdout, stderr, verdict]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            become_program(request, (stdin, *(pipe.writing for pipe in pipes), source), uid, gid)
        except BaseException as error:
            os.write(2, (f"{type(error).__name__}: {error}\n").encode())
        finally:
            os._exit(122)
    for fd in (source, stdin, *(pipe.writing for pipe in pipes)):
        os.close(fd)

    def excess() -> str | None:
        if resident_bytes(None if kill_all is None else uid) > request.limits.memory_bytes:
            return "memory"
        if kill_all is not None and written_bytes(request.work) > request.limits.disk_bytes:
            return "disk"
        return None

    end = watch(child, pipes, start, request.limits, excess)
    left = False
    if isinstance(end, int):
        for pipe in pipes:  # what they still hold was written before the end
            pipe.drain()
        left = children_left()
    seconds = time.monotonic() - start
    if kill_all is not None:
        kill_all()
    reason = explain(end, verdict.content == nonce, left) if isinstance(end, int) else end
    return Report(reason, stdout.text, stderr.text, seconds)


def watch(child: int, pipes: list[Pipe], start: float, limits: Limits, excess: Callable[[], str | None]) -> int | str:
    """The status with which the program ended, or else why it has to be stopped."""
    poller, handle = select.poll(), None
    for pipe in pipes:
        poller.register(pipe.reading, select.POLLIN)
    with contextlib.suppress(AttributeError, OSError):
        handle = os.pidfd_open(child)
        poller.register(handle, select.POLLIN)
    next_look = 0.0
    while True:
        elapsed = time.monotonic() - start
        if elapsed > limits.timeout:
            return "timeout"
        if elapsed >= next_look:
            next_look = elapsed + LOOK_EVERY
            reason = excess()
            if reason is not None:
                return reason
        wait = min(limits.timeout - elapsed, LOOK_EVERY) if handle is not None else 0.005
        ready = {fd for fd, _ in poller.poll(1000 * wait)}
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
    if code in (121, 122):
        return "sandbox"
    if code == 120 or (code == 0 and not has_nonce):
        return "exited early"
    if code != 0:
        return "failed"
    return "left processes" if left else "passed"
