"""Running programs in a sandbox of a kind that works here."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from .form import form_of
from .inside.request import Limits, Report
from .kinds import choose_sandbox, problem_now
from .launch import GRACE, Run, SandboxUnavailable, launch


T = TypeVar("T")

TIMEOUT = 6.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 16 * 2**20
DISK_BYTES = 64 * 2**20
PROCESSES = 64
OUTPUT_BYTES = 64 * 2**10
DEFAULT_LIMITS = Limits(TIMEOUT, MEMORY_BYTES, FILE_BYTES, DISK_BYTES, PROCESSES, OUTPUT_BYTES)


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
        judged: "inside", by its own process, or "outside", by another one: see `run_trial`.
    """

    passed: bool
    reason: str
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    judged: str = "inside"


@dataclass(frozen=True)
class Trial:
    """
    A program and a test of it.

    Attributes:
        program: the program's source, which is not trusted.
        test: source that ends with an exception unless the program is right; trusted.
        setup: source that the test needs before it, such as a helper function; trusted.
        entry_point: the function that is tested; None for the one name that setup and test use and do not define.
        script: program and test in one source, for a test that cannot be judged outside.
    """

    program: str
    test: str
    script: str
    setup: str = ""
    entry_point: str | None = None


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
        disk_bytes: all its files together, deleted ones that are still open among them.
        processes: processes and threads at a time.
        output_bytes: how much of stdout, and of stderr, is kept; the rest is read and dropped.
        sandbox: "auto", or one of `SANDBOXES`.

    Raises `SandboxUnavailable` where no sandbox can be made and `ValueError` for limits that are not positive numbers.
    """
    limits = _checked(Limits(timeout, memory_bytes, file_bytes, disk_bytes, processes, output_bytes))
    return _run(choose_sandbox(sandbox), limits, Run("script", [code], stdin))


def run_trial(trial: Trial, sandbox: str = "auto", **limits: Any) -> ExecutionResult:
    """
    Run a program and its test: from outside where the test allows it, else as one program.

    Outside, the test runs in a sandbox of its own and calls the program in another one: values go there and come back,
    expected values do not leave, and nothing that the program does to its own process can make the test pass. Which
    tests allow that is decided by their source alone (see `form`), never by what the program does.

    Args:
        limits: those of `run_program`, for the program and again for its test.

    Raises as `run_program`.
    """
    form = form_of(trial.setup, trial.test, trial.entry_point)
    if form.entry_point is None:
        return run_program(trial.script, sandbox=sandbox, **limits)
    checked = _checked(DEFAULT_LIMITS._replace(**limits))
    candidate = Run("candidate", [trial.program, form.entry_point])
    judge = Run("judge", [trial.setup, trial.test, form.entry_point])
    return _run(choose_sandbox(sandbox), checked, candidate, judge)


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
    pairs = list(zip(programs, stdins, strict=True))
    return _several(lambda pair: run_program(pair[0], pair[1], **limits), pairs, num_workers, **limits)


def run_trials(trials: Sequence[Trial], num_workers: int | None = None, **limits: Any) -> list[ExecutionResult]:
    """`run_trial` for each, as `run_many` does it."""
    return _several(lambda trial: run_trial(trial, **limits), trials, num_workers, **limits)


def _several(
    run: Callable[[T], ExecutionResult], items: Sequence[T], num_workers: int | None, sandbox: str = "auto", **_: Any
) -> list[ExecutionResult]:
    if not items:
        return []
    choose_sandbox(sandbox)  # once, and not in every thread at the same time
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=max(1, min(num_workers, len(items)))) as pool:
        return list(pool.map(run, items))


def _checked(limits: Limits) -> Limits:
    for name, value in limits._asdict().items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}.")
    return Limits(float(limits.timeout), *(int(value) for value in limits[1:]))


def _run(kind: str, limits: Limits, *runs: Run) -> ExecutionResult:
    judged = "inside" if len(runs) == 1 else "outside"
    try:
        reports = _launch_twice(kind, limits, runs)
    except SandboxUnavailable as error:
        if problem_now(kind) is not None:
            raise
        # It has to do with this program, then, which is no reason to stop the caller.
        return ExecutionResult(False, "sandbox", stderr=str(error), sandbox=kind, judged=judged)
    if reports is None:
        return ExecutionResult(False, "timeout", seconds=limits.timeout + GRACE, sandbox=kind, judged=judged)
    program, judge = reports[0], reports[-1]
    reason, stderr = program.reason, program.stderr
    if reason == "passed" and judged == "outside":  # it has answered as long as it was asked, which says nothing yet
        reason = judge.reason if judge.reason in ("passed", "timeout", "memory", "sandbox") else "failed"
    if reason != "passed" and judged == "outside":
        stderr += judge.stderr
    return ExecutionResult(reason == "passed", reason, program.stdout, stderr, program.seconds, kind, judged)


def _launch_twice(kind: str, limits: Limits, runs: Sequence[Run]) -> list[Report] | None:
    """A machine that is short of memory or processes may end a launcher; no program shall fail for that."""
    try:
        return launch(kind, limits, runs)
    except SandboxUnavailable:
        return launch(kind, limits, runs)
