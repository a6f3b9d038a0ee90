import os
import sys

import pytest

from trl_dllm.sandbox import run_program
from trl_dllm.sandbox.inside.files import python_paths


def test_python_s_folders_and_no_other():
    paths = python_paths()
    assert all(os.path.exists(path) for path in paths) and "/" not in paths
    assert not any(
        path == place or place.startswith(path + "/") for path in paths for place in ("/root", "/home", "/tmp")
    )
    real = os.path.realpath(sys.base_prefix)
    assert any(real == path or real.startswith(path + "/") for path in map(os.path.realpath, paths))
    links = {path for path in paths if os.path.islink(path)}
    for path in paths:
        assert not any(path.startswith(other + "/") for other in paths if other not in links)


def test_the_file_system_of_a_program(sandbox):
    if sandbox == "uid":
        pytest.skip("this kind has none of its own")
    code = (
        "import os\nprint(sorted(set(os.listdir('/')) - {'lib32', 'libx32', 'sbin'}))\n"
        "found = []\n"
        "for place in ('/usr', os.path.dirname(os.__file__)):\n"
        "    try: open(place + '/x', 'w')\n    except OSError: found.append(place)\n"
        "print(len(found), open('/dev/null').read(), len(open('/dev/urandom', 'rb').read(4)))\n"
    )
    result = run_program(code)
    assert result.passed, result.stderr
    names, rest = result.stdout.splitlines()
    assert {"dev", "proc", "usr", "work"} <= set(eval(names)) and not {"home", "tmp", "var"} & set(eval(names))
    assert rest == "2  4"
