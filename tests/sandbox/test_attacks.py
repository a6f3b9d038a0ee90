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

import trl_dllm.sandbox
from trl_dllm.sandbox import SANDBOXES


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
PACKAGE = Path(trl_dllm.sandbox.__file__).parent
NOBODY = 65534
SECRET = "TRL_DLLM_TEST_SECRET_7f3a"
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


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
def attacked(request, tmp_path_factory, sandbox):
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
        shutil.copytree(PACKAGE, copied / "sandbox")
        shutil.copy(attacks.__file__, copied)
        for path in (copied, *copied.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.01)
            programs = {f"control: {name}": code for name, code in attacks.CONTROLS.items()}
            for name, code in attacks.ATTACKS.items():
                programs[name] = code.replace("@SECRET@", SECRET).replace("@FILE@", str(folder / "secret.txt"))
                programs[name] = programs[name].replace("@PORT@", str(server.getsockname()[1]))
            programs["control: afterwards"] = "print('still here')"
            task = {
                "programs": programs,
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
