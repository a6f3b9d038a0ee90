"""The kind "bubblewrap": namespaces made by `bwrap`, which some machines allow to it and to nothing else."""

import os
import signal
import sys

from .files import DEVICES, python_paths
from .monitor import Surroundings, monitor
from .request import MAX_BYTES, Limits, Report, Request, read_report, write_report
from .sources import SOURCES
from .syscalls import PR_SET_PDEATHSIG, anonymous_file, prctl
from .usage import MAX_INODES, TOO_MUCH, ProcessTree, inodes_used
from .wire import decode, encode


FLAGS = "--unshare-all --unshare-user --die-with-parent --new-session --as-pid-1 --clearenv --uid 1000 --gid 1000"
START = 'import sys; sys.path.insert(0, "/sandbox"); from inside.bubblewrap import main_inside; main_inside()'


def run_in_bubblewrap(request: Request) -> Report:
    """The monitor as PID 1 of a bubblewrap sandbox; return its report."""
    # The user in there may not be able to read this package, so that its files go in as data.
    sources = [(name, anonymous_file(source.encode())) for name, source in SOURCES.items()]
    command = [request.bwrap, *arguments(request.limits, sources), request.python, "-I", "-S", "-c", START]
    inputs = anonymous_file(encode(request, limit=MAX_BYTES))
    answer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(inputs, 0)
            os.dup2(answer[1], 1)
            for fd in (*request.channel, *(fd for _, fd in sources)):
                os.set_inheritable(fd, True)
            if os.geteuid() == 0:  # root's processes are not counted, not in a user namespace either
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by the change of user
            os.execve(request.bwrap, command, {})
        finally:
            os._exit(122)
    for fd in (inputs, answer[1], *(fd for _, fd in sources)):
        os.close(fd)
    report = read_report(answer[0])
    os.waitpid(child, 0)
    return report


def arguments(limits: Limits, sources: list[tuple[str, int]]) -> list[str]:
    """bwrap's arguments: Python's folders read-only, a small file system to write to, and this package's files."""
    words = [*FLAGS.split(), "--cap-drop", "ALL", "--proc", "/proc"]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    for path in python_paths():
        if os.path.islink(path) and path.count("/") == 1:
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind", path, path]
    words += ["--size", str(limits.disk_bytes), "--tmpfs", "/work"]
    for name, fd in sources:
        words += ["--ro-bind-data", str(fd), f"/sandbox/inside/{name}.py"]
    return [*words, "--remount-ro", "/", "--chdir", "/"]  # the root is a file system in memory, of no size


def main_inside() -> None:
    """In the sandbox that bubblewrap has made around this process: request from stdin, report to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = Request.of(decode(sys.stdin.buffer.read()))
    answer = os.dup(1)
    for fd in (0, 1):
        os.dup2(2, fd)
    write_report(answer, monitor(request, Surroundings(ProcessTree(), too_many_files)))


def too_many_files(pids: list[str]) -> int:
    """bwrap limits the files' size but not their number."""
    return TOO_MUCH if inodes_used("/work") > MAX_INODES else 0
