import marshal
import os
import subprocess
import sys

from trl_dllm.sandbox.inside.sources import SOURCES


def test_modules_are_made_of_what_comes_through_the_descriptor():
    modules = [
        ("one", "value = 3"),
        ("two", "from .one import value\ndef start(*given): print(__name__, value, given)"),
    ]
    reading, writing = os.pipe()
    os.write(writing, marshal.dumps((modules, [b"nonce", "text"])))
    os.close(writing)
    code = f"import os; os.dup2({reading}, 4); exec({SOURCES['boot']!r})"
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], pass_fds=[reading], capture_output=True, text=True, check=True
    )
    os.close(reading)
    assert found.stdout == "inside.two 3 (b'nonce', 'text')\n" and found.stderr == ""
