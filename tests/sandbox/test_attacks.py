"""
Attacks, and wrong and right programs, in each kind of sandbox, as root and as an ordinary user.

All of them, and how many there were: `pytest tests/sandbox/test_attacks.py -m "slow or not slow" -s`.
"""

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
import wrong_programs
from helpers_users import NOBODY, drop_to_nobody, reachable_interpreter

import trl_dllm.sandbox
from trl_dllm.sandbox import SANDBOXES, Trial


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
PACKAGE = Path(trl_dllm.sandbox.__file__).parent
SECRET = "TRL_DLLM_TEST_SECRET_7f3a"
MARGIN_OF_A_CORE = 64 << 20  # bytes that may be taken between two looks, as `sandbox` states it
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


# The kind that most machines use, for the user with whom it is harder to get right, is tried every time with all
# programs; for the caller with a few; everything else by the slow tests.
ORDINARY = "nobody" if AS_ROOT else "caller"
REASONS = {
    "endless loop": {"timeout"},
    "endless sleep": {"timeout"},
    "memory of many": {"memory"},
    "stubborn fork bomb": {"timeout"},
    "8 GiB": {"failed"},
    "10 GiB file": {"failed"},
    "open a socket": {"failed"},
    "kill parent": {"failed"},
    "daemonised grandchild": {"left processes"},
    "close stdout": {"failed"},
    "exit 0": {"exited early"},
    "_exit 0": {"exited early"},
    "forged verdict": {"exited early"},
    "crash": {"killed by signal 11"},
    "forged success": {"failed"},
}
FEW = {
    *REASONS,
    "shared memory, all but a page unmapped",
    "private memory of many",
    "unlinked files",
    *wrong_programs.SEVEN,
}
RUNS = [
    pytest.param(("caller", "namespaces", FEW), id="caller-namespaces-few"),
    *(
        pytest.param(
            (user, kind, None),
            id=f"{user}-{kind}",
            marks=[] if (user, kind) == (ORDINARY, "namespaces") else pytest.mark.slow,
        )
        for user in ("caller", "nobody")
        for kind in SANDBOXES
    ),
]


@pytest.fixture(scope="module", params=RUNS)
def attacked(request, tmp_path_factory, sandbox):
    """Results by program of all attacks and controls, run by a driver process as one user in one kind of sandbox."""
    user, kind, names = request.param
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
    copied = Path("/tmp") / f"test-trl-dllm-{os.getpid()}-{user}-{kind}"  # the checkout may be closed to others too
    copied.mkdir()
    try:
        shutil.copytree(PACKAGE, copied / "sandbox")
        for module in (attacks, wrong_programs):
            shutil.copy(module.__file__, copied)
        for path in (copied, *copied.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.01)
            programs = {f"control: {name}": code for name, code in attacks.CONTROLS.items()}
            for name, code in attacks.PROGRAMS.items():
                if names is not None and name not in names:
                    continue
                programs[name] = code.replace("@SECRET@", SECRET).replace("@FILE@", str(folder / "secret.txt"))
                programs[name] = programs[name].replace("@PORT@", str(server.getsockname()[1]))
            programs["control: afterwards"] = "print('still here')"
            trials = [name for name in wrong_programs.trials(Trial) if names is None or name in names]
            task = {"programs": programs, "trials": trials, "interpreter": interpreter}
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
    counts = [len(of(answer, group)) for group in (attacks.PROGRAMS, wrong_programs.WRONG)]
    counts.append(len(answer["results"]) - sum(counts))
    print("\n{}, {}: {} attacks, {} wrong programs, {} right ones and controls".format(user, kind, *counts), end=" ")
    return answer


def of(attacked, names):
    """Results of those of the programs that were run."""
    return {name: attacked["results"][name] for name in names if name in attacked["results"]}


def test_there_are_a_hundred_of_each():
    assert len(attacks.PROGRAMS) >= 100 and len(wrong_programs.WRONG) >= 90


def test_attacks_cost_one_failed_test_each(attacked):
    wrong = {}
    for name, result in of(attacked, attacks.PROGRAMS).items():
        if result["passed"] or result["wall"] > 30:
            wrong[name] = (result["reason"], result["wall"], result["stderr"][-300:])
    assert not wrong
    assert {
        name: result["reason"]
        for name, result in of(attacked, REASONS).items()
        if result["reason"] not in REASONS[name]
    } == {}


def test_nothing_is_left_in_temporary_folders(attacked):
    assert attacked["left"] == []


def test_memory_stays_within_its_limit(attacked):
    margin = MARGIN_OF_A_CORE * (os.cpu_count() or 1)
    results = of(attacked, attacks.MEMORY_ATTACKS)
    peaks = {name: result["peak"] >> 20 for name, result in results.items()}
    assert max(peaks.values()) > 100, "nothing was measured"
    assert not {name: peak for name, peak in peaks.items() if peak << 20 > attacks.MEMORY_LIMIT + margin}, peaks
    reasons = {name: result["reason"] for name, result in results.items()}
    # "disk": too many mappings to see whether deleted files are among them.
    assert {reasons.pop("mappings of many", "memory")} <= {"memory", "disk"}
    assert set(reasons.values()) <= {"memory", "failed", "killed by signal 9"}, reasons


def test_files_stay_within_their_limit(attacked):
    reasons = {name: result["reason"] for name, result in of(attacked, attacks.FILE_ATTACKS).items()}
    assert set(reasons.values()) <= {"disk", "failed"}, reasons


def test_no_wrong_program_passes(attacked):
    judged = of(attacked, wrong_programs.WRONG)
    assert not {name: result for name, result in judged.items() if result["passed"] or result["wall"] > 30}
    assert {result["judged"] for result in judged.values()} == {"outside"}


def test_right_programs_pass(attacked):
    judged = of(attacked, set(wrong_programs.trials(Trial)) - set(wrong_programs.WRONG))
    assert not {name: result for name, result in judged.items() if not result["passed"]}
    for name, result in judged.items():
        assert result["judged"] == ("inside" if name.startswith("inside: ") else "outside"), name


def test_controls_pass(attacked):
    results = {name: result for name, result in attacked["results"].items() if name.startswith("control: ")}
    assert not {name: result for name, result in results.items() if not result["passed"]}
    assert results["control: plain"]["stdout"] == "45\n" and results["control: afterwards"]["stdout"] == "still here\n"
