import os

import pytest
from helpers_inside import start_caller

from trl_dllm.sandbox import SandboxUnavailable, choose_sandbox, run_program
from trl_dllm.sandbox.inside.namespaces import write_maps


@pytest.fixture(autouse=True)
def works():
    try:
        choose_sandbox("namespaces")
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def test_everything_is_new():
    names = ("user", "mnt", "net", "ipc", "uts", "pid", "cgroup")
    code = (
        "import os\n"
        "print(os.getuid(), os.getgid(), os.getppid(), len([p for p in os.listdir('/proc') if p.isdigit()]))\n"
        f"print(sorted(os.readlink(f'/proc/self/ns/{{n}}') for n in {names}))\n"
        "print(open('/proc/net/dev').read().count(':'))\n"
    )
    result = run_program(code, sandbox="namespaces")
    assert result.passed, result.stderr
    ids, spaces, interfaces = result.stdout.splitlines()
    assert ids == "1000 1000 1 2" and interfaces == "1"  # a loopback that is down
    mine = {os.readlink(f"/proc/self/ns/{name}") for name in names}
    assert not mine & set(eval(spaces)) and len(eval(spaces)) == 7


def test_where_processes_cannot_be_counted_there_is_only_one():
    patch = (
        "import sys; sys.path.insert(0, sys.argv[1]); import inside.usage; "
        "inside.usage.ProcessTree.works = lambda self: False; "
    )
    code = (
        "import os, threading\nt = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "try: os.fork()\nexcept PermissionError: print('no fork')\n"
        "import subprocess\ntry: subprocess.run(['true'])\nexcept PermissionError: print('no program')\n"
    )
    answer, _ = start_caller("namespaces", code, patch).communicate()
    assert "passed=True" in answer and "stdout='thread\\nno fork\\nno program\\n'" in answer


def test_maps(tmp_path, monkeypatch):
    written = {}

    class File:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, text):
            written[self.path] = text

    monkeypatch.setattr("builtins.open", lambda path, mode: File(path))
    monkeypatch.setattr(os, "geteuid", lambda: 500)
    monkeypatch.setattr(os, "getegid", lambda: 600)
    write_maps(7, root=False)
    assert written == {
        "/proc/7/uid_map": "1000 500 1\n",
        "/proc/7/setgroups": "deny",
        "/proc/7/gid_map": "1000 600 1\n",
    }
    written.clear()
    write_maps(7, root=True)
    assert written == {"/proc/7/uid_map": "0 0 1\n1000 65534 1\n", "/proc/7/gid_map": "0 0 1\n1000 65534 1\n"}
