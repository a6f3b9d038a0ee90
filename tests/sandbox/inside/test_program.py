import marshal

import pytest

from trl_dllm.sandbox.inside.program import MODULES, payload
from trl_dllm.sandbox.inside.request import Limits, Request
from trl_dllm.sandbox.inside.sources import SOURCES


REQUEST = Request("uid", "judge", ["setup", "test", "f"], "", Limits(1.0, 1, 1, 1, 1, 1), 0, "python", "", 1)


@pytest.mark.parametrize("runner", MODULES)
def test_payload(runner):
    modules, arguments = marshal.loads(payload(REQUEST._replace(runner=runner), b"nonce"))
    assert arguments == [b"nonce", "setup", "test", "f"]
    assert [name for name, _ in modules][-1] == runner and all(SOURCES[name] == source for name, source in modules)
    # Each module comes behind those that it needs, and needs nothing else of this package.
    seen = set()
    for name, source in modules:
        needed = {line.split()[1][1:] for line in source.splitlines() if line.startswith("from .")}
        assert needed <= seen, (name, needed)
        seen.add(name)


def test_the_judge_has_nothing_of_the_candidate_and_the_candidate_nothing_of_the_test():
    assert "candidate" not in MODULES["judge"] and "judge" not in MODULES["candidate"]
