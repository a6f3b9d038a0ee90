"""The inside of execution.py: builds a sandbox around itself, runs one untrusted program in it, reports what happened.

Never imported by the library: `execution.run_program` starts it as `python -I -S _sandbox.py`, writes a request to its
standard input (JSON) and reads a report from its standard output (JSON). Standard library only; Linux only.

Three kinds, all with the same monitor (`monitor`) around the program:

- namespaces: launcher → setup (new user, mount, network, IPC, PID … namespaces) → monitor (PID 1 in there, so that its
  end is the end of every process) → program. The file system is a new, small tmpfs with Python's own folders bound
  read-only.
- bubblewrap: the same, set up by `bwrap`.
- uid: for root where no namespaces can be made: the program runs under a user id of its own, and what is left of that
  user is killed. The network is closed by the system-call filter alone.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import time


# ---------------------------------------------------------------------------------------------------------------------
# What runs in the program's own process: it reads a nonce and the source from descriptor 4, runs the source as
# __main__, and only where that ends by itself writes the nonce to descriptor 3. Nothing printed, and no exit status,
# can be taken for that.

HARNESS = """
def start():
    import os, sys, types
    write, leave, getpid, me = os.write, os._exit, os.getpid, os.getpid()
    parts = []
    while True:
        part = os.read(4, 1 << 20)
        if not part:
            break
        parts.append(part)
    os.close(4)
    data = b"".join(parts)
    nonce, source = data[:32], data[32:].decode("utf-8", "surrogatepass")
    del data, parts
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    sys.argv = ["main.py"]
    out, flush_out, flush_err = sys.stdout, sys.stdout.flush, sys.stderr.flush
    status = 1
    try:
        exec(compile(source, "main.py", "exec"), main.__dict__)
        flush_out()
        os.fstat(1)
        status = 0
    except SystemExit as error:
        status = 120
        try:
            sys.stderr.write("SystemExit: %s\\n" % (error.code,))
        except BaseException:
            pass
    except BaseException:
        try:
            import traceback
            traceback.print_exc(limit=-20)
        except BaseException:
            pass
    for flush in (flush_out, flush_err):
        try:
            flush()
        except BaseException:
            pass
    if status == 0 and getpid() == me:
        write(3, nonce)
    leave(status)
