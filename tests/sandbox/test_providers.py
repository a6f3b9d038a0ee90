import pytest

from trl_dllm.sandbox import (
    ALLOW_VARIABLE,
    CodeExecutionProvider,
    LocalProvider,
    check_allowed,
    get_provider,
    pass_fractions,
    providers,
    register_provider,
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
    assert pass_fractions([["a", "half"], [], ["b"]], True, "recorder") == [0.5, 0.0, 1.0]
    assert recorder.seen == [(f"{name}\n1.0\n", "python") for name in ("a", "half", "b")]
    assert get_provider(recorder) is recorder
