"""
The kind "uid": for root where no namespaces can be made.

Where the kernel has Landlock, the program reads Python's folders and its working directory, writes to the latter, and
nothing else. Where not, it may do what any user of the machine may: what it leaves in the usual places is counted and
removed.
"""

import os
import signal

from .folders import remove_folder
from .landlock import landlock_version
from .monitor import Surroundings, children_left, monitor
from .request import Report, Request, Unavailable
from .syscalls import PR_SET_CHILD_SUBREAPER, prctl
from .usage import ProcessTree, written_bytes


PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # where any user may write


def run_as_other_user(request: Request) -> Report:
    """The program under a user id that no other process has; return its report."""
    if os.geteuid() != 0:
        raise Unavailable("another user id needs root")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    uid = 1_000_000_000 + int.from_bytes(os.urandom(4), "big") % 1_000_000_000
    tree = ProcessTree()

    def disk(pids: list[str]) -> int:
        below = sum(written_bytes(path) for path in [request.work, *elsewhere(uid)])
        return below + tree.open_files(pids).deleted + tree.deleted_mappings(pids) * request.limits.file_bytes

    os.mkdir(request.work, 0o700)
    try:
        os.chown(request.work, uid, uid)
        around = Surroundings(tree, disk, uid, uid, lambda: kill_all(uid), lambda: os.getppid() != request.parent)
        return monitor(request, around)
    finally:
        for path in [request.work, *elsewhere(uid)]:
            remove_folder(path)


def elsewhere(uid: int) -> list[str]:
    """Files and folders of the user in the usual places; with Landlock there can be none."""
    if landlock_version():
        return []
    found = []
    for place in PLACES:
        for entry in os.scandir(place) if os.path.isdir(place) else ():
            try:
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    found.append(entry.path)
            except OSError:
                pass
    return found


def kill_all(uid: int) -> None:
    """End every process of the user."""
    # From a process of that very user, kill(-1) reaches all of its others at once, however fast they fork.
    for _ in range(20):
        killer = os.fork()
        if killer == 0:
            try:
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(killer, 0)
        if not children_left():
            return
