"""Running generated programs, which are untrusted, and reporting whether they pass.

    result = run_program("assert sorted([2, 1]) == [1, 2]", timeout=5)
    result.passed, result.reason, result.stdout

What the local sandbox protects from: a program gets a process of its own, under limits of CPU time, wall-clock time,
memory, file size, disk and number of processes; no network; an empty working directory that vanishes; no environment,
open files or secrets of the caller; and when it ends, all of its children end. In the kinds "bubblewrap" and
"namespaces" it sees a file system with Python's own folders, read-only, and nothing else.

What it does not protect from: a bug in the kernel, and a slow machine (programs share the CPU with the caller, and N
at a time may take N times `memory_bytes`). The kind "uid" (root, where no namespaces can be made, as in many
containers) sees the whole file system as any user of the machine does, and may fill /tmp. And no sandbox keeps a
program from cheating its own tests, which share its interpreter: an object that claims to equal everything passes
every assertion, and code that digs through the interpreter's frames can claim success. What a program prints and how
it exits cannot: success is a secret of the run, sent on a separate channel after the last line has run.

Nothing here runs unasked: rewards that need it want `allow_code_execution=True` or TRL_DLLM_ALLOW_CODE_EXECUTION=1.
"""

import contextlib
import difflib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


ALLOW_VARIABLE = "TRL_DLLM_ALLOW_CODE_EXECUTION"
SANDBOXES = ("bubblewrap", "namespaces", "uid")  # the best first

TIMEOUT = 6.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 16 * 2**20
DISK_BYTES = 64 * 2**20
PROCESSES = 64
OUTPUT_BYTES = 64 * 2**10
GRACE = 30.0  # seconds beyond `timeout` for making the sandbox and taking it down, on a busy machine

_LAUNCHER = Path(__file__).with_name("_sandbox.py")


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
        result = _run(kind, "x = 1", "", 20.0, MEMORY_BYTES, FILE_BYTES, DISK_BYTES, PROCESSES, OUTPUT_BYTES)
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
    limits = {
        "timeout": timeout,
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "disk_bytes": disk_bytes,
        "processes": processes,
        "output_bytes": output_bytes,
    }
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    return _run(choose_sandbox(sandbox), code, stdin, **limits)


