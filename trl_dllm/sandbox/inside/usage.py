"""What the processes of a sandbox use together, which no limit of a single process can tell."""

import contextlib
import os
import resource


def resident_bytes(uid: int | None) -> int:
    """Resident memory of a user's processes, shared pages left out; of all but this one for None; 0 without /proc."""
    total, page, me = 0, resource.getpagesize(), str(os.getpid())
    try:
        names = os.listdir("/proc")
    except OSError:
        return 0
    for name in names:
        if name.isdigit() and name != me:
            try:
                if uid is not None and os.stat("/proc/" + name).st_uid != uid:
                    continue
                with open(f"/proc/{name}/statm") as file:
                    fields = file.read().split()
                total += (int(fields[1]) - int(fields[2])) * page
            except (OSError, IndexError):
                pass
    return total


def written_bytes(folder: str) -> int:
    """What the files in a folder take on disk; more than 8192 of them count as too much."""
    total = entries = 0
    for path, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        if entries > 8192:
            return 1 << 62
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total
