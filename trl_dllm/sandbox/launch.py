"""Starting the processes that make sandboxes around themselves (`inside`), and reading what they report."""

import contextlib
import functools
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .inside.request import MAX_BYTES, UNAVAILABLE, Limits, Report, Request
from .inside.wire import WireError, decode, encode


# Not the folder itself as a program: `runpy`, which that takes, costs more than all the rest.
START = "import sys; sys.path.insert(0, sys.argv[1]); from inside.launcher import main; main()"
GRACE = 30.0  # seconds beyond `timeout` for making the sandbox and taking it down, on a busy machine


class SandboxUnavailable(RuntimeError):
    """No sandbox can be made on this machine, and programs do not run without one."""


class Run(NamedTuple):
    """What runs in one sandbox: see `inside.request.Request`."""

    runner: str
    arguments: list[str]
    stdin: str = ""


def launch(kind: str, limits: Limits, runs: Sequence[Run]) -> list[Report] | None:
    """
    Run one script, or a candidate and its judge, in as many sandboxes of this kind.

    Their reports, None if even the launcher takes too long. Raises `SandboxUnavailable` where one cannot be made.
    """
    requests = _requests(kind, limits, runs)
    # No preexec_fn: this may be a thread of a large process. What the launcher needs to change, it changes itself.
    launcher = subprocess.Popen(
        [interpreter(), "-I", "-S", "-c", START, os.path.dirname(os.path.abspath(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        answer, errors = launcher.communicate(encode(requests, limit=MAX_BYTES), timeout=limits.timeout + GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Every process of the sandbox ends with the launcher; after a regular end there is none.
        launcher.kill()
        launcher.communicate()
    try:
        reports = [Report(*fields) for fields in decode(answer)]
    except WireError:
        raise SandboxUnavailable(f"the launcher ended without a report {_said(errors)}".strip()) from None
    for report in reports:
        if report.reason == UNAVAILABLE:
            raise SandboxUnavailable(f"{report.stderr} {_said(errors)}".strip())
    return reports


def _said(errors: bytes) -> str:
    return errors.decode(errors="replace")[-500:]


def _requests(kind: str, limits: Limits, runs: Sequence[Run]) -> list[Request]:
    request = Request(
        kind=kind,
        runner="",
        arguments=[],
        stdin="",
        limits=limits,
        processes_before=0 if kind == "uid" else _threads_of_user(),
        python=interpreter(),
        bwrap=shutil.which("bwrap") or "",
        parent=os.getpid(),
    )
    requests = [request._replace(runner=run.runner, arguments=run.arguments, stdin=run.stdin) for run in runs]
    if kind == "uid":  # the others have a file system of their own, where every one works in /work
        work = os.path.join(tempfile.gettempdir(), f"trl-dllm-{secrets.token_hex(8)}")
        requests = [request._replace(work=f"{work}-{request.runner}") for request in requests]
    return requests


@functools.cache
def interpreter() -> str:
    """The interpreter behind a virtual environment: programs get no site-packages."""
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return base if os.access(base, os.X_OK) else sys.executable


def _threads_of_user() -> int:
    """Threads that already count against the process limit; newer kernels count each user namespace by itself."""
    release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in platform.release().split(".")[:2])
    if release >= (5, 14):
        return 0
    user, total = os.geteuid() or 65534, 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            total += len(os.listdir(folder / "task")) if folder.stat().st_uid == user else 0
    return total
