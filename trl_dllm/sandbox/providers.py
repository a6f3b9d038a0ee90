"""Where scripts run: here, or with a provider of the user's; and the consent that running them needs."""

import difflib
import os
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from .run import run_many


ALLOW_VARIABLE = "TRL_DLLM_ALLOW_CODE_EXECUTION"


@runtime_checkable
class CodeExecutionProvider(Protocol):
    """
    Where scripts run; the interface of open-r1's providers, so that those for E2B, Morph or Piston fit.

    `execute_scripts` takes scripts and the language of each, and returns a number for each: what its last line, an
    expression, evaluates to, 0.0 if the script fails before. (The scripts of this library end in the line `1.0`.)
    """

    def execute_scripts(self, scripts: list[str], languages: list[str]) -> list[float]: ...


class LocalProvider:
    """
    Scripts in the local sandbox: 1.0 for one that runs to its last line, else 0.0.

    Args:
        num_workers: scripts at a time, as many as there are CPUs by default.
        limits: arguments of `run_program`, such as `timeout`.
    """

    def __init__(self, num_workers: int | None = None, **limits):
        self.num_workers = num_workers
        self.limits = limits

    def execute_scripts(self, scripts: list[str], languages: list[str]) -> list[float]:
        """Raises `ValueError` for any language but "python", and `SandboxUnavailable`."""
        if len(scripts) != len(languages):
            raise ValueError(f"{len(scripts)} scripts have {len(languages)} languages.")
        for language in languages:
            if language != "python":
                raise ValueError(f"the local provider runs 'python' only, got {language!r}.")
        return [float(result.passed) for result in run_many(scripts, num_workers=self.num_workers, **self.limits)]


PROVIDERS: dict[str, Callable[..., CodeExecutionProvider]] = {"local": LocalProvider}


def register_provider(name: str, factory: Callable[..., CodeExecutionProvider]) -> None:
    """Make `get_provider(name)` call `factory`; a name that is taken is replaced."""
    PROVIDERS[name] = factory


def get_provider(name: str | CodeExecutionProvider = "local", **kwargs) -> CodeExecutionProvider:
    """The provider of that name, made with `kwargs`; a provider is returned as it is. `ValueError` for other names."""
    if not isinstance(name, str):
        if not isinstance(name, CodeExecutionProvider):
            raise ValueError(f"a provider needs a method execute_scripts(scripts, languages), {name!r} has none.")
        return name
    if name not in PROVIDERS:
        nearest = difflib.get_close_matches(name, PROVIDERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown provider {name!r}: did you mean {nearest!r}? Known: {', '.join(sorted(PROVIDERS))}."
        )
    return PROVIDERS[name](**kwargs)


def check_allowed(allow_code_execution: bool | None) -> None:
    """Raise `PermissionError` unless running generated programs was asked for, by argument or by environment."""
    if allow_code_execution is None:
        allow_code_execution = os.environ.get(ALLOW_VARIABLE) == "1"
    if not allow_code_execution:
        raise PermissionError(
            f"This reward or score runs programs that a model wrote. Pass allow_code_execution=True or set "
            f"{ALLOW_VARIABLE}=1 to allow it. They run in a sandbox without network, environment, files or time to "
            "spare, which does not protect from bugs in the kernel: keep secrets off the machine all the same."
        )


def pass_fractions(
    suites: Sequence[Sequence[str]], allow_code_execution: bool | None, provider: str | CodeExecutionProvider
) -> list[float]:
    """
    The fraction of each suite's programs that pass, all suites in one call of the provider; 0.0 for an empty suite.

    Raises `PermissionError` if not allowed; a provider's own errors pass through.
    """
    check_allowed(allow_code_execution)
    scripts = [f"{program}\n1.0\n" for suite in suites for program in suite]
    values = get_provider(provider).execute_scripts(scripts, ["python"] * len(scripts)) if scripts else []
    if len(values) != len(scripts):
        raise ValueError(f"the provider returned {len(values)} values for {len(scripts)} scripts.")
    fractions, start = [], 0
    for suite in suites:
        part = values[start : start + len(suite)]
        start += len(suite)
        fractions.append(sum(value == 1.0 for value in part) / len(part) if part else 0.0)
    return fractions
