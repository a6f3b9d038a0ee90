"""Where the process that `sandbox.run` starts begins."""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from .bubblewrap import run_in_bubblewrap
from .monitor import monitor
from .namespaces import run_in_namespaces
from .other_user import run_as_other_user
from .request import Limits, Report, Request, Unavailable
from .syscalls import PR_SET_PDEATHSIG, prctl


KINDS: dict[str, Callable[[Request], Report]] = {
    "namespaces": run_in_namespaces,
    "bubblewrap": run_in_bubblewrap,
    "uid": run_as_other_user,
}


def main() -> None:
    """Read a request, run it in a sandbox of its kind, write the report (or {"unavailable": why})."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    request = read_request()
    if os.getppid() != request.parent:
        return  # it died before the first line
    report: dict[str, Any]
    try:
        report = KINDS[request.kind](request)._asdict()
    except (Unavailable, OSError) as error:
        report = {"unavailable": str(error)}
    json.dump(report, sys.stdout)


def main_inside() -> None:
    """The same where the sandbox has been made by bubblewrap, around this very process."""
    request = read_request()
    with open(os.dup(1), "w") as answer:
        for fd in (0, 1):
            os.dup2(2, fd)
        json.dump(monitor(request)._asdict(), answer)


def read_request() -> Request:
    request = Request(*json.load(sys.stdin))
    return request._replace(limits=Limits(*request.limits))
