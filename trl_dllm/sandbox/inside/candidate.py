"""
A program whose functions are called from outside: arguments come in, values go out.

Nothing of the test is in this process, and nothing that it sends is believed: see `judge`.
"""

import builtins
import contextlib

from .main import EXITED_EARLY, leave, run_as_main
from .wire import READ_FROM, WRITE_TO, Closed, decode, encode, receive, send


def start(nonce: bytes, source: str, entry_point: str) -> None:
    """Run the source, then answer calls of its function `entry_point` until there are no more."""
    names = run_as_main(source)
    send(WRITE_TO, encode("ready"))
    while True:
        try:
            number, arguments, keywords = decode(receive(READ_FROM))
        except Closed:
            leave(0, nonce)
        send(WRITE_TO, answer(number, names, entry_point, arguments, keywords))


def answer(number: int, names: dict, entry_point: str, arguments: tuple, keywords: dict) -> bytes:
    """(number, "value", value) of a call, or (number, "raised", a built-in exception, text)."""
    try:
        if entry_point not in names:
            raise NameError(f"name {entry_point!r} is not defined")
        value = names[entry_point](*arguments, **keywords)
        return encode((number, "value", value))
    except SystemExit:
        leave(EXITED_EARLY)
    except BaseException as error:
        text = ""
        with contextlib.suppress(BaseException):
            import traceback

            text = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-10))
            text = str.encode(text, "utf-8", "replace").decode()[-10_000:]
        return encode((number, "raised", _builtin_name(type(error)), text))
    raise AssertionError("leave() does not return")


def _builtin_name(kind: type) -> str:
    for base in kind.__mro__:
        if getattr(builtins, base.__name__, None) is base:
            return base.__name__
    return "Exception"
