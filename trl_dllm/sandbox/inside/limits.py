"""What one process may use, set by itself before it becomes the program."""

import resource

from .request import Limits


OPEN_FILES = 64


def limit(what: int, value: int) -> None:
    """Set both limits to `value`, or to what is allowed at most where that is less."""
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(what, (value, value))


def limit_this_process(limits: Limits) -> None:
    """Everything but the number of processes, which counts for the user that the process has at the time."""
    seconds = int(limits.timeout) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    # One byte, not none: the kernel takes that as "not even to the program that collects crashes of this machine".
    limit(resource.RLIMIT_CORE, 1)
    for what in ("MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"):
        limit(getattr(resource, f"RLIMIT_{what}"), 0)
    limit(resource.RLIMIT_SIGPENDING, 256)
    limit(resource.RLIMIT_AS, limits.memory_bytes)
