"""From a forked process of the monitor to the program's own interpreter."""

import os
from collections.abc import Sequence
from pathlib import Path
from resource import RLIMIT_NPROC

from .filter import install_filter
from .limits import limit, limit_this_process
from .request import Request
from .syscalls import PR_CAPBSET_DROP, prctl


SCRIPT = Path(__file__).with_name("script.py").read_text()


def become_program(request: Request, descriptors: Sequence[int], uid: int | None, gid: int | None) -> None:
    """
    Descriptors, limits, user and filter, and then a fresh interpreter in the place of this process. Does not return.

    `descriptors` are stdin, stdout, stderr, where the verdict goes, and where the source comes from; `uid` and `gid`
    the user and group to become, None to stay.
    """
    # All out of the way first: one of them may sit where another has to go.
    moved = [os.dup2(fd, 200 + index) for index, fd in enumerate(descriptors)]
    for target, fd in enumerate(moved):
        os.dup2(fd, target, inheritable=True)
    os.closerange(len(moved), 65536)
    os.setsid()
    os.chdir(request.work)
    os.umask(0o077)
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
    filtered = install_filter()
    if request.kind == "uid" and not filtered:
        os._exit(121)
    # exec without uid 0 and with no_new_privs clears what is left of the capabilities.
    environment = {"PATH": "/usr/bin:/bin", "HOME": request.work, "TMPDIR": request.work, "LANG": "C.UTF-8"}
    os.execve(request.python, [request.python, "-I", "-S", "-c", SCRIPT], environment)
