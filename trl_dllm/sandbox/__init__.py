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

from .providers import (
    ALLOW_VARIABLE,
    CodeExecutionProvider,
    LocalProvider,
    check_allowed,
    get_provider,
    pass_fractions,
    register_provider,
)
from .run import SANDBOXES, ExecutionResult, SandboxUnavailable, choose_sandbox, run_many, run_program


__all__ = [
    "ALLOW_VARIABLE",
    "SANDBOXES",
    "CodeExecutionProvider",
    "ExecutionResult",
    "LocalProvider",
    "SandboxUnavailable",
    "check_allowed",
    "choose_sandbox",
    "get_provider",
    "pass_fractions",
    "register_provider",
    "run_many",
    "run_program",
]
