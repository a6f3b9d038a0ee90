"""The command line: a light entry, launch arguments, errors that say what to mend, and a run through every command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_scripts import GRPO, SFT, write_recipe

import trl_dllm
from trl_dllm import cli
from trl_dllm.recipe import find_recipe, render_recipe
from trl_dllm.scripts import grpo
from trl_dllm_cli import COMMANDS


ROOT = Path(__file__).parents[1]


def python(*argv: str) -> str:
    """What a new interpreter prints."""
    result = subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True, text=True)
    return result.stdout


@pytest.mark.parametrize("argv", [["--help"], ["-h"], [], ["--version"]])
def test_the_entry_loads_neither_torch_nor_the_package(argv):
    code = (
        f"import sys, trl_dllm_cli; trl_dllm_cli.main({argv}); "
        "print(sorted({'accelerate', 'torch', 'transformers', 'trl', 'trl_dllm', 'yaml'} & set(sys.modules)))"
    )
    *printed, loaded = python("-c", code).splitlines()
    assert loaded == "[]"
    if argv != ["--version"]:
        assert all(any(line.split()[:1] == [name] for line in printed) for name in COMMANDS)


def test_the_version_is_the_packages():
    assert python("-m", "trl_dllm_cli", "--version") == f"trl-dllm {trl_dllm.__version__}\n"


def test_a_command_prints_its_own_output_alone():
    """Not what libraries say while they load: the copy of a recipe must be YAML."""
    name = "llada_8b/grpo/gsm8k_pkl"
    assert python("-m", "trl_dllm_cli", "recipe", name) == render_recipe(find_recipe(name))


def test_every_command_has_a_script_with_a_parser():
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0


@pytest.mark.parametrize("argv", [["grop"], ["grop", "--config", "x"]])
def test_an_unknown_command_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match=r"unknown command 'grop'; did you mean 'grpo'\?"):
        cli.main(argv)
    assert "usage: trl-dllm COMMAND" in capsys.readouterr().out


def test_every_command_runs_one_after_the_other(tmp_path, capsys):
    tiny, fine_tuned, trained = (str(tmp_path / name) for name in ("tiny", "sft", "grpo"))
    cli.main(["init-tiny", tiny, "--hidden_size", "16", "--num_layers", "1"])
    cli.main(["sft", "--config", write_recipe(tmp_path, SFT, model_name_or_path=tiny, output_dir=fine_tuned)])
    config = write_recipe(tmp_path, GRPO, model_name_or_path=fine_tuned, output_dir=trained)
    cli.main(["grpo", "--config", config, "--learning_rate", "1e-4"])
    common = ["--model_name_or_path", trained, "--max_new_tokens", "16"]
    evaluation = str(tmp_path / "eval")
    cli.main(["eval", *common, "--task", "sudoku", "--num_examples", "4", "--output_dir", evaluation])
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["n"] == 4
    capsys.readouterr()
    cli.main(["generate", *common, "--prompt", "1030341221434321=", "--prompt", "12="])
    assert len(capsys.readouterr().out.splitlines()) >= 2
    # The same command again goes on from the last checkpoint, and finds the run complete.
    cli.main(["grpo", "--config", config, "--learning_rate", "1e-4"])
    assert "already trained: 2 of 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "argv", "message"),
    [
        ({"num_segmnts": 4}, [], r"num_segmnts=4 \(did you mean 'num_segments'\?\)"),
        ({"torch_dtype": "bfloat16"}, [], r"torch_dtype='bfloat16' \(it is called dtype now\)"),
        ({"max_prompt_length": 200}, [], "TRL removed it"),
        ({}, ["--estimatr", "step_merge"], r"estimatr \(did you mean 'estimator'\?\)"),
        ({"estimator": "stepmerge"}, [], "did you mean 'step_merge'"),
        ({"block_length": 5}, [], "block_length=5 does not divide max_completion_length=16"),
        ({"task": "sudoko"}, [], "did you mean 'sudoku'"),
        ({"base": "_base.yaml"}, [], "base='_base.yaml' is not a file beside it"),
        ({}, ["--accelerate_config", "zero9"], "zero9 is neither a file nor one of ddp, fsdp, .*zero3"),
        ({}, ["--accelerate_config"], "--accelerate_config needs a value"),
    ],
)
def test_a_recipe_to_mend_ends_with_one_line(tmp_path, changes, argv, message):
    """Before any model is loaded: the recipe names none that exists."""
    config = write_recipe(tmp_path, GRPO, model_name_or_path="no/such-model", output_dir=str(tmp_path), **changes)
    with pytest.raises(SystemExit, match=message):
        cli.main(["grpo", "--config", config, *argv])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(SystemExit, match=r"^trl-dllm grpo: .* did you mean llada_8b/grpo/gsm8k_pkl_u\?"):
        cli.main(["grpo", "--config", "llada_8b/grpo/gsm8k_pklu"])


def test_launch_arguments_are_told_from_the_scripts_own():
    flags = {flag for action in grpo.make_parser()._actions for flag in action.option_strings}
    argv = ["--config", "r.yaml", "--num_processes", "8", "--reward_funcs", "a", "b", "--accelerate_config", "zero2"]
    launch, script = cli.split_launch_arguments([*argv, "--main_process_port=29501", "--beta", "-0.1"], flags)
    assert launch == ["--num_processes", "8", "--accelerate_config", "zero2", "--main_process_port=29501"]
    assert script == ["--config", "r.yaml", "--reward_funcs", "a", "b", "--beta", "-0.1"]


@pytest.mark.parametrize("argv", [["--accelerate_config", "zero2"], ["--accelerate_config=zero2"]])
def test_an_accelerate_config_by_name_becomes_a_file(argv):
    resolved = cli.resolve_accelerate_config(["--num_processes", "8", *argv])
    assert resolved[0] == "--config_file" and resolved[1].endswith("recipes/accelerate_configs/zero2.yaml")
    assert resolved[2:] == ["--num_processes", "8"]


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("multi_gpu", "MULTI_GPU")])
def test_accelerate_launch_gets_the_config_and_the_script_its_recipe(name, kind, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    cli.main(["grpo", "--config", "tiny_llada/grpo/sudoku", "--beta", "0.1", "--accelerate_config", name])
    (arguments,) = launched
    assert f"distributed_type: {kind}" in Path(arguments.config_file).read_text()
    assert Path(arguments.training_script) == Path(grpo.__file__)
    assert arguments.training_script_args == ["--config", "tiny_llada/grpo/sudoku", "--beta", "0.1"]
