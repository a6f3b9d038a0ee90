import os
import subprocess
import sys

from helpers_inside import in_child

from trl_dllm.sandbox import launch
from trl_dllm.sandbox.inside import launcher
from trl_dllm.sandbox.inside.request import UNAVAILABLE, Limits, Report, Request, Unavailable, read_report
from trl_dllm.sandbox.inside.wire import decode, encode


LIMITS = Limits(5.0, 1 << 29, 1 << 20, 1 << 20, 8, 100)


def request(kind, runner="script"):
    return Request(kind, runner, ["x = 1"], "", LIMITS, 0, sys.executable, "", os.getpid())


def start(monkeypatch, runs, kinds):
    """Reports of requests to kinds that are stand-ins, as the launcher's main function writes them."""

    def child():
        reading, writing = os.pipe()
        reports = os.pipe()
        os.write(writing, encode([request(kind)._replace(parent=os.getppid()) for kind in runs]))
        os.close(writing)
        launcher.KINDS = kinds
        with open(reading) as sys.stdin, open(reports[1], "w") as sys.stdout:
            launcher.main()
        with open(reports[0], "rb") as file:
            return [Report(*fields) for fields in decode(file.read())]

    status, text = in_child(child)
    assert status == 0, text
    return eval(text, {"Report": Report})


def say(asked):
    return Report("passed", str(len(asked.channel)), "", 0.0)


def lacking(asked):
    raise Unavailable("not here")


def dying(asked):
    os._exit(1)


def test_reports_in_the_order_of_the_requests(monkeypatch):
    kinds = {"one": lambda asked: Report("passed", "1", "", 0.0), "two": lambda asked: Report("failed", "2", "", 0.0)}
    assert [report.stdout for report in start(monkeypatch, ["one", "two"], kinds)] == ["1", "2"]
    assert start(monkeypatch, ["one"], kinds) == [Report("passed", "1", "", 0.0)]


def test_what_cannot_be_made_says_so(monkeypatch):
    kinds = {"lacking": lacking, "dying": dying}
    reports = start(monkeypatch, ["lacking", "dying"], kinds)
    assert [report.reason for report in reports] == [UNAVAILABLE, UNAVAILABLE]
    assert reports[0].stderr == "not here" and "without a report" in reports[1].stderr


def test_two_requests_have_a_channel(monkeypatch):
    def first(asked):
        os.write(asked.channel[1], b"hello")
        os.close(asked.channel[1])
        return Report("passed", os.read(asked.channel[0], 10).decode(), "", 0.0)

    def second(asked):
        found = os.read(asked.channel[0], 10)
        os.write(asked.channel[1], found.upper())
        # No copy of the other's end is left anywhere, so that the channel ends when that process does.
        return Report("passed", f"{found.decode()} {os.read(asked.channel[0], 10)!r}", "", 0.0)

    reports = start(monkeypatch, ["first", "second"], {"first": first, "second": second})
    assert [report.stdout for report in reports] == ["HELLO", "hello b''"]
    assert start(monkeypatch, ["say"], {"say": say})[0].stdout == "0"


def test_a_caller_that_is_gone_gets_nothing():
    orphan = request("uid")._replace(parent=1)
    command = [sys.executable, "-I", "-S", "-c", launch.START, os.path.dirname(launch.__file__)]
    found = subprocess.run(command, input=encode([orphan]), capture_output=True, check=True)
    assert found.stdout == b"" and found.stderr == b""


def test_a_process_of_its_own():
    def child():
        launcher.KINDS = {"own": lambda asked: Report("passed", str(asked.parent == os.getppid()), "", 0.0)}
        return read_report(launcher.start(request("own"), []))

    assert in_child(child) == (0, "Report(reason='passed', stdout='True', stderr='', seconds=0.0)")
