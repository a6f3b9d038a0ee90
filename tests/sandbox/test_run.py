import subprocess
import sys
import time
from pathlib import Path

import attacks
import pytest

from trl_dllm.sandbox import SANDBOXES, LocalProvider, SandboxUnavailable, run, run_many, run_program


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
    pytest.mark.usefixtures("sandbox"),
]
SECRET = "TRL_DLLM_TEST_SECRET_7f3a"


# What programs see


def test_the_world_of_a_program(monkeypatch):
    monkeypatch.setenv("MARK", SECRET)
    code = (
        "import os, sys\nprint(sorted(os.environ), os.listdir('.'), sys.argv, sys.stdin.read(), os.getuid() != 0)\n"
        "print('problem', file=sys.stderr)"
    )
    result = run_program(code, stdin="in\nput")
    assert result.passed and result.reason == "passed" and result.sandbox in SANDBOXES and result.seconds > 0
    assert result.stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR'] [] ['main.py'] in\nput True\n"
    assert result.stderr == "problem\n"


def test_nothing_is_passed_on_from_one_program_to_the_next():
    assert run_program("import os\nopen('left', 'w').close()").passed
    assert run_program("import os\nassert os.listdir('.') == []").passed


def test_failures_say_why():
    result = run_program("def f():\n    return 1 / 0\nf()")
    assert (result.passed, result.reason) == (False, "failed")
    assert "ZeroDivisionError: division by zero" in result.stderr and "line 2, in f" in result.stderr


def test_output_and_odd_texts():
    result = run_program("print('é' * 100_000)\nimport sys\nsys.stdout.buffer.write(b'\\xff')", output_bytes=1000)
    assert result.passed and result.stdout == "é" * 500
    assert run_program("print('\ud800')").reason == "failed"
    assert run_program("").passed
    assert run_program("x = '" + "y" * 3_000_000 + "'", stdin="z" * 3_000_000).passed


def test_timeout_is_kept():
    start = time.perf_counter()
    assert run_program("while True: pass", timeout=0.5).reason == "timeout"
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["timeout", "memory_bytes", "file_bytes", "disk_bytes", "processes", "output_bytes"])
def test_wrong_limits(name):
    with pytest.raises(ValueError, match=name):
        run_program("", **{name: 0})


def test_run_many_keeps_the_order():
    programs = [f"import time\ntime.sleep({0.3 if n == 0 else 0})\nprint({n}, input())" for n in range(6)]
    results = run_many(programs, stdins=[str(n) for n in range(6)], num_workers=3)
    assert [result.stdout for result in results] == [f"{n} {n}\n" for n in range(6)]
    assert run_many([]) == []
    with pytest.raises(ValueError, match="2 programs have 1 inputs"):
        run_many(["", ""], stdins=[""])


def test_a_killed_caller_leaves_nothing():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sandbox\n"
        "sandbox.choose_sandbox(); print('go', flush=True)\n"
        "sandbox.run_program('import time  # MARKED\\ntime.sleep(300)', timeout=300)"
    )
    before = set(attacks.leftovers())
    command = [sys.executable, "-c", code, str(Path(run.__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as caller:
        assert caller.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 20
        while not (started := set(attacks.leftovers()) - before) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started
        time.sleep(0.3)
        caller.kill()
    deadline = time.monotonic() + 20
    while started & set(attacks.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started & set(attacks.leftovers())


# Refusals


def test_refuses_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(run, "_problem", lambda kind, user, path: "not today")
    with pytest.raises(SandboxUnavailable, match="bubblewrap: not today; namespaces: not today; uid: not today"):
        run_program("print(1)")
    with pytest.raises(SandboxUnavailable):
        LocalProvider().execute_scripts(["1"], ["python"])


def test_unknown_sandbox():
    with pytest.raises(ValueError, match="'jail'"):
        run_program("", sandbox="jail")
