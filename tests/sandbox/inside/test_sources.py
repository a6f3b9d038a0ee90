from pathlib import Path

from trl_dllm.sandbox import inside
from trl_dllm.sandbox.inside.sources import SOURCES


def test_every_module_of_the_package():
    files = Path(inside.__file__).parent.glob("*.py")
    assert {path.stem: path.read_text() for path in files} == SOURCES
