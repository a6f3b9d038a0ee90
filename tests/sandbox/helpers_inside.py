"""Code that changes the process it runs in, run in a child of the test."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from helpers_users import reachable_interpreter

import trl_dllm.sandbox


def in_child(function, *arguments):
    """(exit status, what it returns as a text) of a function in a forked process; status 99 for an exception."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            text = str(function(*arguments))
            status = 0
        except BaseException:
            text = traceback.format_exc()
        os.write(writing, text.encode()[-60_000:])
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


# A caller in a process of its own, which is then killed, or whose launcher is made to lack something.
CALLER = """
import sys
sys.path.insert(0, sys.argv[1])
import sandbox
from sandbox import launch
if sys.argv[2]:
    launch.interpreter = lambda: sys.argv[2]
print(sandbox.choose_sandbox(sys.argv[3]), flush=True)
launch.START = sys.argv[4] + launch.START
print(sandbox.run_program(sys.argv[5], sandbox=sys.argv[3], timeout=20))
"""


def start_caller(kind, code, patch=""):
    """The process, at work on `code`; `patch` is run in the launcher before anything else."""
    package = str(Path(trl_dllm.sandbox.__file__).parents[1])
    python = "" if kind == "namespaces" else reachable_interpreter() or ""
    command = [sys.executable, "-c", CALLER, package, python, kind, patch, code]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if caller.stdout.readline() != f"{kind}\n":
        pytest.skip(f"the kind {kind!r} does not work here: {caller.communicate()[1][-300:]}")
    return caller
