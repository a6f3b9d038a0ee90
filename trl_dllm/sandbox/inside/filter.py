"""The system-call filter: classic BPF, checked in the order written here."""

import ctypes
import os
import struct

from .syscalls import CLONE_FLAGS, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, prctl


# name: (number on x86_64, on aarch64)
DENIED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    # Memory that no limit counts:
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
NO_SUCH_CALL = {"clone3": (435, 435)}  # its flags lie in memory, where no filter can read them; libc falls back
KILL, CLONE = (62, 129), (56, 220)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38


def filter_program() -> bytes | None:
    """The filter as bytes, None on machines whose system-call numbers are not known here."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return None
    column, architecture = ARCHITECTURES[machine]
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, 0)]
    if column == 0:  # the x32 numbers are other names for the same calls
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERROR | EPERM)]
    for numbers in DENIED.values():
        code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ERROR | EPERM)]
    for numbers in NO_SUCH_CALL.values():
        code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ERROR | ENOSYS)]
    # PID 1 ignores signals from inside, silently; a program that tries is to be told.
    code += [(EQUAL, 0, 4, KILL[column]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 1), (RETURN, 0, 0, ERROR | EPERM)]
    code += [(RETURN, 0, 0, ALLOW)]
    # A nested user namespace would give the program every capability in there.
    code += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_FLAGS["user"])]
    code += [(RETURN, 0, 0, ERROR | EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def install_filter() -> bool:
    """Load the filter for this process and all that it starts; False where there is none for this machine."""
    program = filter_program()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if program is None:
        return False
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    try:
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))
    except OSError:
        return False
    return True
