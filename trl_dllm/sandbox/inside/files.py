"""The file system of a program in namespaces."""

import contextlib
import os
import sys

from .request import Limits
from .syscalls import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
    pivot_root,
)
from .usage import MAX_INODES


DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def python_paths() -> list[str]:
    """Folders and files that an interpreter without site-packages needs, each below no other."""
    wanted = ["/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/nix/store", "/gnu/store"]
    wanted += [sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__), sys.executable]
    wanted += [os.path.realpath(path) for path in wanted]
    kept: list[str] = []
    for path in sorted({path for path in wanted if path and path != "/" and os.path.exists(path)}):
        if not any(path.startswith(other + "/") and not os.path.islink(other) for other in kept):
            kept.append(path)
    return kept


def make_read_only(path: str) -> None:
    """Remount what was bound at `path` read-only, keeping the flags that a user namespace may not drop."""
    flags = os.statvfs(path).f_flag
    keep = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048)  # the last two: noatime, nodiratime
    if flags & 4096:  # relatime, which mount(2) has at another place
        keep |= 1 << 21
    mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | keep)


def build_root(limits: Limits, uid: int | None, gid: int | None) -> None:
    """A file system of its own: a small tmpfs with Python's folders read-only, /proc, four devices, and /work."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = next(path for path in ("/sys", "/mnt", "/tmp") if os.path.isdir(path))  # private: nobody else sees it
    paths = python_paths()
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits.disk_bytes},nr_inodes={MAX_INODES},mode=755")
    for path in [*paths, *DEVICES]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path) and path.count("/") == 1:
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, target, None, MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            make_read_only(target)
    os.mkdir(root + "/proc")
    # Fails in a container that hides parts of its own /proc; a program can do without it.
    with contextlib.suppress(OSError):
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(root + "/work", 0o700)
    if uid is not None and gid is not None:
        os.chown(root + "/work", uid, gid)
    pivot_root(root)
