"""The kind "bubblewrap": namespaces made by `bwrap`, which some machines allow to it and to nothing else."""

import json
import os
import signal
from pathlib import Path

from .files import python_paths
from .request import Limits, Report, Request, Unavailable
from .syscalls import PR_SET_PDEATHSIG, anonymous_file, prctl


FLAGS = "--unshare-all --unshare-user --die-with-parent --new-session --as-pid-1 --clearenv --uid 1000 --gid 1000"
START = 'import sys; sys.path.insert(0, "/sandbox"); from inside.launcher import main_inside; main_inside()'


def run_in_bubblewrap(request: Request) -> Report:
    """The monitor as PID 1 of a bubblewrap sandbox; return its report."""
    # The user in there may not be able to read this package, so that its files go in as data.
    sources = [(path.name, anonymous_file(path.read_bytes())) for path in Path(__file__).parent.glob("*.py")]
    command = [request.bwrap, *arguments(request.limits, sources), request.python, "-I", "-S", "-c", START]
    inputs = anonymous_file(json.dumps(request._replace(work="/work")).encode())
    answer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(inputs, 0)
            os.dup2(answer[1], 1)
            for _, fd in sources:
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
    with open(answer[0]) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise Unavailable("bubblewrap ended without a report")
    return Report(**json.loads(text))


def arguments(limits: Limits, sources: list[tuple[str, int]]) -> list[str]:
    """bwrap's arguments: Python's folders read-only, two small file systems to write to, and this package's files."""
    words = [*FLAGS.split(), "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
    for path in python_paths():
        if os.path.islink(path) and path.count("/") == 1:
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind", path, path]
    for folder in ("/dev/shm", "/work"):
        words += ["--size", str(limits.disk_bytes), "--tmpfs", folder]
    for name, fd in sources:
        words += ["--ro-bind-data", str(fd), f"/sandbox/inside/{name}"]
    return [*words, "--remount-ro", "/", "--chdir", "/"]
