import pytest

from trl_dllm.sandbox import run_program


pytestmark = pytest.mark.usefixtures("sandbox")


@pytest.mark.parametrize(
    "code, reason",
    [
        ("print('x')", "passed"),
        ("import sys; sys.stdout.close()", "failed"),
        ("import os; os.close(1)", "failed"),
        ("import sys; sys.stderr.close()", "passed"),
        ("import atexit; atexit.register(lambda: 1 / 0)", "passed"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "passed"),
        ("raise KeyboardInterrupt", "failed"),
    ],
)
def test_only_the_last_line_is_success(code, reason):
    assert run_program(code).reason == reason
