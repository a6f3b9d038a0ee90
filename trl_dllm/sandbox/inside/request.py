"""What is asked of a sandbox, and what it reports."""

from typing import NamedTuple


class Limits(NamedTuple):
    """See `sandbox.run.run_program`."""

    timeout: float
    memory_bytes: int
    file_bytes: int
    disk_bytes: int
    processes: int
    output_bytes: int


class Request(NamedTuple):
    """
    One program to run.

    Attributes:
        kind: the kind of sandbox.
        code, stdin: the program's source and its standard input.
        limits: what it may use.
        processes_before: threads of the caller's user that already count against the limit of processes.
        python, bwrap: paths of the interpreter and of bubblewrap ("" where there is none).
        parent: the caller's process id.
        work: the working directory; "" for one in a file system of the sandbox's own.
    """

    kind: str
    code: str
    stdin: str
    limits: Limits
    processes_before: int
    python: str
    bwrap: str
    parent: int
    work: str = ""


class Report(NamedTuple):
    """What became of the program: `reason` is "passed" or one of `sandbox.run.ExecutionResult`'s others."""

    reason: str
    stdout: str
    stderr: str
    seconds: float


class Unavailable(Exception):
    """This kind of sandbox cannot be made here."""
