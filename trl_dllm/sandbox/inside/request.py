"""What is asked of a sandbox, and what it reports."""

from typing import NamedTuple

from .wire import decode, encode


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
    One process to run in a sandbox of its own.

    Attributes:
        kind: the kind of sandbox.
        runner: the module that runs in there, "script", "candidate" or "judge".
        arguments: what its `start` takes behind the nonce.
        stdin: standard input.
        limits: what it may use.
        processes_before: threads of the caller's user that already count against the limit of processes.
        python, bwrap: paths of the interpreter and of bubblewrap ("" where there is none).
        parent: the caller's process id.
        work: a folder to make, work in and remove; for the kinds that have their own file system "/work".
        channel: for a candidate and its judge, the descriptors to read from and to write to.
    """

    kind: str
    runner: str
    arguments: list[str]
    stdin: str
    limits: Limits
    processes_before: int
    python: str
    bwrap: str
    parent: int
    work: str = "/work"
    channel: tuple[int, ...] = ()

    @classmethod
    def of(cls, fields: tuple) -> "Request":
        """A request that was sent, and so became a plain tuple."""
        request = cls(*fields)
        return request._replace(limits=Limits(*request.limits))


UNAVAILABLE = "unavailable"
MAX_BYTES = 1 << 30  # of requests and reports


class Report(NamedTuple):
    """
    What became of the process: `reason` is "passed" or one of `sandbox.run.ExecutionResult`'s others, or UNAVAILABLE
    where the sandbox could not be made, which `stderr` explains.
    """

    reason: str
    stdout: str
    stderr: str
    seconds: float


def write_report(fd: int, report: Report) -> None:
    with open(fd, "wb") as file:
        file.write(encode(report, limit=MAX_BYTES))


def read_report(fd: int) -> Report:
    """What `write_report` writes at the other end of a pipe, whose writer may also end without."""
    with open(fd, "rb") as file:
        content = file.read()
    return Report(*decode(content)) if content else Report(UNAVAILABLE, "", "it ended without a report", 0.0)


class Unavailable(Exception):
    """This kind of sandbox cannot be made here."""
