import ctypes
import errno
import os
import struct

import pytest
from helpers_inside import in_child

from trl_dllm.sandbox.inside import filter as filters
from trl_dllm.sandbox.inside.filter import ARCHITECTURES, DENIED, RULES, filter_program, install_filter


ALLOWED, REFUSED, MISSING, KILLED = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
X86 = {"mmap": 9, "prctl": 157, "fcntl": 72, "close_range": 436, "clone": 56, "clone3": 435, "kill": 62, "fork": 57}
X86 |= {
    "madvise": 28,
    "prlimit64": 302,
    "setpriority": 141,
    "sched_setaffinity": 203,
    "openat": 257,
    "socketpair": 53,
    "execve": 59,
}


def run_filter(program, number, *arguments, architecture=ARCHITECTURES["x86_64"][1]):
    """What classic BPF, interpreted here, answers to a system call."""
    data = struct.pack("IIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code = [struct.unpack_from("HBBI", program, start) for start in range(0, len(program), 8)]
    register, place = 0, 0
    while True:
        operation, yes, no, value = code[place]
        place += 1
        if operation == filters.LOAD:
            (register,) = struct.unpack_from("I", data, value)
        elif operation == filters.RETURN:
            return value
        else:
            tests = {filters.EQUAL: register == value, filters.AT_LEAST: register >= value}
            tests[filters.ANY_BIT] = bool(register & value)
            place += yes if tests[operation] else no


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: type("Name", (), {"machine": "x86_64"}))
    return filter_program()


def test_what_is_denied_by_name(program):
    for numbers in DENIED.values():
        assert run_filter(program, numbers[0], 1, 2, 3) == REFUSED
    assert run_filter(program, X86["clone3"]) == MISSING
    for name in ("openat", "socketpair", "execve", "fork"):
        assert run_filter(program, X86[name], 1, 2, 3, 4) == ALLOWED


@pytest.mark.parametrize(
    "name, arguments, answer",
    [
        ("mmap", (0, 4096, 3, 0x22), ALLOWED),
        ("mmap", (0, 4096, 5, 0x802), ALLOWED),  # private, from a file
        ("mmap", (0, 4096, 3, 0x21), REFUSED),
        ("mmap", (0, 4096, 3, 0x23), REFUSED),
        ("mmap", (0, 4096, 1, 0x01), REFUSED),
        ("mmap", (0, 4096, 3, 0x40022), REFUSED),
        ("mmap", (0, 4096, 3, (1 << 40) | 0x21), REFUSED),
        ("prctl", (4, 0), REFUSED),
        ("prctl", (41, 0), REFUSED),
        ("prctl", (15, 0), ALLOWED),
        ("fcntl", (3, 1031, 1 << 20), REFUSED),
        ("fcntl", (3, 1030, 0), ALLOWED),
        ("fcntl", (3, 6), REFUSED),
        ("fcntl", (3, 37), REFUSED),
        ("fcntl", (3, 5), ALLOWED),  # asking for a lock
        ("madvise", (0, 4096, 21), REFUSED),
        ("madvise", (0, 4096, 4), ALLOWED),
        ("close_range", (3, 9, 0), ALLOWED),
        ("close_range", (3, 9, 4), ALLOWED),
        ("close_range", (3, 9, 2), REFUSED),
        ("close_range", (3, 9, 6), REFUSED),
        ("clone", (0x3D0F00,), ALLOWED),  # a thread of glibc
        ("clone", (0x1200011,), ALLOWED),  # its fork
        ("clone", (0x10000,), REFUSED),  # a thread with files of its own
        ("clone", (0x10000000,), REFUSED),  # a user namespace
        ("clone", (0x13D0F00,), ALLOWED),
        ("kill", (1, 9), REFUSED),
        ("kill", (2, 9), ALLOWED),
        ("kill", (-1 & 0xFFFFFFFFFFFFFFFF, 9), ALLOWED),
        ("prlimit64", (0, 7), ALLOWED),
        ("prlimit64", (1, 7), REFUSED),
        ("setpriority", (0, 0, 5), ALLOWED),
        ("setpriority", (0, 1, 5), REFUSED),
        ("setpriority", (2, 0, 5), REFUSED),
        ("sched_setaffinity", (0,), ALLOWED),
        ("sched_setaffinity", (1,), REFUSED),
    ],
)
def test_what_is_denied_by_argument(program, name, arguments, answer):
    assert run_filter(program, X86[name], *arguments) == answer


def test_without_new_processes(monkeypatch, program):
    assert run_filter(program, 57) == run_filter(program, 58) == run_filter(program, 56, 0x11) == ALLOWED
    alone = filter_program(new_processes=False)
    assert run_filter(alone, 57) == run_filter(alone, 58) == run_filter(alone, 56, 0x11) == REFUSED
    assert run_filter(alone, 56, 0x3D0F00) == ALLOWED and run_filter(alone, X86["openat"]) == ALLOWED


def test_other_names_of_the_same_calls(program):
    assert run_filter(program, X86["openat"], architecture=0x40000003) == KILLED  # 32 bits
    assert run_filter(program, 0x40000000 | X86["openat"]) == REFUSED


def test_the_other_architecture(monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: type("Name", (), {"machine": "aarch64"}))
    program, name = filter_program(), ARCHITECTURES["aarch64"][1]
    for number in {numbers[1] for numbers in DENIED.values()} - {None}:
        assert run_filter(program, number, architecture=name) == REFUSED
    for rule in RULES:
        arguments = [0] * rule.argument + [rule.value]
        assert run_filter(program, rule.numbers[1], *arguments, architecture=name) == REFUSED
    assert run_filter(program, 222, 0, 4096, 3, 0x22, architecture=name) == ALLOWED


def test_a_machine_that_is_not_known(monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: type("Name", (), {"machine": "sparc"}))
    assert filter_program() is None
    assert in_child(install_filter) == (0, "False")


def test_it_is_installed():
    def child():
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        before = library.mmap(None, ctypes.c_size_t(4096), 3, 0x21, -1, ctypes.c_long(0)) != ctypes.c_void_p(-1).value
        assert install_filter()
        shared = library.mmap(None, ctypes.c_size_t(4096), 3, 0x21, -1, ctypes.c_long(0)) == ctypes.c_void_p(-1).value
        assert ctypes.get_errno() == errno.EPERM
        private = library.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0)) != ctypes.c_void_p(-1).value
        return before, shared, private

    assert in_child(child) == (0, "(True, True, True)")
