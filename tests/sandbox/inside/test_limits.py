import resource

from helpers_inside import in_child

from trl_dllm.sandbox.inside.limits import OPEN_FILES, limit, limit_this_process
from trl_dllm.sandbox.inside.request import Limits


def test_limits_of_a_process():
    def child():
        limit_this_process(Limits(2.5, 1 << 33, 1 << 20, 1 << 21, 8, 100))
        names = ("CPU", "AS", "FSIZE", "NOFILE", "CORE", "MEMLOCK", "RTPRIO", "SIGPENDING")
        return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}

    status, text = in_child(child)
    assert status == 0, text
    found = eval(text)
    assert found["CPU"] == (4, 5) and found["AS"] == (1 << 33, 1 << 33) and found["FSIZE"] == (1 << 20, 1 << 20)
    assert found["NOFILE"] == (OPEN_FILES, OPEN_FILES) and found["MEMLOCK"] == found["RTPRIO"] == (0, 0)
    assert found["CORE"] == (1, 1) and max(found["SIGPENDING"]) <= 256


def test_a_lower_limit_stays():
    def child():
        limit(resource.RLIMIT_NOFILE, 50)
        limit(resource.RLIMIT_NOFILE, 60)
        return resource.getrlimit(resource.RLIMIT_NOFILE)

    assert in_child(child) == (0, "(50, 50)")
