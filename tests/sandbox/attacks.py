"""Programs that no sandbox may suffer from, and a driver that runs them: `python attacks.py KIND < request > results`.

Standard library only, so that a user who can read nothing else can run it. Attacks run inside the executor and never
bare.
"""

import json
import os
import sys
import time


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "stubborn fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"),
    "threads": (
        "import threading, time\n"
        "for _ in range(10_000):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    ),
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(3600)",
    "stubborn signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "8 GiB": "x = bytearray(8 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1",
    "memory of many": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0: break\n"
        "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(60)"
    ),
    "10 GiB file": "f = open('big', 'wb')\nfor _ in range(10 << 10): f.write(bytes(1 << 20))",
    "sparse file": "import os\nos.truncate(os.open('big', os.O_CREAT | os.O_RDWR), 10 << 30)",
    "many files": ("for i in range(1000):\n    with open(f'file{i}', 'wb') as f: f.write(bytes(8 << 20))"),
    "memory file": "import os\nf = os.memfd_create('x')\nos.write(f, b'x')",
    "kill parent": "import os\nos.kill(os.getppid(), 9)",
    "kill caller": "import os\nos.kill(@CALLER@, 9)",
    "read the caller's environment": (
        "import os\nfound = '@SECRET@' in str(os.environ)\n"
        "for pid in [p for p in os.listdir('/proc') if p.isdigit()]:\n"
        "    try: found |= b'@SECRET@' in open(f'/proc/{pid}/environ', 'rb').read()\n"
        "    except OSError: pass\nassert found"
    ),
    "read the caller's files": "assert 'secret' in open('@FILE@').read()",
    "inherited descriptors": "import os\nassert any(os.path.exists(f'/proc/self/fd/{n}') for n in range(5, 300))",
    "open a socket": "import socket\nsocket.socket()",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), timeout=2).send(b'hello')",
    "resolve": "import socket\nsocket.getaddrinfo('example.com', 80)",
    "daemonised grandchild": (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for n in range(3): os.close(n)\n"
        "        time.sleep(300)\n    os._exit(0)\nos.wait()"
    ),
    "daemonised grandchild that ignores": (
        "import os, signal, time\nsignal.signal(15, signal.SIG_IGN); signal.signal(1, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(300)\n    os._exit(0)\nos.wait()"
    ),
    "close stdout": "import os\nos.close(1)",
    "close stdout object": "import sys\nsys.stdout.close()",
    "close everything": "import os\nos.closerange(0, 100)",
    "forged success": (
        "import os, json\nfor line in ('passed', 'PASSED', 'ok', '1.0', json.dumps({'passed': True})):\n"
        "    print(line)\nos.write(1, b'x' * 32)\nassert False"
    ),
    "forged verdict": "import os\nos.write(3, b'0' * 32)\nos._exit(0)",
    "forged verdict, regular end": "import os\nos.write(3, b'0' * 32)",
    "exit 0": "import sys\nsys.exit(0)\nassert False",
    "_exit 0": "import os\nos._exit(0)",
    "exit from a thread of tests": "raise SystemExit",
    "child claims success": "import os\nif os.fork():\n    os.wait()\n    raise ValueError",
    "replaced functions": (
        "import os, sys\nsys.exit = os._exit = exit = lambda *a: None\nos.write = lambda *a: 0\nassert False"
    ),
    "endless output": "while True: print('x' * 10_000)",
    "recursion": "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "nested namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/work', b'tmpfs', 0, 0) == 0",
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "write to Python": "import os\nopen(os.path.dirname(os.__file__) + '/evil.py', 'w').write('x')",
    "syntax": "def",
    "null byte": "\x00",
}

# These end by their time limit alone; the others get enough for a busy machine.
ENDLESS = {"stubborn fork bomb", "endless loop", "endless sleep", "stubborn signals", "endless output", "recursion"}

CONTROLS = {
    "plain": "print(sum(range(10)))",
    "files": "open('a', 'w').write('x')\nimport tempfile\ntempfile.NamedTemporaryFile().write(b'x')",
    "processes": "import subprocess, sys\nassert subprocess.run(['/bin/true']).returncode == 0",
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "memory": "x = bytearray(100 << 20)",
    "event loop": "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    "main": "assert __name__ == '__main__'\nimport pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))",
}


def leftovers():
    """Processes that run in a harness: their command line has its text."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"def run_script()" in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            pass
    return found


def main(kind):
    request = json.loads(sys.stdin.read())
    import sandbox  # a copy, beside this file

    if request["interpreter"]:
        sandbox.run._interpreter = lambda: request["interpreter"]
    try:
        sandbox.choose_sandbox(kind)
    except sandbox.SandboxUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    results = {}
    for name, code in request["programs"].items():
        code = code.replace("@CALLER@", str(os.getpid()))
        start = time.monotonic()
        result = sandbox.run_program(code, timeout=1.0 if name in ENDLESS else 20.0, processes=32, sandbox=kind)
        results[name] = [result.passed, result.reason, result.stdout, result.stderr, time.monotonic() - start]
    print(json.dumps({"results": results, "user": os.geteuid()}))


if __name__ == "__main__":
    main(sys.argv[1])
