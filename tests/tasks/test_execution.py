import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import attacks
import pytest

from trl_dllm.tasks import execution
from trl_dllm.tasks.execution import (
    SANDBOXES,
    CodeExecutionProvider,
    LocalProvider,
    SandboxUnavailable,
    check_allowed,
    choose_sandbox,
    get_provider,
    pass_fractions,
    register_provider,
    run_many,
    run_program,
)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
NOBODY = 65534
SECRET = "TRL_DLLM_TEST_SECRET_7f3a"
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        return choose_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


# Attacks, in each kind of sandbox, as root and as an ordinary user


def drop_to_nobody():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def reachable_interpreter():
    """An interpreter that another user can run; None without one."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            test = subprocess.run(
                [path, "-c", "import ctypes"], preexec_fn=drop_to_nobody, capture_output=True, cwd="/"
            )
        except OSError:
            continue
        if test.returncode == 0:
            return os.path.realpath(path)
    return None


# The kind that most machines use is tried every time, the others by the slow tests.
USERS_AND_KINDS = [
    pytest.param((user, kind), id=f"{user}-{kind}", marks=[] if kind == "namespaces" else pytest.mark.slow)
    for user in ("caller", "nobody")
    for kind in SANDBOXES
]


@pytest.fixture(scope="module", params=USERS_AND_KINDS)
def attacked(request, tmp_path_factory):
    """Results by program of all attacks and controls, run by a driver process as one user in one kind of sandbox."""
    user, kind = request.param
    if user == "nobody" and not AS_ROOT:
        pytest.skip("only root can become another user")
    if kind == "uid" and (user == "nobody" or not AS_ROOT):
        pytest.skip("the kind 'uid' is for root")
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    # Python may lie where no other user can go, as in root's home.
    other = user == "nobody" or (kind != "namespaces" and AS_ROOT)
    interpreter = reachable_interpreter() if other else None
    if other and interpreter is None:
        pytest.skip("no interpreter that another user can run")
    folder = tmp_path_factory.mktemp("attack")
    (folder / "secret.txt").write_text("secret")
    (folder / "secret.txt").chmod(0o600)
    copied = Path("/tmp") / f"trl-dllm-test-{os.getpid()}-{user}-{kind}"  # the checkout may be closed to others too
    copied.mkdir()
    try:
        source = Path(execution.__file__)
        for path in (source, source.with_name("_sandbox.py"), Path(attacks.__file__)):
            shutil.copy(path, copied)
            (copied / path.name).chmod(0o644)
        copied.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.01)
            programs = {f"control: {name}": code for name, code in attacks.CONTROLS.items()}
            for name, code in attacks.ATTACKS.items():
                programs[name] = code.replace("@SECRET@", SECRET).replace("@FILE@", str(folder / "secret.txt"))
                programs[name] = programs[name].replace("@PORT@", str(server.getsockname()[1]))
            programs["control: afterwards"] = "print('still here')"
            task = {
                "programs": programs,
                "execution": str(copied / source.name),
                "interpreter": interpreter,
            }
            driver = subprocess.run(
                [interpreter or sys.executable, str(copied / "attacks.py"), kind],
                input=json.dumps(task),
                capture_output=True,
                text=True,
                env={"PATH": os.environ.get("PATH", ""), "MARK": SECRET},
                preexec_fn=drop_to_nobody if user == "nobody" else None,
                cwd="/",
                timeout=900,
            )
            with pytest.raises(TimeoutError):
                server.accept()
        assert driver.returncode == 0, driver.stderr
        answer = json.loads(driver.stdout)
    finally:
        shutil.rmtree(copied)
    if "unavailable" in answer:
        pytest.skip(f"this kind does not work here: {answer['unavailable']}")
    assert answer["user"] == (NOBODY if user == "nobody" else os.geteuid())
    # Not one process of all these programs is left (other tests may be running some at the same time).
    deadline = time.monotonic() + 20
    before = set(attacks.leftovers())
    while before & set(attacks.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not before & set(attacks.leftovers())
    return {"kind": kind, **answer["results"]}


def test_attacks_cost_one_failed_test_each(attacked):
    wrong = {}
    for name in attacks.ATTACKS:
        passed, reason, _, stderr, seconds = attacked[name]
        if passed or seconds > 30:
            wrong[name] = (reason, seconds, stderr[-300:])
    assert not wrong


def test_controls_pass(attacked):
    wrong = {name: result for name, result in attacked.items() if name.startswith("control: ") and not result[0]}
    assert not wrong
    assert attacked["control: plain"][2] == "45\n" and attacked["control: afterwards"][2] == "still here\n"


@pytest.mark.parametrize(
    "name, reasons",
    [
        ("endless loop", {"timeout"}),
        ("endless sleep", {"timeout"}),
        ("stubborn fork bomb", {"timeout"}),
        ("8 GiB", {"failed"}),
        ("10 GiB file", {"failed"}),
        ("open a socket", {"failed"}),
        ("kill parent", {"failed"}),
        ("daemonised grandchild", {"left processes"}),
        ("close stdout", {"failed"}),
        ("exit 0", {"exited early"}),
        ("_exit 0", {"exited early"}),
        ("forged verdict", {"exited early"}),
        ("crash", {"killed by signal 11"}),
        ("forged success", {"failed"}),
    ],
)
def test_reasons(attacked, name, reasons):
    assert attacked[name][1] in reasons, attacked[name]


def test_memory_of_all_processes_together(attacked):
    assert attacked["memory of many"][1] == "memory", attacked["memory of many"]


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
        "import sys; sys.path.insert(0, sys.argv[1]); import attacks\n"
        "execution = attacks.load_execution(sys.argv[2])\n"
        "execution.choose_sandbox(); print('go', flush=True)\n"
        "execution.run_program('import time  # MARKED\\ntime.sleep(300)', timeout=300)"
    )
    before = set(attacks.leftovers())
    command = [sys.executable, "-c", code, str(Path(attacks.__file__).parent), execution.__file__]
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
    monkeypatch.setattr(execution, "_problem", lambda kind, user, path: "not today")
    with pytest.raises(SandboxUnavailable, match="bubblewrap: not today; namespaces: not today; uid: not today"):
        run_program("print(1)")
    with pytest.raises(SandboxUnavailable):
        LocalProvider().execute_scripts(["1"], ["python"])


def test_unknown_sandbox():
    with pytest.raises(ValueError, match="'jail'"):
        run_program("", sandbox="jail")


def test_off_until_asked_for(monkeypatch):
    monkeypatch.delenv(execution.ALLOW_VARIABLE, raising=False)
    for allowed in (None, False):
        with pytest.raises(PermissionError, match="TRL_DLLM_ALLOW_CODE_EXECUTION=1"):
            check_allowed(allowed)
    check_allowed(True)
    monkeypatch.setenv(execution.ALLOW_VARIABLE, "1")
    check_allowed(None)
    with pytest.raises(PermissionError):
        check_allowed(False)


# Providers


class Recorder:
    def execute_scripts(self, scripts, languages):
        self.seen = list(zip(scripts, languages, strict=True))
        return [0.25 if "half" in script else 1.0 for script in scripts]


def test_providers():
    assert LocalProvider(timeout=5).execute_scripts(["1.0", "1/0\n1.0"], ["python", "python"]) == [1.0, 0.0]
    assert isinstance(get_provider(), LocalProvider) and get_provider(num_workers=2).num_workers == 2
    with pytest.raises(ValueError, match="'rust'"):
        LocalProvider().execute_scripts([""], ["rust"])
    with pytest.raises(ValueError, match="1 scripts have 0 languages"):
        LocalProvider().execute_scripts([""], [])
    with pytest.raises(ValueError, match=r"'lokal'.*mean 'local'"):
        get_provider("lokal")
    with pytest.raises(ValueError, match="execute_scripts"):
        get_provider(3)


def test_another_provider_fits(monkeypatch):
    monkeypatch.setattr(execution, "PROVIDERS", dict(execution.PROVIDERS))
    recorder = Recorder()
    assert isinstance(recorder, CodeExecutionProvider)
    register_provider("recorder", lambda: recorder)
    assert pass_fractions([["a", "half"], [], ["b"]], True, "recorder") == [0.5, 0.0, 1.0]
    assert recorder.seen == [(f"{name}\n1.0\n", "python") for name in ("a", "half", "b")]
    assert get_provider(recorder) is recorder
