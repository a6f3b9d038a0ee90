"""What the processes of a sandbox use together, which no limit of a single process can tell."""

import contextlib
import os
import resource
import stat
from typing import NamedTuple

from .folders import DIRECTORY
from .limits import OPEN_FILES


PIPE_BYTES = 64 << 10  # what one holds at most, as long as F_SETPIPE_SZ is denied
SOCKET_BYTES = 512 << 10  # twice the usual size of what one may send unread, as long as setsockopt is denied
EMPTY_PAGE_BYTES = 256  # what the kernel needs at most for one that was never touched: if each is a mapping of its own
MAX_INODES = 8192  # files and folders on a file system in memory; more of them count as too much
MAX_ENTRIES = 1024  # likewise in a folder on a disk, where removing one may take milliseconds
MAX_LEVELS = 128  # of folders in each other, likewise
MAX_MAPS = 1 << 20  # bytes of text about a process's mappings: ten thousand of them
TOO_MUCH = 1 << 62


class OpenFiles(NamedTuple):
    """What is held by open descriptors: `buffers` in memory at most, `deleted` on disk, both in bytes."""

    buffers: int
    deleted: int


class ProcessTree:
    """
    All that descends from this process, as /proc shows it.

    Made where /proc can be read, it works for a process that is elsewhere by then (in another root, or in namespaces
    of its own). What leaves the tree's top comes to this process, if it is PID 1 or a subreaper: nothing gets out.
    """

    def __init__(self) -> None:
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)

    def works(self) -> bool:
        """Does the kernel say who descends from whom?"""
        try:
            self._read(f"self/task/{os.readlink('self', dir_fd=self.proc)}/children")
        except OSError:
            return False
        return True

    def pids(self) -> list[str]:
        """Those of the descendants, as this /proc numbers them."""
        found = [os.readlink("self", dir_fd=self.proc)]
        for pid in found:  # grows
            for thread in self._list(f"{pid}/task"):
                with contextlib.suppress(OSError):
                    found += self._read(f"{pid}/task/{thread}/children").split()
        return found[1:]

    def memory(self, pids: list[str]) -> int:
        """
        Memory of the processes that is in no file, in bytes, and what the kernel may need for their empty pages.

        What two of them still share from their `fork` counts for both. Nothing else is shared: see `filter`.
        """
        page, total = resource.getpagesize(), 0
        for pid in pids:
            with contextlib.suppress(OSError, ValueError):
                size, resident, in_files = map(int, self._read(f"{pid}/statm").split()[:3])
                total += (resident - in_files) * page + (size - resident) * EMPTY_PAGE_BYTES
        return total

    def open_files(self, pids: list[str]) -> OpenFiles:
        """What pipes and sockets may hold, and what deleted files do that are still open."""
        buffers: dict[tuple[str, int, int], int] = {}
        deleted: dict[tuple[int, int], int] = {}
        for pid in pids:
            try:
                for fd in self._list(f"{pid}/fd"):
                    with contextlib.suppress(FileNotFoundError):  # closed by now
                        found = os.stat(f"{pid}/fd/{fd}", dir_fd=self.proc)
                        if stat.S_ISSOCK(found.st_mode) or stat.S_ISFIFO(found.st_mode):
                            size = SOCKET_BYTES if stat.S_ISSOCK(found.st_mode) else PIPE_BYTES
                            buffers["", found.st_dev, found.st_ino] = size
                        elif found.st_nlink == 0:
                            deleted[found.st_dev, found.st_ino] = found.st_blocks * 512
            except PermissionError:  # it has made itself unreadable, which is no reason to trust it
                buffers[pid, 0, 0] = OPEN_FILES * SOCKET_BYTES
        return OpenFiles(sum(buffers.values()), sum(deleted.values()))

    def deleted_mappings(self, pids: list[str]) -> int:
        """How many deleted files are mapped into memory; what is open no more is not seen elsewhere."""
        found = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                text = self._read(f"{pid}/maps", MAX_MAPS)
                if len(text) == MAX_MAPS:
                    return TOO_MUCH
                for line in text.splitlines():
                    if line.endswith(" (deleted)"):
                        found.add(tuple(line.split()[3:5]))  # device and inode
        return len(found)

    def _list(self, path: str) -> list[str]:
        """Nothing where the process has ended."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        except (FileNotFoundError, ProcessLookupError):
            return []
        try:
            return os.listdir(fd)
        except (FileNotFoundError, ProcessLookupError):
            return []
        finally:
            os.close(fd)

    def _read(self, path: str, limit: int = 1 << 16) -> str:
        with open(os.open(path, os.O_RDONLY, dir_fd=self.proc), "rb") as file:
            return file.read(limit).decode("utf-8", "replace")


def written_bytes(path: str) -> int:
    """What a file, or all at and below a folder, takes on disk; too many or too deep count as too much."""
    try:
        found = os.lstat(path)
        total = found.st_blocks * 512
        if stat.S_ISDIR(found.st_mode):
            total += _written_below(os.open(path, DIRECTORY), [MAX_ENTRIES], MAX_LEVELS)
        return total
    except OSError:
        return 0


def _written_below(fd: int, left: list[int], levels: int) -> int:
    """Of an open folder, which is closed; `left` holds the number of entries that may still come."""
    try:
        # All names first: a program that is making folders all the time slows everything else down.
        names = []
        with os.scandir(fd) as scan:
            for entry in scan:
                left[0] -= 1
                if left[0] < 0 or levels == 0:
                    return TOO_MUCH
                names.append(entry)
        total = 0
        for entry in names:
            with contextlib.suppress(OSError):  # removed by now
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    # By descriptor: a path to the lowest folder may be too long for the kernel.
                    total += _written_below(os.open(entry.name, DIRECTORY, dir_fd=fd), left, levels - 1)
            if total >= TOO_MUCH:
                return TOO_MUCH
        return total
    finally:
        os.close(fd)


def inodes_used(folder: str) -> int:
    """Files and folders on the file system of `folder`."""
    found = os.statvfs(folder)
    return found.f_files - found.f_ffree
