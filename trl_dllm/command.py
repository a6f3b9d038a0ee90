"""How a command ends when something is wrong: one line and exit code 2; the traceback where `--debug` asks for it."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .fingerprint import OtherSettings


_WAIT = 10  # seconds that process 0 has to say what went wrong


class Ended(SystemExit):
    """The end of a command that has said why: `str` of it is the line, `code` what the shell gets."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


class Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong with an argument, where argparse prints every flag and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def count(text: str) -> int:
    """A whole number of at least 1, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def run_script(prog: str, make_parser: Callable[[str], Any], main: Callable[..., Any], argv: list[str]) -> None:
    """Parse the arguments of a script, `--debug` among them, and run it. What goes wrong ends it with one line."""
    argv, debug = take_debug(argv)
    with one_line(prog, debug):
        parser = make_parser(prog)
        recipe = hasattr(parser, "parse_args_and_config")
        main(*parser.parse_args_and_config(argv) if recipe else [parser.parse_args(argv)])
        if torch := sys.modules.get("torch"):
            leave_group(torch.distributed)


def leave_group(distributed: Any) -> None:
    """Leave the processes of a launch: one that ends among them may abort in gloo's threads, and end the others."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether it was among them.

    `--debug underflow_overflow` is a flag of transformers' and stays.
    """
    theirs = ("underflow_overflow", "tpu_metrics_debug")
    ours = [i for i, word in enumerate(argv) if word == "--debug" and argv[i + 1 : i + 2] not in [[t] for t in theirs]]
    return [word for i, word in enumerate(argv) if i not in ours], bool(ours)


@contextmanager
def one_line(prog: str, debug: bool = False) -> Iterator[None]:
    """End the process with one line on standard error, where the block raises; with `debug` the error goes on.

    A value to mend, a missing file or package, or numbers that are not finite end it with what the error says and exit
    code 2. Anything else is a bug, ours or a reward function's: it is named with its place, and the exit code is 1.
    """
    from .sandbox import SandboxUnavailable

    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        raise Ended(f"{prog}: interrupted", 130) from None
    except OtherSettings as error:
        if debug:
            raise
        raise _ended(f"{prog}: {error}", 2) from error  # with its table
    except (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError, SandboxUnavailable) as error:
        if debug:
            raise
        raise _ended(f"{prog}: {_flat(error)}", 2) from error
    except Exception as error:
        if debug:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {_flat(error)}"
        raise _ended(f"{prog}: unexpected {what}; run again with --debug for the traceback", 1) from error


def _flat(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _ended(line: str, code: int) -> Ended:
    """Say why, in one of the processes.

    Process 0 speaks for all: most errors are everybody's. Another one waits first; if process 0 fails too, the
    launcher ends this one meanwhile, and if not, the error is its own.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_WAIT)
        line = f"[process {rank}] {line}"
    print(line, file=sys.stderr, flush=True)
    return Ended(line, code)
