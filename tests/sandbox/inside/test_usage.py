import os
import subprocess
import sys
import time

import pytest

from trl_dllm.sandbox.inside import usage
from trl_dllm.sandbox.inside.usage import (
    MAX_ENTRIES,
    MAX_LEVELS,
    PIPE_BYTES,
    SOCKET_BYTES,
    TOO_MUCH,
    ProcessTree,
    inodes_used,
    written_bytes,
)


MiB = 1 << 20
PROGRAM = """
import mmap, os, socket, sys, threading
os.chdir(sys.argv[1])
memory = bytearray(50 << 20)
for i in range(0, len(memory), 4096): memory[i] = 1
for n in range(2):
    file = open('f', 'wb'); file.write(bytes(1 << 20)); file.flush(); os.unlink('f')
    globals()[f'kept{n}'] = file
mapped = os.open('m', os.O_CREAT | os.O_RDWR); os.write(mapped, bytes(4096))
m = mmap.mmap(mapped, 4096, flags=mmap.MAP_PRIVATE); os.close(mapped)
os.unlink('m')
pair, pipe = socket.socketpair(), os.pipe()
child = os.fork()
os.write(1, b'ready\\n')
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """This process's tree while a program with two processes runs."""
    folder = tmp_path_factory.mktemp("usage")
    before = set(ProcessTree().pids())
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "ready\n"
        assert program.stdout.readline() == "ready\n"
        tree = ProcessTree()
        yield tree, [pid for pid in tree.pids() if pid not in before]
        program.stdin.close()


def test_descendants(tree):
    processes, pids = tree
    assert processes.works() and len(pids) == 2 and str(os.getpid()) not in pids


def test_children_of_threads_are_found(tmp_path):
    code = "import subprocess, threading\nthreading.Thread(target=subprocess.run, args=(['sleep', '60'],)).start()"
    before = set(ProcessTree().pids())
    program = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while len(found := set(ProcessTree().pids()) - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    subprocess.run(["kill", "-9", *found])
    program.wait()
    assert len(found) == 2


def test_memory(tree):
    processes, pids = tree
    assert 100 * MiB < processes.memory(pids) < 200 * MiB  # what two processes still share counts for both
    assert processes.memory([]) == 0 == processes.memory(["999999999"])


def test_empty_pages_count_as_what_the_kernel_may_need_for_them(tree, monkeypatch):
    processes, _ = tree
    monkeypatch.setattr(processes, "_read", lambda path: "1000 100 40 1 0 99 0")  # all pages, touched, in files
    assert processes.memory(["1", "2"]) == 2 * (60 * os.sysconf("SC_PAGE_SIZE") + 900 * 256)


def test_open_files(tree):
    processes, pids = tree
    found = processes.open_files(pids)
    assert 2 * MiB <= found.deleted < 3 * MiB  # of two processes, but once
    # A socket pair and a pipe, and the pipes of the test.
    assert 2 * SOCKET_BYTES + PIPE_BYTES <= found.buffers <= 2 * SOCKET_BYTES + 5 * PIPE_BYTES


def test_deleted_mappings(tree, monkeypatch):
    processes, pids = tree
    assert processes.deleted_mappings(pids) >= 1
    with subprocess.Popen(["sleep", "60"]) as other:  # pytest's own process may well map some
        assert processes.deleted_mappings([str(other.pid)]) == 0
        other.kill()
    monkeypatch.setattr(usage, "MAX_MAPS", 100)
    assert processes.deleted_mappings(pids) == TOO_MUCH


def test_processes_that_hide_are_taken_to_hold_all_they_can(tree, monkeypatch):
    processes, pids = tree

    def hidden(path):
        raise PermissionError

    monkeypatch.setattr(processes, "_list", hidden)
    assert processes.open_files(pids).buffers == 2 * 64 * SOCKET_BYTES


def test_processes_that_have_ended(tree):
    processes, _ = tree
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert processes.open_files([str(ended.pid)]) == (0, 0) and processes.deleted_mappings([str(ended.pid)]) == 0


def test_a_proc_that_tells_nothing(tmp_path, monkeypatch):
    processes = ProcessTree()
    monkeypatch.setattr(processes, "proc", os.open(tmp_path, os.O_RDONLY))
    assert not processes.works()


# Files


def test_written_bytes(tmp_path):
    empty = written_bytes(str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path in (tmp_path / "f", tmp_path / "a" / "f", tmp_path / "a" / "b" / "f"):
        path.write_bytes(b"x" * MiB)
    os.truncate(tmp_path / "f", 100 * MiB)  # a hole takes nothing
    (tmp_path / "link").symlink_to("/usr")
    assert 3 * MiB <= written_bytes(str(tmp_path)) - empty < 3.2 * MiB
    assert MiB <= written_bytes(str(tmp_path / "a" / "f")) < 1.1 * MiB
    assert written_bytes(str(tmp_path / "missing")) == 0


def test_too_many_and_too_deep(tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(MAX_ENTRIES + 1):
        (tmp_path / "many" / str(i)).touch()
    assert written_bytes(str(tmp_path / "many")) >= TOO_MUCH
    (tmp_path / "many" / "0").unlink()
    assert written_bytes(str(tmp_path / "many")) < MiB
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(MAX_LEVELS):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    assert written_bytes(str(tmp_path / ("d" * 200))) < 2 * MiB
    os.write(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd), bytes(4 * MiB))
    assert written_bytes(str(tmp_path / ("d" * 200))) > 4 * MiB  # a path to it would be too long
    os.mkdir("d", dir_fd=fd)
    below = os.open("d", os.O_RDONLY, dir_fd=fd)
    os.mkdir("d", dir_fd=below)
    assert written_bytes(str(tmp_path / ("d" * 200))) >= TOO_MUCH


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    written_bytes(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_inodes(tmp_path):
    before = inodes_used("/dev/shm") if os.path.isdir("/dev/shm") else pytest.skip("no file system in memory")
    path = f"/dev/shm/test-{os.getpid()}"
    open(path, "w").close()
    assert inodes_used("/dev/shm") >= before
    os.unlink(path)
