import os

import pytest
from helpers_inside import in_child

from trl_dllm.sandbox.inside import main
from trl_dllm.sandbox.inside.main import EXITED_EARLY, FAILED, leave, run_as_main


def test_names_of_the_source():
    status, text = in_child(lambda: run_as_main("import sys\nx = __name__, sys.argv")["x"])
    assert (status, text) == (0, "('__main__', ['main.py'])")


@pytest.mark.parametrize(
    "source, status",
    [
        ("raise ValueError", FAILED),
        ("def", FAILED),
        ("\0", FAILED),
        ("raise SystemExit(0)", EXITED_EARLY),
        ("import sys; sys.exit('no')", EXITED_EARLY),
        ("import os; os._exit(0)", 0),
    ],
)
def test_ends_of_the_process(source, status, capfd):
    assert in_child(run_as_main, source) == (status, "")
    assert ("Error" in capfd.readouterr().err) == (status == FAILED)


def test_the_nonce_is_sent_by_the_process_that_was_started():
    def child(fork):
        reading, writing = os.pipe()
        os.dup2(writing, main.VERDICT)
        os.close(writing)
        main._pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            if fork and os.fork():
                os.wait()
                os._exit(0)
            main._pid = os.getpid() if not fork else main._pid
            leave(0, b"nonce")
        os.waitpid(pid, 0)
        os.close(main.VERDICT)
        return os.read(reading, 100)

    assert in_child(child, False) == (0, "b'nonce'")
    assert in_child(child, True) == (0, "b''")
