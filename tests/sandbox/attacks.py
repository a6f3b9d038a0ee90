"""Programs that no sandbox may suffer from, and a driver that runs them: `python attacks.py KIND < request > results`.

Standard library only, so that a user who can read nothing else can run it. Attacks run inside the sandbox and never
bare.
"""

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent


ATTACKS = {
    "fork bomb": """
        import os
        while True:
            os.fork()
    """,
    "stubborn fork bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "threads": """
        import threading, time
        for _ in range(10_000):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """,
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(3600)",
    "stubborn signals": """
        import signal
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
    """,
    "8 GiB": "x = bytearray(8 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1",
    "memory of many": """
        import os, time
        for _ in range(6):
            if os.fork() == 0: break
        x = bytearray(200 << 20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(60)
    """,
    "10 GiB file": "f = open('big', 'wb')\nfor _ in range(10 << 10): f.write(bytes(1 << 20))",
    "sparse file": "import os\nos.truncate(os.open('big', os.O_CREAT | os.O_RDWR), 10 << 30)",
    "many files": "for i in range(1000):\n    with open(f'file{i}', 'wb') as f: f.write(bytes(8 << 20))",
    "memory file": """
        import os
        f = os.memfd_create('x')
        os.write(f, b'x')
    """,
    "kill parent": "import os\nos.kill(os.getppid(), 9)",
    "kill caller": "import os\nos.kill(@CALLER@, 9)",
    "read the caller's environment": """
        import os
        found = '@SECRET@' in str(os.environ)
        for pid in [p for p in os.listdir('/proc') if p.isdigit()]:
            try: found |= b'@SECRET@' in open(f'/proc/{pid}/environ', 'rb').read()
            except OSError: pass
        assert found
    """,
    "read the caller's files": "assert 'secret' in open('@FILE@').read()",
    "inherited descriptors": "import os\nassert any(os.path.exists(f'/proc/self/fd/{n}') for n in range(5, 300))",
    "open a socket": "import socket\nsocket.socket()",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), timeout=2).send(b'hello')",
    "resolve": "import socket\nsocket.getaddrinfo('example.com', 80)",
    "daemonised grandchild": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for n in range(3): os.close(n)
                time.sleep(300)
            os._exit(0)
        os.wait()
    """,
    "daemonised grandchild that ignores": """
        import os, signal, time
        signal.signal(15, signal.SIG_IGN); signal.signal(1, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(300)
            os._exit(0)
        os.wait()
    """,
    "close stdout": "import os\nos.close(1)",
    "close stdout object": "import sys\nsys.stdout.close()",
    "close everything": "import os\nos.closerange(0, 100)",
    "forged success": """
        import os, json
        for line in ('passed', 'PASSED', 'ok', '1.0', json.dumps({'passed': True})):
            print(line)
        os.write(1, b'x' * 32)
        assert False
    """,
    "forged verdict": """
        import os
        os.write(3, b'0' * 32)
        os._exit(0)
    """,
    "forged verdict, regular end": "import os\nos.write(3, b'0' * 32)",
    "exit 0": """
        import sys
        sys.exit(0)
        assert False
    """,
    "_exit 0": "import os\nos._exit(0)",
    "exit from a thread of tests": "raise SystemExit",
    "child claims success": """
        import os
        if os.fork():
            os.wait()
            raise ValueError
    """,
    "replaced functions": """
        import os, sys
        sys.exit = os._exit = exit = lambda *a: None
        os.write = lambda *a: 0
        assert False
    """,
    "endless output": "while True: print('x' * 10_000)",
    "recursion": """
        def f(): f()
        import sys
        sys.setrecursionlimit(10**9)
        f()
    """,
    "crash": "import ctypes\nctypes.string_at(0)",
    "nested namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/work', b'tmpfs', 0, 0) == 0",
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "write to Python": "import os\nopen(os.path.dirname(os.__file__) + '/evil.py', 'w').write('x')",
    "syntax": "def",
    "null byte": "\x00",
}

# ---------------------------------------------------------------------------------------------------------------------
# Memory. Each of these ends in an error or with the reason "memory", and takes no more than its limit meanwhile.

C_LIBRARY = """
import ctypes, mmap, os, socket, sys, time
c = ctypes.CDLL(None, use_errno=True)
c.mmap.restype = ctypes.c_void_p
c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
MiB = 1 << 20
def take(size, flags, fd=-1):
    p = c.mmap(None, size, 3, flags, fd, 0)
    assert p != ctypes.c_void_p(-1).value, 'refused'
    return p
def drop(p, size):
    c.munmap(ctypes.c_void_p(p), ctypes.c_size_t(size))
def touch(p, size):
    ctypes.memset(p, 1, size)
def end():
    try:
        while True: os.wait()
    except ChildProcessError:
        assert False
"""

MEMORY_ATTACKS = {
    "shared memory of many": """
        for _ in range(8):
            if os.fork() == 0:
                touch(take(200 * MiB, 0x21), 200 * MiB); time.sleep(60)
        end()
    """,
    "shared memory by Python": """
        for _ in range(8):
            if os.fork() == 0:
                m = mmap.mmap(-1, 200 * MiB)
                for i in range(0, len(m), 4096): m[i] = 1
                time.sleep(60)
        end()
    """,
    "shared memory, all but a page unmapped": """
        for _ in range(10):
            p = take(150 * MiB, 0x21); touch(p, 150 * MiB)
            drop(p + 4096, 150 * MiB - 4096)
        end()
    """,
    "shared memory, left to a child": """
        for _ in range(10):
            p = take(150 * MiB, 0x21)
            if os.fork() == 0: time.sleep(60)
            touch(p, 150 * MiB); drop(p, 150 * MiB)
        end()
    """,
    "shared memory, forgotten": """
        for _ in range(8):
            if os.fork() == 0:
                p = take(150 * MiB, 0x21); touch(p, 150 * MiB)
                c.madvise(ctypes.c_void_p(p), ctypes.c_size_t(150 * MiB), 4); time.sleep(60)
        end()
    """,
    "shared memory, validated": "touch(take(200 * MiB, 0x23), 200 * MiB)",
    "shared /dev/zero": "touch(take(200 * MiB, 0x01, os.open('/dev/zero', 2)), 200 * MiB)",
    "shared read-only": """
        p = c.mmap(None, 200 * MiB, 1, 0x21, -1, 0)
        assert p != ctypes.c_void_p(-1).value, 'refused'
        sum(ctypes.string_at(p + i, 1)[0] for i in range(0, 200 * MiB, 4096))
    """,
    "shared file": """
        f = open('f', 'w+b'); f.truncate(10 * MiB)
        m = mmap.mmap(f.fileno(), 10 * MiB)
        for i in range(0, len(m), 4096): m[i] = 1
    """,
    "huge pages of many": """
        for _ in range(16):
            if os.fork() == 0:
                p = take(200 * MiB, 0x22)
                c.madvise(ctypes.c_void_p(p), ctypes.c_size_t(200 * MiB), 14)
                touch(p, 200 * MiB); time.sleep(60)
        end()
    """,
    "huge pages allowed again": "assert c.prctl(41, 0, 0, 0, 0) == 0",
    "huge page file system": "take(2 * MiB, 0x40022)",
    "private memory of many": """
        for _ in range(28):
            if os.fork() == 0:
                touch(take(200 * MiB, 0x22), 200 * MiB); time.sleep(60)
        end()
    """,
    "private memory at once": """
        for _ in range(16):
            if os.fork() == 0:
                take(200 * MiB, 0x8022); time.sleep(60)
        end()
    """,
    "memory of hidden processes": """
        for _ in range(8):
            if os.fork() == 0:
                assert c.prctl(4, 0, 0, 0, 0) == 0
                touch(take(100 * MiB, 0x22), 100 * MiB); time.sleep(60)
        assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(8)] == [0] * 8
    """,
    "memory of an unreadable Python": """
        import shutil
        shutil.copy(sys.executable, 'python'); os.chmod('python', 0o111)
        code = 'import time; x = bytearray(100 << 20)\\nfor i in range(0, len(x), 4096): x[i] = 1\\ntime.sleep(60)'
        for _ in range(8):
            if os.fork() == 0: os.execv('./python', ['python', '-I', '-S', '-c', code])
        end()
    """,
    "memory of threads": """
        import threading
        def hog():
            try: x = bytearray(60 << 20)
            except MemoryError: os._exit(1)
            time.sleep(60)
        for _ in range(20): threading.Thread(target=hog).start()
    """,
    "memory in sockets": """
        for _ in range(30):
            if os.fork() == 0:
                kept = []
                while True:
                    try: kept.append(socket.socketpair())
                    except OSError: break
                for pair in kept:
                    for end in pair:
                        end.setblocking(False)
                        try:
                            while True: end.send(bytes(65536))
                        except OSError: pass
                time.sleep(60)
        end()
    """,
    "larger sockets": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)",
    "larger pipes": "import fcntl\nfcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "memory in pipes": """
        for _ in range(30):
            if os.fork() == 0:
                kept = []
                while True:
                    try: kept.append(os.pipe())
                    except OSError: break
                for reading, writing in kept:
                    os.set_blocking(writing, False)
                    try:
                        while True: os.write(writing, bytes(4096))
                    except OSError: pass
                time.sleep(1); os._exit(0)
        end()
    """,
    "pages in a pipe": """
        p = take(MiB, 0x22)
        vector = (ctypes.c_size_t * 2)(p, MiB)
        assert c.vmsplice(os.pipe()[1], vector, ctypes.c_size_t(1), 0) > 0
    """,
    "segment of System V": "assert c.shmget(0, ctypes.c_size_t(100 * MiB), 0o1600) >= 0",
    "secret memory": "assert c.syscall(ctypes.c_long(447), 0) >= 0",
    "rings of the kernel": "assert c.syscall(ctypes.c_long(425), 8, ctypes.create_string_buffer(200)) >= 0",
    "ring of asynchronous files": "assert c.syscall(ctypes.c_long(206), 64, ctypes.byref(ctypes.c_ulong(0))) == 0",
    "locked memory": "assert c.mlockall(3) == 0",
    "mappings of many": """
        p = take(200 * MiB, 0x22)
        for i in range(0, 200 * MiB, 2 * 4096):
            if c.mprotect(ctypes.c_void_p(p + i), ctypes.c_size_t(4096), 1): break
        for _ in range(31):
            if os.fork() == 0: time.sleep(60)
        end()
    """,
    "memory swapped out": """
        p = take(MiB, 0x22); touch(p, MiB)
        assert c.madvise(ctypes.c_void_p(p), ctypes.c_size_t(MiB), 21) == 0
    """,
    "events that nobody reads": "assert c.inotify_init1(0) >= 0",
    "events of files": "assert c.fanotify_init(0x200, 0) >= 0",
    "rules about files": "assert c.syscall(ctypes.c_long(444), (ctypes.c_uint64 * 1)(1), ctypes.c_size_t(8), 0) >= 0",
    "filters of its own": "assert c.syscall(ctypes.c_long(317), 2, 0, ctypes.byref(ctypes.c_uint32(0x7FFF0000))) == 0",
    "locks": "import fcntl\nf = open('f', 'w')\nfor i in range(10): fcntl.lockf(f, fcntl.LOCK_EX, 1, 2 * i)",
    "a limit raised": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}

# ---------------------------------------------------------------------------------------------------------------------
# Files. These may not take more than their limit, and nothing of them is left.

FILE_ATTACKS = {
    "unlinked files": """
        import os
        kept = []
        for i in range(40):
            f = open('f', 'wb'); kept.append(f)
            f.write(bytes(8 << 20)); f.flush(); os.unlink('f')
        import time
        time.sleep(0.5)
    """,
    "unlinked files of many": """
        import os, time
        for n in range(8):
            if os.fork() == 0:
                kept = []
                for i in range(10):
                    f = open(f'f{n}', 'wb'); kept.append(f); f.write(bytes(4 << 20)); f.flush(); os.unlink(f'f{n}')
                time.sleep(1)
                os._exit(0)
        for _ in range(8): os.wait()
        assert False
    """,
    "files without a name": """
        import os, time
        kept = []
        for i in range(40):
            kept.append(os.open('.', os.O_TMPFILE | os.O_RDWR))
            os.write(kept[-1], bytes(8 << 20))
        time.sleep(0.5)
    """,
    "unlinked files, kept by mappings": """
        import mmap, os, time
        kept = []
        for i in range(40):
            with open('f', 'w+b') as f:
                f.write(bytes(8 << 20)); f.flush()
                kept.append(mmap.mmap(f.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
            os.unlink('f')
            for k in kept: k
        time.sleep(0.5)
    """,
    "unlinked files, kept by mappings alone": """
        import ctypes, os, time
        c = ctypes.CDLL(None)
        c.mmap.restype = ctypes.c_void_p
        for i in range(40):
            f = os.open('f', os.O_CREAT | os.O_RDWR); os.write(f, bytes(8 << 20))
            c.mmap(None, ctypes.c_size_t(4096), 1, 2, f, ctypes.c_long(0)); os.close(f); os.unlink('f')
        time.sleep(0.5)
    """,
    "unlinked files, sent to oneself": """
        import os, socket
        a, b = socket.socketpair()
        f = os.open('f', os.O_CREAT | os.O_RDWR)
        socket.send_fds(a, [b'x'], [f])
    """,
    "unlinked files, kept by rules": """
        import ctypes, os, struct, time
        call, n = ctypes.CDLL(None).syscall, ctypes.c_long
        rules = call(n(444), struct.pack('Q', 4), ctypes.c_size_t(8), 0)
        assert rules >= 0
        for i in range(20):
            f = os.open('f', os.O_CREAT | os.O_RDWR); os.write(f, bytes(8 << 20))
            call(n(445), rules, 1, struct.pack('=Qi', 4, f), 0)
            os.close(f); os.unlink('f')
        time.sleep(0.5)
    """,
    "attributes of files": """
        import os
        for i in range(100):
            open(f'f{i}', 'w').close()
            os.setxattr(f'f{i}', 'user.x', bytes(4000))
    """,
    "files of a thread of its own": """
        import ctypes, threading
        found = []
        t = threading.Thread(target=lambda: found.append(ctypes.CDLL(None).syscall(ctypes.c_long(436), 60, 60, 2)))
        t.start(); t.join()
        assert found == [0]
    """,
    "thread with files of its own": "import ctypes\nassert ctypes.CDLL(None).unshare(0x400) == 0",
    "a hundred thousand files": "for i in range(100_000): open(f'f{i}', 'w').close()",
    "a hundred thousand folders": "import os\nfor i in range(100_000): os.mkdir(f'f{i}')",
    "1,500 nested folders": """
        import os
        for _ in range(1500):
            os.mkdir('d'); os.chdir('d')
        assert False
    """,
    "nested folders with long names": """
        import os
        for _ in range(200):
            os.mkdir('d' * 250); os.chdir('d' * 250)
        open('f', 'w').close()
        assert False
    """,
    "files below nested folders": """
        import os, time
        for i in range(100):
            os.mkdir('d' * 100); os.chdir('d' * 100)
            with open('f', 'wb') as f: f.write(bytes(4 << 20))
        time.sleep(1)
        assert False
    """,
    "folders without permissions": """
        import os
        os.makedirs('a/b/c'); open('a/b/c/f', 'w').close()
        for d in ('a/b/c', 'a/b', 'a'): os.chmod(d, 0)
        assert False
    """,
    "a working directory without permissions": """
        import os
        open('f', 'w').close(); os.chmod('.', 0)
        assert False
    """,
    "strange names": """
        for name in (b'\\n', b'\\xff\\xfe', b'-rf', b' ', b'x' * 255, b'*', b'\\x1b[0m'):
            open(b'./' + name, 'w').close()
        assert False
    """,
    "links out": """
        import os
        for i, place in enumerate(('/', '/tmp', '..', '/etc/passwd', '/proc/self/root', 'l0', 'self')):
            os.symlink(place, f'l{i}')
        os.symlink('self', 'self')
        assert False
    """,
    "pipes and sockets with names": """
        import os
        os.mkfifo('p')
        os.link('p', 'q')
        assert False
    """,
    "a device": "import os\nos.mknod('d', 0o020666, os.makedev(1, 1))",
    "files elsewhere": """
        import os
        left = 0
        for place in ('/tmp', '/var/tmp', '/dev/shm', '/dev', '/', '/run', '/run/lock', '/work'):
            try:
                for i in range(40):
                    with open(f'{place}/trl-dllm-left-{os.getpid()}-{i}', 'wb') as f:
                        f.write(bytes(8 << 20)); left += 8
            except OSError: pass
        import time
        time.sleep(0.5)
        assert left > 150, left
    """,
    "folders elsewhere": """
        import os
        for place in ('/tmp', '/var/tmp', '/dev/shm'):
            try:
                os.chdir(place)
                for _ in range(1200): os.mkdir('trl-dllm-left'); os.chdir('trl-dllm-left')
            except OSError: pass
        assert False
    """,
    "a name that somebody else wants": """
        import os
        os.rename(os.getcwd(), os.getcwd() + '-moved')
        assert False
    """,
}

# ---------------------------------------------------------------------------------------------------------------------
# What is not a program's to do

OTHER_ATTACKS = {
    "kill all": """
        import os
        os.kill(-1, 9)
        assert False
    """,
    "kill the group": "import os\nos.killpg(0, 9)",
    "stop all": """
        import os
        os.kill(-1, 19)
        assert False
    """,
    "stop oneself": """
        import os
        os.kill(os.getpid(), 19)
        assert False
    """,
    "real time": "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "a higher priority": "import os\nos.nice(-5)",
    "files of another limit": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    "the parent's limits": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
    "the parent's priority": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "the priority of all": "import os\nos.setpriority(os.PRIO_USER, 0, 19)",
    "the parent's scheduling": "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "the parent's processors": "import os\nos.sched_setaffinity(os.getppid(), {0})",
    "the parent interrupted": """
        import ctypes, os
        for n in (2, 10, 12, 14, 15, 1, 3):
            ctypes.CDLL(None).syscall(ctypes.c_long(200), os.getppid(), n)
        assert False
    """,
    "the parent's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b').read(1)",
    "the parent's descriptors": "import os\nos.listdir(f'/proc/{os.getppid()}/fd')",
    "a descriptor of the parent": """
        import ctypes, os
        handle = os.pidfd_open(os.getppid())
        assert ctypes.CDLL(None).syscall(ctypes.c_long(438), handle, 0, 0) >= 0
    """,
    "settings of the kernel": "with open('/proc/sys/kernel/hostname', 'w') as f: f.write('x')",
    "spared by the kernel": "with open('/proc/self/oom_score_adj', 'w') as f: f.write('-1000')",
    "a new root": "import os\nos.chroot('/usr')",
    "root": """
        import os
        os.setuid(0)
        assert os.getuid() == 0 and open('/etc/shadow').read()
    """,
    "calls by other numbers": """
        import ctypes
        assert ctypes.CDLL(None).syscall(ctypes.c_long(0x40000029), 1, 1, 0) >= 0
    """,
    "clone by its new name": "import ctypes\nassert ctypes.CDLL(None).syscall(ctypes.c_long(435), 0, 0) >= 0",
    "a queue of messages": """
        import ctypes
        assert ctypes.CDLL(None).syscall(ctypes.c_long(240), b'q', 0o101, 0o600, None) >= 0
    """,
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    "endless verdicts": "import os\nwhile True: os.write(3, b'0' * 4096)",
    "a log of the machine": """
        import ctypes
        assert ctypes.CDLL(None).klogctl(3, ctypes.create_string_buffer(9), 9) > 0
    """,
    "keys": "import ctypes\nassert ctypes.CDLL(None).syscall(ctypes.c_long(250), 0, -3, 1) >= 0",
    "counters": "import ctypes\nassert ctypes.CDLL(None).syscall(ctypes.c_long(298), None, 0, -1, -1, 0) >= 0",
}

PROGRAMS = {
    name: dedent(code) for name, code in {**ATTACKS, **MEMORY_ATTACKS, **FILE_ATTACKS, **OTHER_ATTACKS}.items()
}
PROGRAMS |= {name: C_LIBRARY + PROGRAMS[name] for name in MEMORY_ATTACKS}

# These end by their time limit alone; the others get enough for a busy machine.
ENDLESS = {
    *("stubborn fork bomb", "endless loop", "endless sleep", "stubborn signals", "endless output", "recursion"),
    *("stop all", "stop oneself", "endless errors", "endless verdicts"),
}
WORKERS = 4
MEMORY_LIMIT = 256 << 20  # of the attacks on memory

CONTROLS = {
    "plain": "print(sum(range(10)))",
    "files": """
        open('a', 'w').write('x')
        import tempfile
        tempfile.NamedTemporaryFile().write(b'x')
    """,
    "processes": "import subprocess, sys\nassert subprocess.run(['/bin/true']).returncode == 0",
    "threads": """
        import threading
        t = threading.Thread(target=print)
        t.start()
        t.join()
    """,
    "memory": "x = bytearray(100 << 20)",
    "event loop": """
        import asyncio
        async def f(): return 3
        assert asyncio.run(f()) == 3
    """,
    "main": """
        assert __name__ == '__main__'
        import pickle
        class A: pass
        pickle.loads(pickle.dumps(A()))
    """,
    "pipes and sockets": """
        import os, socket
        r, w = os.pipe(); os.write(w, b'x'); assert os.read(r, 1) == b'x'
        a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'
    """,
    "mapped memory": """
        import mmap
        m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[0] = 1
        open('f', 'wb').write(bytes(4096))
        f = open('f', 'rb'); mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE)
    """,
    "forks": """
        import os
        for _ in range(5):
            if os.fork() == 0: os._exit(0)
            os.wait()
    """,
    "standard library": """
        import decimal, fractions, heapq, itertools, json, math, random, re, sqlite3, statistics, zlib
    """,
}


CONTROLS = {name: dedent(code) for name, code in CONTROLS.items()}


def leftovers():
    """Processes that run in a sandbox: their command line has the text of `boot`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"def boot_in_sandbox()" in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            pass
    return found


def left_files():
    """What lies where any user may write; other tests may be adding to it."""
    found = set()
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.path.isdir(place):
            found |= {f"{place}/{name}" for name in os.listdir(place) if name.startswith("trl-dllm-")}
    return found


class Peak:
    """The most memory that sandboxed processes, and shared memory, took at a time while a block ran, in bytes."""

    def __enter__(self):
        self.bytes, self.shared_before, self.running = 0, self._shared(), True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def _watch(self):
        while self.running:
            total = self._shared() - self.shared_before
            for pid in leftovers():
                try:
                    with open(f"/proc/{pid}/statm") as file:
                        fields = file.read().split()
                    total += (int(fields[1]) - int(fields[2])) * 4096
                except OSError:
                    pass
            self.bytes = max(self.bytes, total)
            time.sleep(0.005)

    @staticmethod
    def _shared():
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Shmem:")) << 10


def main(kind):
    request = json.loads(sys.stdin.read())
    import sandbox  # a copy, beside this file
    import wrong_programs

    if request["interpreter"]:
        sandbox.launch.interpreter = lambda: request["interpreter"]
    try:
        sandbox.choose_sandbox(kind)
    except sandbox.SandboxUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    before = left_files()
    trials = wrong_programs.trials(sandbox.Trial)

    def run(name):
        start = time.monotonic()
        if name in trials:
            seconds = 2.0 if name in wrong_programs.ENDLESS else 20.0
            result = sandbox.run_trial(trials[name], timeout=seconds, sandbox=kind)
        else:
            code = request["programs"][name].replace("@CALLER@", str(os.getpid()))
            limits = {"timeout": 1.0 if name in ENDLESS else 20.0, "processes": 32, "sandbox": kind}
            if name in MEMORY_ATTACKS:
                limits["memory_bytes"] = MEMORY_LIMIT
            result = sandbox.run_program(code, **limits)
        return name, {**vars(result), "wall": time.monotonic() - start}

    results = {}
    with ThreadPoolExecutor(WORKERS) as pool:  # most of those that take long wait for their end
        names = [name for name in (*request["programs"], *request["trials"]) if name not in MEMORY_ATTACKS]
        results.update(pool.map(run, names))
    for name in MEMORY_ATTACKS.keys() & request["programs"].keys():
        with Peak() as peak:
            results.update([run(name)])
        results[name]["peak"] = peak.bytes
    print(json.dumps({"results": results, "left": sorted(left_files() - before), "user": os.geteuid()}))


if __name__ == "__main__":
    main(sys.argv[1])
