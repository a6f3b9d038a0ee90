"""Running programs in a sandbox of a kind that works here."""

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .inside.request import Limits, Report, Request


SANDBOXES = ("bubblewrap", "namespaces", "uid")  # the best first

TIMEOUT = 6.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 16 * 2**20
DISK_BYTES = 64 * 2**20
PROCESSES = 64
OUTPUT_BYTES = 64 * 2**10
GRACE = 30.0  # seconds beyond `timeout` for making the sandbox and taking it down, on a busy machine


class SandboxUnavailable(RuntimeError):
    """No sandbox can be made on this machine, and programs do not run without one."""


@dataclass(frozen=True)
class ExecutionResult:
    """
    What became of a program.

    Attributes:
        passed: it ran to its last line, no exception, no early exit, nothing left running.
        reason: "passed", or else "failed" (an exception: see `stderr`), "exited early" (`sys.exit`, whatever the
            status), "timeout", "memory" (its processes together), "disk" (its files together), "killed by signal N",
            "left processes" (something was still running at its end) or "sandbox" (it could not be started).
        stdout, stderr: what it printed, each up to `output_bytes`.
        seconds: wall-clock time of the program, without the making of the sandbox.
        sandbox: the kind it ran in.
    """

    passed: bool
    reason: str
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    sandbox: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Which sandbox


def choose_sandbox(sandbox: str = "auto") -> str:
    """
    The kind that will be used: for "auto" the first of bubblewrap, namespaces and (as root) uid that works here.

    Each kind is tried with an empty program once a process. Raises `SandboxUnavailable`, saying what each one lacks,
    and `ValueError` for an unknown kind.
    """
    if sandbox != "auto" and sandbox not in SANDBOXES:
        raise ValueError(f"sandbox must be 'auto' or one of {SANDBOXES}, got {sandbox!r}.")
    problems = []
    for kind in SANDBOXES if sandbox == "auto" else (sandbox,):
        problem = _problem(kind, os.geteuid() if hasattr(os, "geteuid") else -1, os.environ.get("PATH", ""))
        if problem is None:
            return kind
        problems.append(f"{kind}: {problem}")
    raise SandboxUnavailable(
        "Generated programs run in a sandbox or not at all, and none works here: "
        + "; ".join(problems)
        + ". Install bubblewrap, allow unprivileged user namespaces, or use another provider (register_provider)."
    )


@functools.cache
def _problem(kind: str, user: int, path: str) -> str | None:
    """What keeps this kind from working for this user and PATH, None if it works."""
    if platform.system() != "Linux":
        return "needs Linux"
    if kind == "bubblewrap" and shutil.which("bwrap", path=path) is None:
        return "bwrap is not installed"
    if kind == "uid" and user != 0:
        return "another user id needs root"
    try:
        result = _run(kind, "x = 1", "", Limits(20.0, MEMORY_BYTES, FILE_BYTES, DISK_BYTES, PROCESSES, OUTPUT_BYTES))
    except SandboxUnavailable as error:
        return str(error)
    return None if result.passed else f"an empty program ended with {result.reason!r} {result.stderr[-500:]}".strip()


@functools.cache
def _interpreter() -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_program(
    code: str,
    stdin: str = "",
    timeout: float = TIMEOUT,
    memory_bytes: int = MEMORY_BYTES,
    file_bytes: int = FILE_BYTES,
    disk_bytes: int = DISK_BYTES,
    processes: int = PROCESSES,
    output_bytes: int = OUTPUT_BYTES,
    sandbox: str = "auto",
) -> ExecutionResult:
    """
    Run a Python program in a sandbox, and wait for it. Whatever the program does becomes an `ExecutionResult`.

    Args:
        code: the source. It has the standard library and no other packages.
        stdin: what it can read from standard input.
        timeout: wall-clock seconds; CPU time is limited to about as much for each process.
        memory_bytes: address space of each process, and resident memory of all together.
        file_bytes: the largest file that it can write.
        disk_bytes: all its files together (in the kind "uid" those in its working directory).
        processes: processes and threads at a time.
        output_bytes: how much of stdout, and of stderr, is kept; the rest is read and dropped.
        sandbox: "auto", or one of `SANDBOXES`.

    Raises `SandboxUnavailable` where no sandbox can be made and `ValueError` for limits that are not positive.
    """
    limits = Limits(timeout, memory_bytes, file_bytes, disk_bytes, processes, output_bytes)
    for name, value in limits._asdict().items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    return _run(choose_sandbox(sandbox), code, stdin, limits)


def run_many(
    programs: Sequence[str], stdins: Sequence[str] | None = None, num_workers: int | None = None, **limits: Any
) -> list[ExecutionResult]:
    """
    `run_program` for each program, several at a time; results are in the programs' order.

    Args:
        stdins: one for each program, none by default.
        num_workers: programs at a time, as many as there are CPUs by default.
        limits: further arguments of `run_program`.
    """
    stdins = [""] * len(programs) if stdins is None else stdins
    if len(stdins) != len(programs):
        raise ValueError(f"{len(programs)} programs have {len(stdins)} inputs.")
    if not programs:
        return []
    choose_sandbox(limits.get("sandbox", "auto"))  # once, and not in every thread at the same time
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=max(1, min(num_workers, len(programs)))) as pool:
        return list(pool.map(lambda pair: run_program(pair[0], pair[1], **limits), zip(programs, stdins, strict=True)))


def _run(kind: str, code: str, stdin: str, limits: Limits) -> ExecutionResult:
    request = Request(
        kind=kind,
        code=code,
        stdin=stdin,
        limits=Limits(float(limits.timeout), *(int(value) for value in limits[1:])),
        processes_before=0 if kind == "uid" else _threads_of_user(),
        python=_interpreter(),
        bwrap=shutil.which("bwrap") or "",
        parent=os.getpid(),
    )
    # Only the kind "uid" works in a folder of this file system; the others have one that vanishes with them.
    if kind != "uid":
        return _launch(request)
    with tempfile.TemporaryDirectory(prefix="trl-dllm-", ignore_cleanup_errors=True) as folder:
        return _launch(request._replace(work=folder))


def _launch(request: Request) -> ExecutionResult:
    # No preexec_fn: this may be a thread of a large process. What the launcher needs to change, it changes itself.
    launcher = subprocess.Popen(
        [_interpreter(), "-I", "-S", str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    patience = request.limits.timeout + GRACE
    try:
        answer, errors = launcher.communicate(json.dumps(request).encode(), timeout=patience)
    except subprocess.TimeoutExpired:
        return ExecutionResult(False, "timeout", seconds=patience, sandbox=request.kind)
    finally:
        # Every process of the sandbox dies with the launcher; after a regular end there is none.
        launcher.kill()
        launcher.communicate()
    try:
        answered = json.loads(answer)
    except ValueError:
        answered = {"unavailable": "the launcher ended without a report"}
    if "unavailable" in answered:
        raise SandboxUnavailable(f"{answered['unavailable']} {errors.decode(errors='replace')[-500:]}".strip())
    report = Report(**answered)
    return ExecutionResult(report.reason == "passed", *report, sandbox=request.kind)
