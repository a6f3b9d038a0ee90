import pytest

from trl_dllm.sandbox import SandboxUnavailable, launch
from trl_dllm.sandbox.inside.request import Limits
from trl_dllm.sandbox.launch import Run


LIMITS = Limits(5.0, 1 << 29, 1 << 20, 1 << 20, 8, 100)
RUN = Run("script", ["x = 1"])


def test_reports(sandbox):
    (report,) = launch.launch(sandbox, LIMITS, [Run("script", ["print(input())"], "hello")])
    assert report.reason == "passed" and report.stdout == "hello\n"
    runs = [Run("candidate", ["def f(): return 3", "f"]), Run("judge", ["", "assert f() == 3", "f"])]
    assert [report.reason for report in launch.launch(sandbox, LIMITS, runs)] == ["passed", "passed"]
    runs[1].arguments[1] = "assert f() == 4"
    assert [report.reason for report in launch.launch(sandbox, LIMITS, runs)] == ["passed", "failed"]


@pytest.mark.parametrize(
    "start, message",
    [
        ("raise OSError('no such thing')", "without a report.*no such thing"),
        ("print('nonsense')", "without a report"),
        ("import os; os._exit(0)", "without a report"),
    ],
)
def test_a_launcher_that_fails(monkeypatch, start, message):
    monkeypatch.setattr(launch, "START", start)
    with pytest.raises(SandboxUnavailable, match=f"(?s){message}"):
        launch.launch("namespaces", LIMITS, [RUN])


def test_a_launcher_that_never_ends(monkeypatch):
    monkeypatch.setattr(launch, "START", "import time; time.sleep(60)")
    monkeypatch.setattr(launch, "GRACE", 0.1)
    assert launch.launch("namespaces", LIMITS._replace(timeout=0.1), [RUN]) is None


def test_only_the_kind_uid_works_in_this_file_system():
    requests = launch._requests("uid", LIMITS, [RUN, RUN._replace(runner="judge")])
    folders = [request.work for request in requests]
    assert len(set(folders)) == 2 and all("/trl-dllm-" in folder for folder in folders)
    assert [request.work for request in launch._requests("namespaces", LIMITS, [RUN])] == ["/work"]


def test_the_interpreter_behind_a_virtual_environment():
    assert launch.interpreter() and ".venv" not in launch.interpreter()