def run_many(
    programs: Sequence[str], stdins: Sequence[str] | None = None, num_workers: int | None = None, **limits
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


def _run(
    kind: str,
    code: str,
    stdin: str,
    timeout: float,
    memory_bytes: int,
    file_bytes: int,
    disk_bytes: int,
    processes: int,
    output_bytes: int,
) -> ExecutionResult:
    request = {
        "kind": kind,
        "code": code,
        "stdin": stdin,
        "timeout": float(timeout),
        "memory_bytes": int(memory_bytes),
        "file_bytes": int(file_bytes),
        "disk_bytes": int(disk_bytes),
        "processes": int(processes),
        "processes_before": 0 if kind == "uid" else _threads_of_user(),
        "output_bytes": int(output_bytes),
        "python": _interpreter(),
        "bwrap": shutil.which("bwrap"),
        "parent": os.getpid(),
    }
    # Only the kind "uid" works in a folder of this file system; the others have one that vanishes with them.
    folder = tempfile.TemporaryDirectory(prefix="trl-dllm-", ignore_cleanup_errors=True) if kind == "uid" else None
    try:
        if folder is not None:
            request["work"] = folder.name
        # No preexec_fn: this may be a thread of a large process. What the launcher needs to change, it changes itself.
        launcher = subprocess.Popen(
            [_interpreter(), "-I", "-S", str(_LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            answer, errors = launcher.communicate(json.dumps(request).encode(), timeout=timeout + GRACE)
        except subprocess.TimeoutExpired:
            return ExecutionResult(False, "timeout", seconds=timeout + GRACE, sandbox=kind)
        finally:
            # Every process of the sandbox dies with the launcher; after a regular end there is none.
            launcher.kill()
            launcher.communicate()
    finally:
        if folder is not None:
            folder.cleanup()
    try:
        report = json.loads(answer)
    except ValueError:
        report = {"unavailable": "the launcher ended without a report"}
    if "unavailable" in report:
        raise SandboxUnavailable(f"{report['unavailable']} {errors.decode(errors='replace')[-500:]}".strip())
    return ExecutionResult(**report, sandbox=kind)


# ---------------------------------------------------------------------------------------------------------------------
# Providers: where programs run


@runtime_checkable
class CodeExecutionProvider(Protocol):
    """
    Where scripts run; the interface of open-r1's providers, so that those for E2B, Morph or Piston fit.

    `execute_scripts` takes scripts and the language of each, and returns a number for each: what its last line, an
    expression, evaluates to, 0.0 if the script fails before. (The scripts of this library end in the line `1.0`.)
    """

    def execute_scripts(self, scripts: list[str], languages: list[str]) -> list[float]: ...


class LocalProvider:
    """
    Scripts in the local sandbox: 1.0 for one that runs to its last line, else 0.0.

    Args:
        num_workers: scripts at a time, as many as there are CPUs by default.
        limits: arguments of `run_program`, such as `timeout`.
    """

    def __init__(self, num_workers: int | None = None, **limits):
        self.num_workers = num_workers
        self.limits = limits

    def execute_scripts(self, scripts: list[str], languages: list[str]) -> list[float]:
        """Raises `ValueError` for any language but "python", and `SandboxUnavailable`."""
        if len(scripts) != len(languages):
            raise ValueError(f"{len(scripts)} scripts have {len(languages)} languages.")
        for language in languages:
            if language != "python":
                raise ValueError(f"the local provider runs 'python' only, got {language!r}.")
        return [float(result.passed) for result in run_many(scripts, num_workers=self.num_workers, **self.limits)]


PROVIDERS: dict[str, Callable[..., CodeExecutionProvider]] = {"local": LocalProvider}


def register_provider(name: str, factory: Callable[..., CodeExecutionProvider]) -> None:
    """Make `get_provider(name)` call `factory`; a name that is taken is replaced."""
    PROVIDERS[name] = factory


def get_provider(name: str | CodeExecutionProvider = "local", **kwargs) -> CodeExecutionProvider:
    """The provider of that name, made with `kwargs`; a provider is returned as it is. `ValueError` for other names."""
    if not isinstance(name, str):
        if not isinstance(name, CodeExecutionProvider):
            raise ValueError(f"a provider needs a method execute_scripts(scripts, languages), {name!r} has none.")
        return name
    if name not in PROVIDERS:
        nearest = difflib.get_close_matches(name, PROVIDERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown provider {name!r}: did you mean {nearest!r}? Known: {', '.join(sorted(PROVIDERS))}."
        )
    return PROVIDERS[name](**kwargs)


def check_allowed(allow_code_execution: bool | None) -> None:
    """Raise `PermissionError` unless running generated programs was asked for, by argument or by environment."""
    if allow_code_execution is None:
        allow_code_execution = os.environ.get(ALLOW_VARIABLE) == "1"
    if not allow_code_execution:
        raise PermissionError(
            f"This reward or score runs programs that a model wrote. Pass allow_code_execution=True or set "
            f"{ALLOW_VARIABLE}=1 to allow it. They run in a sandbox without network, environment, files or time to "
            "spare, which does not protect from bugs in the kernel: keep secrets off the machine all the same."
        )


def pass_fractions(
    suites: Sequence[Sequence[str]], allow_code_execution: bool | None, provider: str | CodeExecutionProvider
) -> list[float]:
    """
    The fraction of each suite's programs that pass, all suites in one call of the provider; 0.0 for an empty suite.

    Raises `PermissionError` if not allowed; a provider's own errors pass through.
    """
    check_allowed(allow_code_execution)
    scripts = [f"{program}\n1.0\n" for suite in suites for program in suite]
    values = get_provider(provider).execute_scripts(scripts, ["python"] * len(scripts)) if scripts else []
    if len(values) != len(scripts):
        raise ValueError(f"the provider returned {len(values)} values for {len(scripts)} scripts.")
    fractions, start = [], 0
    for suite in suites:
        part = values[start : start + len(suite)]
        start += len(suite)
        fractions.append(sum(value == 1.0 for value in part) / len(part) if part else 0.0)
    return fractions
