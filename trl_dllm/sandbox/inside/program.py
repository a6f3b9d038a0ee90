"""From a forked process of the monitor to the program's own interpreter."""

import marshal
import os
import signal
from collections.abc import Sequence
from resource import RLIMIT_NPROC

from .files import DEVICES, python_paths
from .filter import install_filter
from .landlock import restrict_files
from .limits import limit, limit_this_process
from .request import Request
from .sources import SOURCES
from .syscalls import PR_CAPBSET_DROP, PR_SET_PDEATHSIG, PR_SET_THP_DISABLE, prctl


MODULES = {  # what each runner needs, itself last
    "script": ("main", "script"),
    "candidate": ("main", "wire", "candidate"),
    "judge": ("wire", "judge"),
}
NO_FILTER, NOT_STARTED = 121, 122  # statuses of the process


def payload(request: Request, nonce: bytes) -> bytes:
    """What `boot` reads: the modules, and the arguments of the last one's `start`."""
    modules = [(name, SOURCES[name]) for name in MODULES[request.runner]]
    return marshal.dumps((modules, [nonce, *request.arguments]))


def become_program(
    request: Request, descriptors: Sequence[int], uid: int | None, gid: int | None, new_processes: bool
) -> None:
    """
    Descriptors, limits, user and filter, and then a fresh interpreter in the place of this process. Does not return.

    Args:
        descriptors: stdin, stdout, stderr, where the verdict goes, where the payload comes from.
        uid, gid: the user and group to become, None to stay.
        new_processes: may it start any?
    """
    # All out of the way first: one of them may sit where another has to go.
    moved = [os.dup2(fd, 200 + index) for index, fd in enumerate((*descriptors, *request.channel))]
    for target, fd in enumerate(moved):
        os.dup2(fd, target, inheritable=True)
    os.closerange(len(moved), 65536)
    os.setsid()
    os.chdir(request.work)
    os.umask(0o077)
    prctl(PR_SET_THP_DISABLE, 1)  # with huge pages a touch of one byte takes two megabytes
    limit_this_process(request.limits)
    if uid is not None and gid is not None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
    limit(RLIMIT_NPROC, request.limits.processes + request.processes_before)
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break
    if uid is not None:
        os.setresuid(uid, uid, uid)
    if request.kind == "uid":
        restrict_files([*python_paths(), *DEVICES], [request.work, "/dev/null"])
    # Should the monitor itself be killed, this one ends with it. (In a PID namespace, so does all that it starts.)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not install_filter(new_processes):
        os._exit(NO_FILTER)
    # exec without uid 0 and with no_new_privs clears what is left of the capabilities.
    environment = {"PATH": "/usr/bin:/bin", "HOME": request.work, "TMPDIR": request.work, "LANG": "C.UTF-8"}
    os.execve(request.python, [request.python, "-I", "-S", "-c", SOURCES["boot"]], environment)
