"""The kind "namespaces": user, mount, network, IPC, PID … namespaces made here, without a helper program."""

import ctypes
import functools
import operator
import os
import signal
import sys

from .files import build_root
from .filter import ARCHITECTURES
from .monitor import Surroundings, monitor
from .request import UNAVAILABLE, Report, Request, Unavailable, read_report, write_report
from .syscalls import CLONE_FLAGS, PR_SET_PDEATHSIG, call, prctl
from .usage import ProcessTree


def run_in_namespaces(request: Request) -> Report:
    """Fork a process into new namespaces; return its report."""
    if os.uname().machine not in ARCHITECTURES:
        raise Unavailable(f"not on {os.uname().machine}")
    root = os.geteuid() == 0
    ready, mapped, answer = os.pipe(), os.pipe(), os.pipe()
    setup = os.fork()
    if setup == 0:
        os.close(answer[0])
        os.close(mapped[1])
        try:
            report = _set_up(request, root, ready[1], mapped[0])
        except BaseException as error:
            report = Report(UNAVAILABLE, "", f"{type(error).__name__}: {error}", 0.0)
        write_report(answer[1], report)
        os._exit(0)
    for fd in (ready[1], mapped[0], answer[1]):
        os.close(fd)
    try:
        if os.read(ready[0], 1) == b"+":
            write_maps(setup, root)
            os.write(mapped[1], b"+")
    except OSError as error:
        sys.stderr.write(f"{error}\n")
    os.close(mapped[1])
    report = read_report(answer[0])
    os.waitpid(setup, 0)
    return report


def _set_up(request: Request, root: bool, ready: int, mapped: int) -> Report:
    """In the forked process: new namespaces, and in PID 1 of the new ones the monitor. Only PID 1 returns."""
    call("unshare", ctypes.c_int(functools.reduce(operator.or_, CLONE_FLAGS.values())))
    os.write(ready, b"+")
    if os.read(mapped, 1) != b"+":
        raise Unavailable("the user ids could not be mapped")
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for fd in (0, 1):
        os.dup2(2, fd)
    uid, gid = (1000, 1000) if root else (None, None)
    tree = ProcessTree()  # by the old /proc: a new one cannot be mounted everywhere
    build_root(request.limits, uid, gid)
    return monitor(request, Surroundings(tree, lambda pids: 0, uid, gid))


def write_maps(pid: int, root: bool) -> None:
    """As root, 0 inside is 0 outside (the monitor) and 1000 an unprivileged user; else 1000 is the caller."""
    # Root's processes are not counted, so as root a second user is a must: no fallback to a map of one line.
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        if not root and name == "gid_map":
            with open(f"/proc/{pid}/setgroups", "w") as file:
                file.write("deny")
        other = 65534 if root else own
        text = f"0 0 1\n1000 {other} 1\n" if root else f"1000 {own} 1\n"
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)
