"""A folder that a program worked in: removed, whatever the program made of it."""

import os


DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def remove_folder(path: str) -> None:
    """
    Remove a file, or a folder and all below it. No process may be at work in there any more; never raises.

    However deep it goes: step by step down and up again, so that no path is ever too long, nothing calls itself and
    two descriptors are enough.
    """
    try:
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            return
        os.chmod(path, 0o700)
        _empty(os.open(path, DIRECTORY))
        os.rmdir(path)
    except OSError:
        pass


def _empty(fd: int) -> None:
    """Remove all in an open folder, and close it."""
    names: list[str] = []  # of the folders on the way down
    left = [_remove_entries(fd)]  # for each of them and the last one, what is still to be removed in it
    while True:
        if left[-1]:
            name = left[-1].pop()
            os.chmod(name, 0o700, dir_fd=fd)
            below = os.open(name, DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
            names.append(name)
            left.append(_remove_entries(fd))
        elif names:
            above = os.open("..", DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = above
            left.pop()
            os.rmdir(names.pop(), dir_fd=fd)
        else:
            os.close(fd)
            return


def _remove_entries(fd: int) -> list[str]:
    """Remove the files and the empty folders in an open folder; return the names of the other folders."""
    with os.scandir(fd) as scan:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan]
    left = []
    for name, is_folder in entries:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
            continue
        try:
            os.rmdir(name, dir_fd=fd)
        except OSError:
            left.append(name)
    return left
