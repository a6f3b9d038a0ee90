import errno
import os

import pytest

from trl_dllm.sandbox.inside.syscalls import PR_SET_DUMPABLE, anonymous_file, call, prctl


def test_errors_are_exceptions():
    with pytest.raises(OSError, match="umount2") as error:
        call("umount2", b"/nowhere", 0)
    assert error.value.errno in (errno.ENOENT, errno.EPERM)
    with pytest.raises(OSError):
        prctl(99_999)
    assert prctl(PR_SET_DUMPABLE + 0, 1) == 0


def test_anonymous_files():
    fd = anonymous_file(b"x" * 10**6)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == b"x" * 10**6
