"""Where the process that `sandbox.run` starts begins."""

import os
import signal
import sys
from collections.abc import Callable

from .bubblewrap import run_in_bubblewrap
from .namespaces import run_in_namespaces
from .other_user import run_as_other_user
from .request import MAX_BYTES, UNAVAILABLE, Report, Request, Unavailable, read_report, write_report
from .syscalls import PR_SET_PDEATHSIG, prctl
from .wire import decode, encode


KINDS: dict[str, Callable[[Request], Report]] = {
    "namespaces": run_in_namespaces,
    "bubblewrap": run_in_bubblewrap,
    "uid": run_as_other_user,
}


def main() -> None:
    """
    Read requests, run each in a sandbox of its own, write their reports.

    One request is a script. Two are a candidate and its judge, between which there is a channel.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 of a namespace is spared what it has no handler for
    requests = [Request.of(fields) for fields in decode(sys.stdin.buffer.read())]
    if os.getppid() != requests[0].parent:
        return  # it died before the first line
    if len(requests) == 2:
        calls, answers = os.pipe(), os.pipe()
        requests = [
            requests[0]._replace(channel=(calls[0], answers[1])),
            requests[1]._replace(channel=(answers[0], calls[1])),
        ]
    channels = [fd for request in requests for fd in request.channel]
    reports = [start(request, [fd for fd in channels if fd not in request.channel]) for request in requests]
    for fd in channels:
        os.close(fd)
    sys.stdout.buffer.write(encode([read_report(fd) for fd in reports], limit=MAX_BYTES))


def start(request: Request, others: list[int]) -> int:
    """Run a request in a process of its own, without the descriptors of `others`; where its report can be read."""
    request = request._replace(parent=os.getpid())
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        return reading
    try:
        for fd in (reading, *others):
            os.close(fd)
        if request.kind != "uid":  # which has to end its program first, see `Surroundings.abandoned`
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            report = KINDS[request.kind](request)
        except (Unavailable, OSError) as error:
            report = Report(UNAVAILABLE, "", str(error), 0.0)
        write_report(writing, report)
    finally:
        os._exit(0)
