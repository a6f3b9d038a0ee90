import os
import sys

import pytest
from helpers_inside import in_child

from trl_dllm.sandbox.inside import landlock
from trl_dllm.sandbox.inside.landlock import landlock_version, restrict_files


def can(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return False
    return True


@pytest.mark.skipif(landlock_version() == 0, reason="this kernel has no Landlock")
def test_files_are_restricted(tmp_path):
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "single").write_text("single")

    def child():
        assert restrict_files(
            [str(tmp_path / "read"), str(tmp_path / "single"), sys.base_prefix], [str(tmp_path / "write")]
        )
        found = {}
        for name in ("read", "write", "other"):
            folder = tmp_path / name
            found[name] = (
                can((folder / "file").read_text),
                can(os.listdir, folder),
                can((folder / "file").write_text, "x"),
                can((folder / "new").write_text, "x"),
                can((folder / "file").unlink),
                can((folder / "folder").mkdir),
                can(os.truncate, folder / "file", 0),
            )
        found["moved out"] = can(os.rename, tmp_path / "write" / "new", tmp_path / "other" / "new")
        found["single"] = can((tmp_path / "single").read_text), can((tmp_path / "single").write_text, "x")
        return found

    status, text = in_child(child)
    assert status == 0, text
    assert eval(text) == {
        "read": (True, True, False, False, False, False, False),
        "write": (True, True, True, True, True, True, False),  # the file is gone by then
        "other": (False,) * 7,
        "moved out": False,
        "single": (True, False),
    }


def test_without_it_nothing_happens(monkeypatch, tmp_path):
    monkeypatch.setattr(landlock, "landlock_version", lambda: 0)
    assert restrict_files([], []) is False
    (tmp_path / "file").write_text("x")


def test_rights_by_version():
    assert landlock.RIGHTS_BY_VERSION[1] == 0x1FFF and not landlock.RIGHTS_BY_VERSION[2] & landlock.TRUNCATE
    assert landlock.ALL_RIGHTS & landlock.IOCTL_DEVICE and landlock.RIGHTS_BY_VERSION[3] & landlock.TRUNCATE
