import os

from trl_dllm.sandbox.inside.request import UNAVAILABLE, Limits, Report, Request, read_report, write_report
from trl_dllm.sandbox.inside.wire import decode, encode


def test_a_request_that_is_sent_is_the_same():
    limits = Limits(1.5, 1 << 40, 2, 3, 4, 5)
    request = Request("uid", "judge", ["a", "\ud800"], "in", limits, 1, "python", "", 7, "/tmp/x", (3, 4))
    found = Request.of(decode(encode(request)))
    assert found == request and found.limits.memory_bytes == 1 << 40 and found.channel == (3, 4)


def test_reports_through_a_pipe():
    reading, writing = os.pipe()
    report = Report("failed", "out", "err\ud800", 0.5)
    write_report(writing, report)
    assert read_report(reading) == report
    reading, writing = os.pipe()
    os.close(writing)  # its process has ended
    assert read_report(reading).reason == UNAVAILABLE
