"""
A test, which is trusted, of a program, which is not: the two are in two sandboxes and share a channel for data.

The test's source runs here. The function that it tests is a stand-in: it sends its arguments to the program's process
(`candidate`) and gives back what comes as an answer, decoded by `wire`. So the expected values never leave this
process, and no code of the program, no `__eq__` and no `__hash__`, ever enters it.
"""

import builtins
import os
import sys
import traceback
from typing import Any

from .wire import READ_FROM, WRITE_TO, Closed, WireError, decode, encode, receive, send


PASSED, FAILED = 0, 1
VERDICT = 3


class CandidateError(Exception):
    """The program raised an exception that is not a built-in one."""


class StandIn:
    """Called like the program's function."""

    def __init__(self) -> None:
        self.number = 0

    def wait(self) -> None:
        """Return when the program's source has run to its end."""
        if decode(receive(READ_FROM)) != "ready":
            raise WireError("the program answered before it was called")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.number += 1
        send(WRITE_TO, encode((self.number, arguments, keywords), strict=True))
        reply = decode(receive(READ_FROM))
        number, outcome, *content = reply if type(reply) is tuple and len(reply) >= 3 else (0, "")
        if type(number) is not int or number != self.number or type(outcome) is not str:
            raise WireError("the program answered something else than its call")
        if outcome == "value" and len(content) == 1:
            return content[0]
        if outcome == "raised" and [type(part) for part in content] == [str, str]:
            raise exception(*content)
        raise WireError("the program answered neither with a value nor with an exception")


def exception(name: str, text: str) -> Exception:
    """
    An exception of the built-in class `name`, if it is one that nothing but `except` catches: no exit, no other
    `BaseException`, and no end of an iteration, which would end a loop of the test over calls before it has compared.
    """
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (StopIteration, StopAsyncIteration):
        try:
            return kind(text)
        except TypeError:  # it needs other arguments
            pass
    return CandidateError(f"{name}: {text}")


def start(nonce: bytes, setup: str, test: str, entry_point: str) -> None:
    """Run the setup and the test with the stand-in as `entry_point`; send the nonce if no exception comes of it."""
    status = FAILED
    try:
        stand_in = StandIn()
        names: dict[str, Any] = {"__name__": "test", "__builtins__": builtins}
        exec(compile(setup, "setup.py", "exec"), names)
        names[entry_point] = stand_in
        stand_in.wait()
        exec(compile(test, "test.py", "exec"), names)
        os.write(VERDICT, nonce)
        status = PASSED
    except Closed:
        sys.stderr.write("the program ended before its test did\n")
    except BaseException:
        traceback.print_exc(limit=-3)
    sys.stderr.flush()
    os._exit(status)
