import shutil

import pytest
from helpers_inside import start_caller

from trl_dllm.sandbox.inside.bubblewrap import arguments
from trl_dllm.sandbox.inside.request import Limits


def test_arguments():
    words = arguments(Limits(1.0, 2, 3, 4096, 5, 6), [("boot", 7), ("main", 8)])
    text = " ".join(words)
    assert "--unshare-all" in words and "--cap-drop ALL" in text and "--die-with-parent" in words
    assert "--size 4096 --tmpfs /work" in text and "--dev-bind /dev/null /dev/null" in text
    assert "--ro-bind-data 7 /sandbox/inside/boot.py --ro-bind-data 8 /sandbox/inside/main.py" in text
    assert "--bind" not in words and text.endswith("--remount-ro / --chdir /")


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_only_one_folder_can_be_written_to():
    code = (
        "import os\nfound = []\n"
        "for place in ('/', '/dev', '/usr', '/sandbox', '/sandbox/inside', '/proc', '/dev/shm', '/work'):\n"
        "    try: open(f'{place}/x', 'w').close()\n    except OSError: pass\n    else: found.append(place)\n"
        "print(found, os.getppid(), 'passwd' in os.listdir('/etc'), len(os.listdir('/dev')))"
    )
    answer, _ = start_caller("bubblewrap", code).communicate()
    assert "stdout=\"['/work'] 1 False 4\\n\"" in answer
