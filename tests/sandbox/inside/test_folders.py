import os

import pytest

from trl_dllm.sandbox.inside.folders import remove_folder


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def nest(folder, levels, name="d"):
    """Folders in each other, deeper than any path may be long."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


@pytest.mark.parametrize("levels, name", [(1500, "d"), (100, "d" * 255), (3, "d")])
def test_deep_folders(work, levels, name):
    nest(work, levels, name)
    remove_folder(str(work))
    assert not work.exists()


def test_wide_folders(work):
    for i in range(20):
        for j in range(5):
            (work / f"a{i}" / f"b{j}").mkdir(parents=True)
            (work / f"a{i}" / f"b{j}" / "file").write_text("x")
    remove_folder(str(work))
    assert not work.exists()


def test_permissions(work):
    (work / "a" / "b").mkdir(parents=True)
    (work / "a" / "b" / "file").write_text("x")
    for path in (work / "a" / "b" / "file", work / "a" / "b", work / "a", work):
        path.chmod(0)
    remove_folder(str(work))
    assert not work.exists()


def test_links_are_removed_and_not_followed(work, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (work / "folder").symlink_to(outside)
    (work / "file").symlink_to(outside / "kept")
    (work / "self").symlink_to("self")
    os.link(outside / "kept", work / "hard")
    remove_folder(str(work))
    assert not work.exists() and (outside / "kept").read_text() == "x"
    work.symlink_to(outside)
    remove_folder(str(work))
    assert not work.is_symlink() and (outside / "kept").exists()


def test_strange_entries(work):
    for name in (b"\n", b"\xff\xfe", b"-rf", b"x" * 255):
        open(os.path.join(os.fsencode(work), name), "w").close()
    os.mkfifo(work / "pipe")
    remove_folder(str(work))
    assert not work.exists()


def test_a_file_or_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    remove_folder(str(tmp_path / "file"))
    remove_folder(str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_raises_nothing(work, monkeypatch):
    (work / "file").write_text("x")

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refuse)
    remove_folder(str(work))
    assert work.exists()
