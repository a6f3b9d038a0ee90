"""Where scripts run: here, or with a provider of the user's; and the consent that running them needs."""

import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .run import ExecutionResult, Trial, run_many, run_trials


ALLOW_VARIABLE = "TRL_DLLM_ALLOW_CODE_EXECUTION"


@runtime_checkable
class CodeExecutionProvider(Protocol):
    """
    Where scripts run; the interface of open-r1's providers, so that those for E2B, Morph or Piston fit.

    `execute_scripts` takes scripts and the language of each, and returns a number for each: what its last line, an
    expression, evaluates to, 0.0 if the script fails before. (The scripts of this library end in the line `1.0`.)
    """

    def execute_scripts(self, scripts: list[str], languages: list[str]) -> list[float]: ...


@runtime_checkable
class TrialProvider(Protocol):
    """A provider that can do more than run scripts: it tests a program from outside, see `run.run_trial`."""

    def run_trials(self, trials: list[Trial]) -> list[ExecutionResult]: ...


class LocalProvider:
    """
    Scripts in the local sandbox: 1.0 for one that runs to its last line, else 0.0. Trials as `run_trial` has them.

    Args:
        num_workers: scripts at a time, as many as there are CPUs by default.
        limits: arguments of `run_program`, such as `timeout`.
    """

    def __init__(self, num_workers: int | None = None, **limits: Any):
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

    def run_trials(self, trials: list[Trial]) -> list[ExecutionResult]:
        """One result for each, in their order. Raises `SandboxUnavailable`."""
        return run_trials(trials, self.num_workers, **self.limits)


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


class Suite(NamedTuple):
    """What became of several trials: how many passed, and how many were judged outside and inside the program."""

    passed: int = 0
    outside: int = 0
    inside: int = 0

    @property
    def fraction(self) -> float:
        """Of the trials that passed; 0.0 for an empty suite."""
        return self.passed / max(self.outside + self.inside, 1)


def run_suites(
    suites: Sequence[Sequence[Trial]], allow_code_execution: bool | None, provider: str | CodeExecutionProvider
) -> list[Suite]:
    """
    What becomes of each suite, all their trials in one call of the provider.

    A provider with a method `run_trials` (the local one) judges from outside where it can, others run scripts. Raises
    `PermissionError` if not allowed; a provider's own errors pass through.
    """
    check_allowed(allow_code_execution)
    trials = [trial for suite in suites for trial in suite]
    results = iter(_results(trials, get_provider(provider)) if trials else [])
    return [_summary([next(results) for _ in suite]) for suite in suites]


def _results(trials: list[Trial], provider: CodeExecutionProvider) -> list[ExecutionResult]:
    if isinstance(provider, TrialProvider):
        return provider.run_trials(trials)
    scripts = [f"{trial.script}\n1.0\n" for trial in trials]
    values = provider.execute_scripts(scripts, ["python"] * len(scripts))
    if len(values) != len(scripts):
        raise ValueError(f"the provider returned {len(values)} values for {len(scripts)} scripts.")
    return [ExecutionResult(value == 1.0, "passed" if value == 1.0 else "failed") for value in values]


def _summary(results: list[ExecutionResult]) -> Suite:
    outside = sum(result.judged == "outside" for result in results)
    return Suite(sum(result.passed for result in results), outside, len(results) - outside)
