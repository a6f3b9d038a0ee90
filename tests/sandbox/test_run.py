import math
import subprocess
import sys
import time
from pathlib import Path

import attacks
import pytest
import wrong_programs

from trl_dllm.sandbox import (
    SANDBOXES,
    LocalProvider,
    SandboxUnavailable,
    Trial,
    kinds,
    run,
    run_many,
    run_program,
    run_trial,
    run_trials,
)


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
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
            run_program("", **{name: value})


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
    command = [sys.executable, "-c", code, str(Path(kinds.__file__).parents[1])]
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


# Trials: a program and its test in two sandboxes


def test_a_trial_is_judged_outside():
    trial = Trial("print('hello')\ndef f(x): return x + 1", "assert f(1) == 2", script="1 / 0")
    result = run_trial(trial)
    assert (result.passed, result.reason, result.judged) == (True, "passed", "outside")
    assert result.stdout == "hello\n" and result.stderr == "" and result.seconds > 0 and result.sandbox in SANDBOXES


@pytest.mark.parametrize(
    "program, reason, text",
    [
        ("def f(x): return x", "failed", "AssertionError: said by the test"),
        ("def f(x): return 1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.stderr.write('said by the program')\ndef f(x): return 1", "failed", "said by the program"),
        ("1 / 0", "failed", "ZeroDivisionError"),
        ("def g(x): return 2", "failed", "name 'f' is not defined"),
        ("raise SystemExit(3)", "exited early", "SystemExit: 3"),
        ("def f(x): raise SystemExit(3)", "exited early", "the program ended before its test did"),
        ("def f(x): return len(bytearray(1 << 40))", "failed", "MemoryError"),
        ("import os\ndef f(x): os.kill(os.getpid(), 11)", "killed by signal 11", ""),
        ("def f(x): return print", "failed", "AssertionError"),
    ],
)
def test_a_trial_that_fails_says_why(program, reason, text):
    result = run_trial(Trial(program, "assert f(1) == 2, 'said by the test'", script=""))
    assert (result.passed, result.reason, result.judged) == (False, reason, "outside") and text in result.stderr


def test_time_and_memory_of_a_trial():
    for program in ("while True: pass", "def f(x):\n    while True: pass"):
        assert run_trial(Trial(program, "assert f(1) == 2", ""), timeout=0.5).reason == "timeout"
    # of its test, too
    right = "def f(x): return x"
    assert run_trial(Trial(right, "while True:\n    assert f(1) == 1", ""), timeout=0.5).reason == "timeout"
    assert run_trial(Trial(right, "assert f(1) == 1\nx = [0] * 10**9", ""), memory_bytes=1 << 28).reason == "failed"


@pytest.mark.parametrize("name", wrong_programs.SEVEN)
def test_programs_that_fool_their_own_process_fool_no_other(name):
    trial = wrong_programs.trials(Trial)[name]
    result = run_trial(trial)
    assert not result.passed and result.judged == "outside"
    # As one script they pass, as they do in any test that cannot be judged outside.
    found = run_program(trial.script)
    assert found.passed and found.judged == "inside", found


def test_a_trial_that_cannot_be_judged_outside_is_its_script():
    trial = Trial("", "assert P().x == 1", script="class P: x = 1\nassert P().x == 1")
    result = run_trial(trial)
    assert result.passed and result.judged == "inside"
    assert run_trial(Trial("", "f(", script="1 / 0")).reason == "failed"


def test_many_trials_keep_their_order():
    trials = [Trial(f"def f(x): return {n}", "assert f(0) == 1", "") for n in range(3)]
    assert [result.passed for result in run_trials(trials, num_workers=2)] == [False, True, False]
    assert run_trials([]) == []


@pytest.mark.parametrize("name", ["timeout", "memory_bytes", "file_bytes", "disk_bytes", "processes", "output_bytes"])
def test_wrong_limits_of_a_trial(name):
    with pytest.raises(ValueError, match=name):
        run_trial(Trial("", "assert f(1)", ""), **{name: 0})


# Refusals


def test_a_launcher_that_is_ended_by_the_machine_is_started_again(monkeypatch):
    real, calls = run.launch, []

    def broken_once(*given):
        calls.append(given)
        if len(calls) == 1:
            raise SandboxUnavailable("killed")
        return real(*given)

    monkeypatch.setattr(run, "launch", broken_once)
    assert run_program("x = 1").passed and len(calls) == 2


def test_what_one_program_does_to_its_sandbox_is_no_exception(monkeypatch):
    """An empty program still runs, so that it was this one's fault."""
    real = run.launch

    def broken(kind, limits, runs):
        if runs[0].arguments == ["bad"]:
            raise SandboxUnavailable("broken")
        return real(kind, limits, runs)

    monkeypatch.setattr(run, "launch", broken)
    result = run_program("bad")
    assert (result.passed, result.reason, result.stderr, result.judged) == (False, "sandbox", "broken", "inside")
    monkeypatch.setattr(run, "problem_now", lambda kind: "nothing works any more")
    with pytest.raises(SandboxUnavailable, match="broken"):
        run_program("bad")


def test_refuses_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(kinds, "_problem", lambda kind, user, path: "not today")
    with pytest.raises(SandboxUnavailable, match="bubblewrap: not today; namespaces: not today; uid: not today"):
        run_program("print(1)")
    with pytest.raises(SandboxUnavailable):
        LocalProvider().execute_scripts(["1"], ["python"])


def test_unknown_sandbox():
    with pytest.raises(ValueError, match="'jail'"):
        run_program("", sandbox="jail")