start()
"""

CLONE_FLAGS = {  # of unshare(2)
    "user": 0x10000000,
    "mount": 0x00020000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "pid": 0x20000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """This kind of sandbox cannot be made here."""


def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def prctl(option, *values):
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return call("prctl", ctypes.c_int(option), *padded)


def mount(source, target, kind, flags, data=None):
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    call("mount", encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data))


# ---------------------------------------------------------------------------------------------------------------------
# The system-call filter: classic BPF, checked in the order written here

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


def filter_program():
    """The filter as bytes, None on machines whose system-call numbers are not known here."""
    if platform.machine() not in ARCHITECTURES:
        return None
    column, architecture = ARCHITECTURES[platform.machine()]
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


def install_filter():
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


# ---------------------------------------------------------------------------------------------------------------------
# The monitor: starts the program, watches it, and leaves nothing behind


def limit(what, value):
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(what, (value, value))


def become_program(request, descriptors, uid, gid):
    """In the forked child: descriptors, limits, user, filter, and then a fresh interpreter. Does not return."""
    stdin, stdout, stderr, verdict, source = descriptors
    # All out of the way first: one of them may sit where another has to go.
    moved = [os.dup2(fd, 200 + index) for index, fd in enumerate((stdin, stdout, stderr, verdict, source))]
    for target, fd in enumerate(moved):
        os.dup2(fd, target, inheritable=True)
    os.closerange(5, 65536)
    os.setsid()
    os.chdir(request["work"])
    os.umask(0o077)
    seconds = int(request["timeout"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    limit(resource.RLIMIT_FSIZE, request["file_bytes"])
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_MSGQUEUE, 0)
    limit(resource.RLIMIT_AS, request["memory_bytes"])
    if uid is not None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
    limit(resource.RLIMIT_NPROC, request["processes"] + request.get("processes_before", 0))
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break
    if uid is not None:
        os.setresuid(uid, uid, uid)
    filtered = install_filter()
    if request["kind"] == "uid" and not filtered:
        os._exit(121)
    # exec without uid 0 and with no_new_privs clears what is left of the capabilities.
    environment = {"PATH": "/usr/bin:/bin", "HOME": request["work"], "TMPDIR": request["work"], "LANG": "C.UTF-8"}
    os.execve(request["python"], [request["python"], "-I", "-S", "-c", HARNESS], environment)


def anonymous_file(content):
    """A descriptor, at its start, of a file without a name."""
    fd = os.memfd_create("input")
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def resident_bytes(uid):
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


def written_bytes(folder):
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


def monitor(request, uid=None, gid=None, kill_all=None):
    """
    Run the program and return the report.

    In a PID namespace everything ends with this process. Elsewhere `kill_all()` ends what is left, and memory and disk
    are those of the user and of the working directory.
    """
    prctl(PR_SET_DUMPABLE, 0)  # a program of the same user could otherwise write to this process's memory
    nonce = os.urandom(16).hex().encode()
    source = anonymous_file(nonce + request["code"].encode("utf-8", "surrogatepass"))
    stdin = anonymous_file(request["stdin"].encode("utf-8", "surrogatepass"))
    pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, verdict
    for reading, _ in pipes:
        os.set_blocking(reading, False)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            become_program(request, (stdin, pipes[0][1], pipes[1][1], pipes[2][1], source), uid, gid)
        except BaseException as error:
            os.write(2, (f"{type(error).__name__}: {error}\n").encode())
        finally:
            os._exit(122)
    for fd in (source, stdin, *(writing for _, writing in pipes)):
        os.close(fd)
    readers = {reading: bytearray() for reading, _ in pipes}
    limits = dict(zip(readers, (request["output_bytes"], request["output_bytes"], 4096), strict=True))
    poller, reason, status, next_count = select.poll(), None, None, 0.0
    for fd in readers:
        poller.register(fd, select.POLLIN)
    try:
        handle = os.pidfd_open(child)
        poller.register(handle, select.POLLIN)
    except (AttributeError, OSError):
        handle = None

    def drain(fd):
        # At most a megabyte at a time, so that a program that prints for ever cannot keep us from the clock.
        for _ in range(16):
            try:
                part = os.read(fd, 65536)
            except BlockingIOError:
                return
            if not part:
                poller.unregister(fd)
                return
            readers[fd] += part[: max(0, limits[fd] - len(readers[fd]))]

    while status is None:
        elapsed = time.monotonic() - start
        if elapsed > request["timeout"]:
            reason = "timeout"
            break
        if elapsed >= next_count:
            next_count = elapsed + 0.05
            if resident_bytes(None if kill_all is None else uid) > request["memory_bytes"]:
                reason = "memory"
                break
            if kill_all is not None and written_bytes(request["work"]) > request["disk_bytes"]:
                reason = "disk"
                break
        wait = min(request["timeout"] - elapsed, 0.05) if handle is not None else 0.005
        for fd, _ in poller.poll(1000 * wait):
            if fd in readers:
                drain(fd)
        status = reap(child)
    # What the pipes still hold was written before the end.
    left = False
    if status is not None:
        for fd in readers:
            with contextlib.suppress(KeyError):  # closed before
                drain(fd)
        left = children_left()
    seconds = time.monotonic() - start
    verdict = bytes(list(readers.values())[2])
    if kill_all is not None:
        kill_all()
    if reason is None:
        reason = explain(status, verdict == nonce, left)
    texts = [bytes(content).decode("utf-8", "replace") for content in list(readers.values())[:2]]
    return {
        "passed": reason == "passed",
        "reason": reason,
        "stdout": texts[0],
        "stderr": texts[1],
        "seconds": seconds,
    }


def reap(child):
    """Collect what has died; the status of `child` if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def children_left():
    """Is there a live process still? Orphans have come to this process by now."""
    deadline = time.monotonic() + 0.05  # one that is just ending may take that long
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.002)


