import pytest

from trl_dllm.sandbox import (
    ALLOW_VARIABLE,
    CodeExecutionProvider,
    ExecutionResult,
    LocalProvider,
    Suite,
    Trial,
    TrialProvider,
    check_allowed,
    get_provider,
    providers,
    register_provider,
    run_suites,
)


def test_off_until_asked_for(monkeypatch):
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    for allowed in (None, False):
        with pytest.raises(PermissionError, match="TRL_DLLM_ALLOW_CODE_EXECUTION=1"):
            check_allowed(allowed)
    check_allowed(True)
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    check_allowed(None)
    with pytest.raises(PermissionError):
        check_allowed(False)


class Recorder:
    def execute_scripts(self, scripts, languages):
        self.seen = list(zip(scripts, languages, strict=True))
        return [0.25 if "half" in script else 1.0 for script in scripts]


def test_providers(sandbox):
    assert LocalProvider(timeout=5).execute_scripts(["1.0", "1/0\n1.0"], ["python", "python"]) == [1.0, 0.0]
    assert isinstance(get_provider(), LocalProvider) and get_provider(num_workers=2).num_workers == 2
    with pytest.raises(ValueError, match="'rust'"):
        LocalProvider().execute_scripts([""], ["rust"])
    with pytest.raises(ValueError, match="1 scripts have 0 languages"):
        LocalProvider().execute_scripts([""], [])
    with pytest.raises(ValueError, match=r"'lokal'.*mean 'local'"):
        get_provider("lokal")
    with pytest.raises(ValueError, match="execute_scripts"):
        get_provider(3)


def test_another_provider_fits(monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", dict(providers.PROVIDERS))
    recorder = Recorder()
    assert isinstance(recorder, CodeExecutionProvider)
    register_provider("recorder", lambda: recorder)
    suites = [[Trial("p", "t", script=name) for name in names] for names in (["a", "half"], [], ["b"])]
    assert run_suites(suites, True, "recorder") == [Suite(1, 0, 2), Suite(), Suite(1, 0, 1)]
    assert recorder.seen == [(f"{name}\n1.0\n", "python") for name in ("a", "half", "b")]
    assert get_provider(recorder) is recorder


def test_the_local_provider_judges_outside_where_it_can(sandbox):
    outside = Trial("def f(x): return x", "assert f(1) == 1", script="1 / 0")
    inside = Trial("", "assert P().x == f(1)", script="pass")
    suites = [[outside, inside, Trial("def f(x): return 0", "assert f(1) == 1", script="pass")], [], [inside]]
    assert run_suites(suites, True, "local") == [Suite(2, 2, 1), Suite(), Suite(1, 0, 1)]


def test_suites_without_trials_ask_nobody():
    assert run_suites([[], []], True, "local") == [Suite(), Suite()]
    with pytest.raises(PermissionError):
        run_suites([[]], False, "local")


def test_fractions():
    assert [Suite(1, 1, 1).fraction, Suite().fraction, Suite(3, 2, 1).fraction] == [0.5, 0.0, 1.0]


def test_a_provider_of_trials():
    class Judge(Recorder):
        def run_trials(self, trials):
            return [ExecutionResult(trial.test == "t", "", judged="outside") for trial in trials]

    assert isinstance(Judge(), TrialProvider) and not isinstance(Recorder(), TrialProvider)
    assert run_suites([[Trial("p", "t", "s"), Trial("p", "u", "s")]], True, Judge()) == [Suite(1, 2, 0)]


def test_a_provider_that_counts_wrongly():
    class Short:
        def execute_scripts(self, scripts, languages):
            return [1.0]

    with pytest.raises(ValueError, match="1 values for 2 scripts"):
        run_suites([[Trial("p", "t", "s")] * 2], True, Short())
