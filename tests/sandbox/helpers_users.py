"""Another user than root."""

import os
import subprocess
import sys


NOBODY = 65534


def drop_to_nobody():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def reachable_interpreter():
    """An interpreter that another user can run; None without one, or where only the caller's own user is at hand."""
    if os.geteuid() != 0:
        return None
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            test = subprocess.run(
                [path, "-c", "import ctypes"], preexec_fn=drop_to_nobody, capture_output=True, cwd="/"
            )
        except OSError:
            continue
        if test.returncode == 0:
            return os.path.realpath(path)
    return None
