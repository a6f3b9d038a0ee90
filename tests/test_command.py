"""How a command ends: one line, an exit code, and a traceback only where `--debug` asks for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_dllm import command
from trl_dllm.command import Ended, Parser, count, one_line, run_script, take_debug
from trl_dllm.fingerprint import OtherSettings
from trl_dllm.sandbox import SandboxUnavailable


def ended(error: BaseException, capsys, debug: bool = False) -> tuple[str, int]:
    with pytest.raises(Ended) as end, one_line("trl-dllm test", debug):
        raise error
    assert capsys.readouterr().err == f"{end.value}\n"
    assert isinstance(end.value.code, int)
    return str(end.value), end.value.code


@pytest.mark.parametrize(
    "error",
    [
        ValueError("beta=-1 must be\n  0 or more."),
        FileNotFoundError("beta=-1 must be 0 or more."),
        OSError("beta=-1\tmust be 0 or more."),
        ImportError("beta=-1 must be 0 or more."),
        NotImplementedError("beta=-1 must be 0 or more."),
        FloatingPointError("beta=-1 must be 0 or more."),
        SandboxUnavailable("beta=-1 must be 0 or more."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_to_be_mended_is_one_line(error, capsys):
    assert ended(error, capsys) == ("trl-dllm test: beta=-1 must be 0 or more.", 2)


@pytest.mark.parametrize(
    "error", [KeyError("answer"), TypeError("no"), AttributeError("no"), RuntimeError("CUDA\nno")]
)
def test_a_bug_is_named_with_its_place(error, capsys):
    line, code = ended(error, capsys)
    assert code == 1 and "\n" not in line
    assert line.startswith(f"trl-dllm test: unexpected {type(error).__name__} in test_command.py, line ")
    assert line.endswith("; run again with --debug for the traceback")


def test_an_error_without_words_is_named(capsys):
    assert ended(ValueError(), capsys) == ("trl-dllm test: ValueError", 2)


def test_another_runs_table_keeps_its_lines(capsys):
    assert ended(OtherSettings("a line\na | table"), capsys) == ("trl-dllm test: a line\na | table", 2)


def test_an_interrupt_is_no_traceback():
    with pytest.raises(Ended, match="interrupted") as end, one_line("trl-dllm test"):
        raise KeyboardInterrupt
    assert end.value.code == 130


@pytest.mark.parametrize("error", [ValueError, KeyError, OtherSettings, KeyboardInterrupt])
def test_debug_lets_the_error_through(error):
    with pytest.raises(error), one_line("trl-dllm test", debug=True):
        raise error


def test_exits_and_success_pass():
    with pytest.raises(SystemExit) as end, one_line("trl-dllm test"):
        raise SystemExit(0)
    assert not isinstance(end.value, Ended) and end.value.code == 0
    with one_line("trl-dllm test"):
        pass


def test_other_processes_wait_for_the_first_to_speak(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    ended(ValueError("no"), capsys)
    assert not waited
    monkeypatch.setenv("RANK", "3")
    assert ended(ValueError("no"), capsys) == ("[process 3] trl-dllm test: no", 2)
    assert waited and waited[0] >= 5


@pytest.mark.parametrize(
    ("argv", "rest", "debug"),
    [
        (["--debug", "--beta", "1"], ["--beta", "1"], True),
        (["--beta", "1", "--debug"], ["--beta", "1"], True),
        (["--beta", "1"], ["--beta", "1"], False),
        (["--debug", "underflow_overflow"], ["--debug", "underflow_overflow"], False),
        (["--debug=underflow_overflow"], ["--debug=underflow_overflow"], False),
        (["name", "--debug", "other"], ["name", "other"], True),
    ],
)
def test_debug_may_stand_anywhere(argv, rest, debug):
    assert take_debug(argv) == (rest, debug)


def make_parser(prog=None):
    parser = Parser(prog=prog)
    parser.add_argument("--number", type=count, required=True)
    return parser


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--number", "0"], "argument --number: '0' must be a whole number of at least 1"),
        (["--number", "2.0"], "argument --number: '2.0' must be a whole number of at least 1"),
        (["--number=-3"], "argument --number: '-3' must be a whole number of at least 1"),
        ([], "the following arguments are required: --number"),
        (["--number", "1", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_argument_is_one_line_and_no_usage(argv, line, capsys):
    with pytest.raises(Ended) as end:
        run_script("trl-dllm test", make_parser, print, argv)
    assert (str(end.value), end.value.code) == (f"trl-dllm test: {line}", 2)
    assert capsys.readouterr().out == ""


def test_a_script_runs_with_what_was_parsed():
    found = []
    run_script("trl-dllm test", make_parser, found.append, ["--number", "3", "--debug"])
    assert [args.number for args in found] == [3]


def test_a_script_leaves_the_processes_of_its_launch(tmp_path):
    """One that ends among them now and then aborts (11 of 75 did), and torchrun then ends those that are not done."""
    group = torch.distributed
    store = (tmp_path / "store").as_uri()

    def script(args):
        group.init_process_group("gloo", store, rank=0, world_size=1)

    run_script("t", make_parser, script, ["--number", "3"])
    assert not group.is_initialized()


@pytest.mark.parametrize("debug", [False, True])
def test_a_script_that_a_launcher_starts_ends_with_one_line(debug):
    """As `accelerate launch` starts it: by its path, as a process of its own."""
    script = Path(command.__file__).parent / "scripts" / "sft.py"
    argv = [sys.executable, str(script), "--learning_rate", "nan", "--use_cpu", "true", *["--debug"] * debug]
    result = subprocess.run(argv, capture_output=True, text=True)
    if debug:
        assert result.returncode == 1 and "Traceback" in result.stderr
    else:
        assert result.returncode == 2 and "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert last == "trl-dllm sft: learning_rate=nan must be a finite number."
