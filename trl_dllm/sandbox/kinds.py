"""Which kinds of sandbox work here."""

import functools
import os
import platform
import shutil

from .inside.request import Limits
from .launch import Run, SandboxUnavailable, launch


SANDBOXES = ("bubblewrap", "namespaces", "uid")  # the best first
LIMITS_OF_A_TRY = Limits(20.0, 512 * 2**20, 2**20, 2**20, 64, 2**10)


def choose_sandbox(sandbox: str = "auto") -> str:
    """
    The kind that will be used: for "auto" the first of bubblewrap, namespaces and (as root) uid that works here.

    Each kind is tried with an empty program once a process. Raises `SandboxUnavailable`, saying what each one lacks,
    and `ValueError` for an unknown kind.
    """
    if sandbox != "auto" and sandbox not in SANDBOXES:
        raise ValueError(f"sandbox must be 'auto' or one of {SANDBOXES}, got {sandbox!r}.")
    problems = []
    for kind in SANDBOXES if sandbox == "auto" else (sandbox,):
        problem = _problem(kind, os.geteuid() if hasattr(os, "geteuid") else -1, os.environ.get("PATH", ""))
        if problem is None:
            return kind
        problems.append(f"{kind}: {problem}")
    raise SandboxUnavailable(
        "Generated programs run in a sandbox or not at all, and none works here: "
        + "; ".join(problems)
        + ". Install bubblewrap, allow unprivileged user namespaces, or use another provider (register_provider)."
    )


@functools.cache
def _problem(kind: str, user: int, path: str) -> str | None:
    """What keeps this kind from working for this user and PATH, None if it works."""
    if platform.system() != "Linux":
        return "needs Linux"
    if kind == "bubblewrap" and shutil.which("bwrap", path=path) is None:
        return "bwrap is not installed"
    if kind == "uid" and user != 0:
        return "another user id needs root"
    return problem_now(kind)


def problem_now(kind: str) -> str | None:
    """What keeps an empty program from running in this kind now, None if it runs."""
    try:
        reports = launch(kind, LIMITS_OF_A_TRY, [Run("script", ["x = 1"])])
    except SandboxUnavailable as error:
        return str(error)
    if reports is None:
        return "it takes too long"
    report = reports[0]
    if report.reason == "passed":
        return None
    return f"an empty program ended with {report.reason!r} {report.stderr[-500:]}".strip()
