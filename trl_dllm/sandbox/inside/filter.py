"""
The system-call filter, in classic BPF: what a program may not ask the kernel for.

Besides what reaches out of the sandbox, these are the calls that take memory which no limit counts. A page that is
shared between processes, or that the program has unmapped but not freed, belongs to no process; so nothing may be
mapped as shared, and what a socket or a pipe can hold stays as small as it is. Nor does what the kernel itself has to
remember: events that nobody reads, rules, locks and attributes of files.
"""

import ctypes
import os
import struct
from typing import NamedTuple

from .syscalls import CLONE_FLAGS, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_THP_DISABLE, prctl


ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, name in the kernel

Numbers = dict[str, tuple[int | None, int | None]]

# name: (number on x86_64, on aarch64), None where it has none
DENIED: Numbers = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
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
    "io_setup": (206, 0),
    "syslog": (103, 116),
    "ioprio_set": (251, 30),
    # Memory that no limit counts, and files that only a message holds:
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "setsockopt": (54, 208),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),  # its rules keep files that are deleted, too
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "process_madvise": (440, 440),
}
NEW_PROCESS: Numbers = {"fork": (57, None), "vfork": (58, None)}
NO_SUCH_CALL: Numbers = {
    "clone3": (435, 435)
}  # its flags lie in memory, where no filter can read them; libc falls back

MAP_SHARED, MAP_HUGETLB, MADV_PAGEOUT, CLOSE_RANGE_UNSHARE = 0x1, 0x40000, 21, 2
F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETPIPE_SZ = 6, 7, 37, 38, 1031
CLONE, CLONE_FILES, CLONE_THREAD = (56, 220), 0x400, 0x10000

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


class Rule(NamedTuple):
    """
    Refuse a call whose `argument` (by its place) equals `value`, is AT_LEAST that, or shares ANY_BIT with it; but not
    one that has a bit of `but`.
    """

    numbers: tuple[int, int]
    argument: int
    test: int
    value: int
    but: int = 0


RULES = [
    Rule((9, 222), 3, ANY_BIT, MAP_SHARED | MAP_HUGETLB),  # mmap
    Rule((157, 167), 0, EQUAL, PR_SET_DUMPABLE),  # prctl: a process that cannot be looked into cannot be counted
    Rule((157, 167), 0, EQUAL, PR_SET_THP_DISABLE),
    Rule((28, 233), 2, EQUAL, MADV_PAGEOUT),  # madvise: what is swapped out is not counted
    *(
        Rule((72, 25), 1, EQUAL, what) for what in (F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETPIPE_SZ)
    ),  # fcntl
    Rule((436, 436), 2, ANY_BIT, CLOSE_RANGE_UNSHARE),  # close_range: a thread's files are its process's
    Rule(CLONE, 0, ANY_BIT, CLONE_THREAD, but=CLONE_FILES),
    Rule(CLONE, 0, ANY_BIT, CLONE_FLAGS["user"]),  # a nested user namespace would give the program capabilities
    Rule((62, 129), 0, EQUAL, 1),  # kill: PID 1 ignores signals from inside, silently; who tries is to be told
    # The monitor may be of the same user: nobody sets limits, priorities or processors of any process but its own.
    Rule((302, 261), 0, AT_LEAST, 1),  # prlimit64
    Rule((141, 140), 0, AT_LEAST, 2),  # setpriority, of all of a user's processes
    Rule((141, 140), 1, AT_LEAST, 1),
    Rule((142, 118), 0, AT_LEAST, 1),  # sched_setparam
    Rule((144, 119), 0, AT_LEAST, 1),  # sched_setscheduler
    Rule((203, 122), 0, AT_LEAST, 1),  # sched_setaffinity
    Rule((314, 274), 0, AT_LEAST, 1),  # sched_setattr
]
NO_NEW_PROCESS = Rule(CLONE, 0, AT_LEAST, 0, but=CLONE_THREAD)


def filter_program(new_processes: bool = True) -> bytes | None:
    """The filter as bytes, None on machines whose system-call numbers are not known here."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return None
    column, architecture = ARCHITECTURES[machine]
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, 0)]
    if column == 0:  # the x32 numbers are other names for the same calls
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERROR | EPERM)]
    denied = [(numbers, EPERM) for numbers in (DENIED if new_processes else DENIED | NEW_PROCESS).values()]
    denied += [(numbers, ENOSYS) for numbers in NO_SUCH_CALL.values()]
    for numbers, error in denied:
        number = numbers[column]
        if number is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | error)]
    for rule in RULES if new_processes else [*RULES, NO_NEW_PROCESS]:
        code += _instructions(rule, column)
    code += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _instructions(rule: Rule, column: int) -> list[Instruction]:
    """The call's number is loaded before and after."""
    refuse: list[Instruction] = [(RETURN, 0, 0, ERROR | EPERM), (LOAD, 0, 0, 0)]
    if rule.but:
        refuse = [(ANY_BIT, 1, 0, rule.but), *refuse]
    # Arguments are 64 bits, and every one tested here is used as 32 by the kernel: the lower half comes first.
    test: list[Instruction] = [(LOAD, 0, 0, 16 + 8 * rule.argument), (rule.test, 0, len(refuse) - 1, rule.value)]
    return [(EQUAL, 0, len(test) + len(refuse), rule.numbers[column]), *test, *refuse]


def install_filter(new_processes: bool = True) -> bool:
    """Load the filter for this process and all that it starts; False where there is none for this machine."""
    program = filter_program(new_processes)
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