def explain(status, has_nonce, left):
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "timeout" if number == signal.SIGXCPU else f"killed by signal {number}"
    code = os.WEXITSTATUS(status)
    if code in (121, 122):
        return "sandbox"
    if code == 120 or (code == 0 and not has_nonce):
        return "exited early"
    if code != 0:
        return "failed"
    return "left processes" if left else "passed"


# ---------------------------------------------------------------------------------------------------------------------
# The kinds


def python_paths():
    """Folders and files that an interpreter without site-packages needs, each below no other."""
    wanted = ["/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/nix/store", "/gnu/store"]
    wanted += [sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__), sys.executable]
    wanted += [os.path.realpath(path) for path in wanted]
    kept = []
    for path in sorted({path for path in wanted if path and path != "/" and os.path.exists(path)}):
        if not any(path.startswith(other + "/") and not os.path.islink(other) for other in kept):
            kept.append(path)
    return kept


def make_read_only(path):
    """Remount what was bound at `path` read-only, keeping the flags that a user namespace may not drop."""
    flags = os.statvfs(path).f_flag
    keep = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048)  # the last two: noatime, nodiratime
    if flags & 4096:  # relatime, which mount(2) has at another place
        keep |= 1 << 21
    mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | keep)


def build_root(request, uid, gid):
    """A file system of its own: a small tmpfs with Python's folders read-only, /proc, four devices, and /work."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = next(path for path in ("/sys", "/mnt", "/tmp") if os.path.isdir(path))  # private: nobody else sees it
    paths = python_paths()
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={request['disk_bytes']},nr_inodes=8192,mode=755")
    for path in [*paths, "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path) and path.count("/") == 1:
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, target, None, MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            make_read_only(target)
    os.mkdir(root + "/proc")
    # Fails in a container that hides parts of its own /proc; everything but the count of memory works without it.
    with contextlib.suppress(OSError):
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(root + "/work", 0o700)
    if uid is not None:
        os.chown(root + "/work", uid, gid)
    os.chdir(root)
    call("syscall", ctypes.c_long({"x86_64": 155, "aarch64": 41}[platform.machine()]), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def run_in_namespaces(request):
    """Fork a process into new namespaces; return its report."""
    if platform.machine() not in ARCHITECTURES:
        raise Unavailable(f"not on {platform.machine()}")
    root = os.geteuid() == 0
    ready, mapped, answer = os.pipe(), os.pipe(), os.pipe()
    setup = os.fork()
    if setup == 0:
        try:
            os.close(answer[0])
            os.close(mapped[1])
            flags = 0
            for value in CLONE_FLAGS.values():
                flags |= value
            call("unshare", ctypes.c_int(flags))
            os.write(ready[1], b"+")
            if os.read(mapped[0], 1) != b"+":
                raise Unavailable("the user ids could not be mapped")
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            first = os.fork()
            if first:
                os.close(answer[1])
                os.waitpid(first, 0)
                os._exit(0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for fd in (0, 1):
                os.dup2(2, fd)
            uid, gid = (1000, 1000) if root else (None, None)
            build_root(request, uid, gid)
            report = monitor({**request, "work": "/work"}, uid, gid)
        except BaseException as error:
            report = {"unavailable": f"{type(error).__name__}: {error}"}
        data = memoryview(json.dumps(report).encode())
        while data:
            data = data[os.write(answer[1], data) :]
        os._exit(0)
    for fd in (ready[1], mapped[0], answer[1]):
        os.close(fd)
    try:
        if os.read(ready[0], 1) == b"+":
            write_maps(setup, root)
            os.write(mapped[1], b"+")
    except OSError as error:
        sys.stderr.write(f"{error}\n")
    os.close(mapped[1])
    with os.fdopen(answer[0]) as file:
        text = file.read()
    os.waitpid(setup, 0)
    report = json.loads(text) if text else {"unavailable": "the sandbox ended without a report"}
    if "unavailable" in report:
        raise Unavailable(report["unavailable"])
    return report


def write_maps(pid, root):
    """As root, 0 inside is 0 outside (the monitor) and 1000 an unprivileged user; else 1000 is the caller."""
    # Root's processes are not counted, so as root a second user is a must: no fallback to a map of one line.
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        if not root and name == "gid_map":
            with open(f"/proc/{pid}/setgroups", "w") as file:
                file.write("deny")
        other = 65534 if root else own
        text = f"0 0 1\n1000 {other} 1\n" if root else f"1000 {own} 1\n"
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def run_in_bubblewrap(request):
    """The monitor as PID 1 of a bubblewrap sandbox; return its report."""
    command = [request["bwrap"], "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1"]
    command += [
        "--clearenv",
        "--uid",
        "1000",
        "--gid",
        "1000",
        "--cap-drop",
        "ALL",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]
    paths = python_paths()
    for path in paths:
        if os.path.islink(path) and path.count("/") == 1:
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    for folder in ("/dev/shm", "/work"):
        command += ["--size", str(request["disk_bytes"]), "--tmpfs", folder]
    with open(__file__) as file:
        own = file.read()
    command += ["--remount-ro", "/", "--chdir", "/", request["python"], "-I", "-S", "-c", own, "inside"]
    inputs, answer = anonymous_file(json.dumps({**request, "work": "/work"}).encode()), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(inputs, 0)
            os.dup2(answer[1], 1)
            os.closerange(3, 65536)
            if os.geteuid() == 0:  # root's processes are not counted, not in a user namespace either
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by the change of user
            os.execve(request["bwrap"], command, {})
        finally:
            os._exit(122)
    os.close(answer[1])
    with os.fdopen(answer[0]) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise Unavailable("bubblewrap ended without a report")
    return json.loads(text)


def run_as_other_user(request):
    """Root without namespaces: the program under a user id that no other process has; return its report."""
    if os.geteuid() != 0:
        raise Unavailable("another user id needs root")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    uid = 1_000_000_000 + int.from_bytes(os.urandom(4), "big") % 1_000_000_000
    work = request["work"]
    os.chown(work, uid, uid)

    def kill_all():
        # From a process of that very user, kill(-1) reaches all of its others at once, however fast they fork.
        for _ in range(20):
            killer = os.fork()
            if killer == 0:
                try:
                    os.setresuid(uid, uid, uid)
                    os.kill(-1, signal.SIGKILL)
                finally:
                    os._exit(0)
            os.waitpid(killer, 0)
            if not children_left():
                return

    report = monitor(request, uid, uid, kill_all)
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):  # where any user may write
        for entry in os.scandir(folder) if os.path.isdir(folder) else ():
            try:
                if entry.stat(follow_symlinks=False).st_uid == uid and entry.path != work:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
            except OSError:
                pass
    return report


KINDS = {"namespaces": run_in_namespaces, "bubblewrap": run_in_bubblewrap, "uid": run_as_other_user}


def main():
    if sys.argv[1:] == ["inside"]:  # bubblewrap has made the sandbox
        request = json.loads(sys.stdin.read())
        answer = os.dup(1)
        for fd in (0, 1):
            os.dup2(2, fd)
        report = monitor(request)
    else:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        request = json.loads(sys.stdin.read())
        if os.getppid() != request["parent"]:
            return  # it died before the line above
        answer = 1
        try:
            report = KINDS[request["kind"]](request)
        except (Unavailable, OSError) as error:
            report = {"unavailable": str(error)}
    data = memoryview(json.dumps(report).encode())
    while data:
        data = data[os.write(answer, data) :]


if __name__ == "__main__":
    main()
