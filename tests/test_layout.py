"""Where things are: each module of the package has a test file of its name, at the mirrored place."""

from fnmatch import fnmatch
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "trl_dllm"

# Modules without a test file of their name, and why.
EXCEPTIONS = {
    "__init__.py": "names only: test_package.py",
    "*/__init__.py": "names only: the tests import them",
    "_version.py": "one number",
    "sandbox/__main__.py": "sandbox/test_run.py",
    "sandbox/inside/*": "runs within the sandbox: sandbox/test_run.py, sandbox/test_attacks.py",
    "scripts/demo.py": "runs for a minute: `make demo`",
    "scripts/*": "test_cli.py runs each",
}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_each_module_has_a_test_file_of_its_name(module):
    """`trl_dllm/likelihood/score.py` is tested in `tests/likelihood/test_score.py`."""
    mirrored = TESTS / module.with_name(f"test_{module.name}")
    if not any(fnmatch(str(module), pattern) for pattern in EXCEPTIONS):
        assert mirrored.is_file(), f"trl_dllm/{module} needs {mirrored.relative_to(TESTS.parent)}"
