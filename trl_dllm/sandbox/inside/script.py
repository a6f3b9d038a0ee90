"""A program that is run as a whole, with its tests at its end if it has any."""

import os

from .main import _flushes, leave, leaving_on_errors, run_as_main


def start(nonce: bytes, source: str) -> None:
    """Only where the source ends by itself is the nonce sent: nothing printed, and no exit status, can say that."""
    run_as_main(source)
    with leaving_on_errors():
        _flushes[0]()
        os.fstat(1)  # a program that closed its output has not shown it
    leave(0, nonce)
