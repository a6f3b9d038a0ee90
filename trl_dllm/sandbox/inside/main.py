"""Running an untrusted source as `__main__`, in its own process, and that process's end."""

import contextlib
import os
import sys
import types


EXITED_EARLY, FAILED = 120, 1  # statuses of the process
VERDICT = 3  # the descriptor for the nonce that says "to the last line"

_write, _leave, _getpid, _pid = os.write, os._exit, os.getpid, os.getpid()
_flushes = [sys.stdout.flush, sys.stderr.flush]


def run_as_main(source: str) -> dict:
    """The names that the source leaves behind. Where it does not get to its end, neither does this process."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = ["main.py"]
    with leaving_on_errors():
        exec(compile(source, "main.py", "exec"), main.__dict__)
    return main.__dict__


@contextlib.contextmanager
def leaving_on_errors():
    """End this process, saying why on stderr, on any exception of the block."""
    try:
        yield
    except SystemExit as error:
        with contextlib.suppress(BaseException):
            sys.stderr.write(f"SystemExit: {error.code}\n")
        leave(EXITED_EARLY)
    except BaseException:
        with contextlib.suppress(BaseException):
            import traceback

            traceback.print_exc(limit=-20)
        leave(FAILED)


def leave(status: int, nonce: bytes = b"") -> None:
    """End this process, after what it has printed is out; with the nonce only if it is the one that was started."""
    for flush in _flushes:
        with contextlib.suppress(BaseException):
            flush()
    if nonce and _getpid() == _pid:
        _write(VERDICT, nonce)
    _leave(status)
