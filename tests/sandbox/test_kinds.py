import os
import shutil

import pytest

from trl_dllm.sandbox import SANDBOXES, SandboxUnavailable, choose_sandbox, kinds
from trl_dllm.sandbox.inside.request import Report


@pytest.fixture(autouse=True)
def forget():
    kinds._problem.cache_clear()
    yield
    kinds._problem.cache_clear()


def test_the_first_that_works(monkeypatch):
    monkeypatch.setattr(kinds, "_problem", lambda kind, user, path: None if kind != "bubblewrap" else "no")
    assert choose_sandbox() == "namespaces" and choose_sandbox("uid") == "uid"
    with pytest.raises(SandboxUnavailable, match=r"none works here: bubblewrap: no\. Install bubblewrap"):
        choose_sandbox("bubblewrap")


def test_what_each_kind_lacks(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(kinds, "launch", lambda *_: [Report("failed", "", "no such thing", 0.0)])
    message = (
        "bubblewrap: bwrap is not installed; namespaces: an empty program ended with 'failed' no such thing; "
        "uid: another user id needs root"
    )
    with pytest.raises(SandboxUnavailable, match=message):
        choose_sandbox()


def test_each_kind_is_tried_once(monkeypatch):
    tried = []

    def launch(kind, limits, runs):
        tried.append(kind)
        return [Report("passed", "", "", 0.0)]

    monkeypatch.setattr(kinds, "launch", launch)
    assert [choose_sandbox("namespaces") for _ in range(3)] == ["namespaces"] * 3 and tried == ["namespaces"]


def test_a_launcher_that_never_ends(monkeypatch):
    monkeypatch.setattr(kinds, "launch", lambda *_: None)
    with pytest.raises(SandboxUnavailable, match="it takes too long"):
        choose_sandbox("namespaces")


def test_other_systems_and_names(monkeypatch):
    monkeypatch.setattr(kinds.platform, "system", lambda: "Darwin")
    with pytest.raises(SandboxUnavailable, match="namespaces: needs Linux"):
        choose_sandbox()
    with pytest.raises(ValueError, match="'jail'"):
        choose_sandbox("jail")
    assert len(SANDBOXES) == 3
