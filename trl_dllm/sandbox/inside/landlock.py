"""Landlock: which files a process may read and write, set by itself, without a file system of its own."""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from .syscalls import PR_SET_NO_NEW_PRIVS, libc, prctl


CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on x86_64 and aarch64
VERSION, PATH_BENEATH = 1, 1
EXECUTE, READ_FILE, READ_DIR = 1, 4, 8
WRITE_FILE, TRUNCATE, IOCTL_DEVICE = 2, 1 << 14, 1 << 15
RIGHTS_OF_FILES = EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEVICE
RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
ALL_RIGHTS = (1 << 16) - 1  # from version 5 on


def landlock_version() -> int:
    """The kernel's version of it, 0 without it."""
    version = libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))
    return max(int(version), 0)


def restrict_files(read: Iterable[str], write: Iterable[str]) -> bool:
    """
    From now on this process and all that it starts may read and execute what is at and below the paths `read`, do
    everything at and below `write`, and nothing elsewhere. False, and nothing done, where the kernel cannot do that.
    """
    version = landlock_version()
    if version == 0:
        return False
    handled = RIGHTS_BY_VERSION.get(version, ALL_RIGHTS)
    attributes = struct.pack("Q", handled)
    ruleset = _call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    for paths, rights in (read, EXECUTE | READ_FILE | READ_DIR), (write, handled):
        for path in paths:
            _allow(ruleset, path, rights & handled)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
    return True


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= RIGHTS_OF_FILES
    rule = struct.pack("=Qi", rights, fd)
    _call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint32(0))
    os.close(fd)


def _call(number: int, *arguments) -> int:
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock: {os.strerror(error)}")
    return int(result)
