"""The command line: a light entry, launch arguments, errors that say what to mend, and a run through every command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_scripts import DPO, GRPO, SFT, write_recipe

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
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "usage: trl-dllm COMMAND" in printed.out
    assert printed.err.strip() == "trl-dllm: unknown command 'grop'; did you mean 'grpo'?"


def test_every_command_runs_one_after_the_other(tmp_path, capsys):
    tiny, fine_tuned, preferring, trained = (str(tmp_path / name) for name in ("tiny", "sft", "dpo", "grpo"))
    cli.main(["init-tiny", tiny, "--hidden_size", "16", "--num_layers", "1"])
    cli.main(["sft", "--config", write_recipe(tmp_path, SFT, model_name_or_path=tiny, output_dir=fine_tuned)])
    cli.main(["dpo", "--config", write_recipe(tmp_path, DPO, model_name_or_path=fine_tuned, output_dir=preferring)])
    config = write_recipe(tmp_path, GRPO, model_name_or_path=preferring, output_dir=trained)
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
        ({}, ["--num_generations", "four"], "argument --num_generations.*: invalid int value: 'four'"),
        ({"learning_rate": float("nan")}, [], "learning_rate=nan must be a finite number"),
        ({"per_device_train_batch_size": 2.0}, [], r"per_device_train_batch_size=2\.0 must be a whole number"),
        ({"num_iterations": 0}, [], "num_iterations=0 must be at least 1"),
        ({"reward_funcs": []}, [], r"reward_funcs=\[\] names no reward"),
        ({"reward_funcs": "solved"}, [], "reward_funcs='solved' must be a list"),
        ({"reward_funcs": ["accuracy"]}, [], "'accuracy' is open-r1's name"),
        ({"task_kwargs": {"min_blank": 3}}, [], r"has no argument 'min_blank'; did you mean 'min_blanks'\?"),
        ({"task_kwargs": {"min_blanks": 3.5}}, [], r"task_kwargs: min_blanks=3\.5 must be a whole number"),
        ({"task_kwargs": {"seed": 3}}, [], "seed=3 has a field of its own: puzzle_seed"),
        ({"task_kwargs": "{min_blanks: 3}"}, [], "is not JSON, such as"),
        ({}, ["--task_kwargs", "[3]"], r"'\[3\]' must be a mapping"),
        ({"num_train_examples": 0}, [], "num_train_examples=0 must be at least 1"),
        ({"data_dir": "no/such/folder"}, [], "data_dir='no/such/folder' is not a folder"),
        ({"dataset_name": "a/b"}, [], "dataset_name='a/b' would be ignored: task='sudoku' brings its own data"),
        (
            {"task": None, "dataset_name": "a/b"},
            [],
            "num_train_examples=16 would be ignored: dataset_name='a/b'",
        ),
        ({"task": None}, [], "Nothing to train on: set task"),
        ({"lora_r": 8}, [], "lora_r without use_peft: say use_peft: true"),
        ({"lora_target_modules": ["q_proj"], "use_dora": True}, [], "lora_target_modules, use_dora without use_peft"),
        ({"use_peft": True, "lora_dropout": 1.0}, [], r"lora_dropout=1\.0 must be in \[0, 1\)"),
        ({"use_peft": True, "lora_task_type": "LM"}, [], "lora_task_type='LM' is unknown"),
        ({"load_in_4bit": True}, [], "load_in_4bit=True without use_peft"),
        ({"bf16": True, "use_cpu": False}, [], "bf16=True .*needs a GPU .*use_cpu: true"),
        ({"accelerator_config": {"nonsense": 1}}, [], "nonsense"),
        ({}, [], "model_name_or_path='no/such-model' cannot be read"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
    ],
)
def test_a_recipe_to_mend_ends_with_one_line(tmp_path, monkeypatch, capsys, changes, argv, message):
    """Before any model is loaded: the recipe names none that exists."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    settings = {**GRPO, "model_name_or_path": "no/such-model", "output_dir": str(tmp_path / "out"), **changes}
    with pytest.raises(SystemExit, match=message) as ended:
        cli.main(["grpo", "--config", write_recipe(tmp_path, settings), *argv])
    line = str(ended.value)
    assert ended.value.code == 2 and line.startswith("trl-dllm grpo: ") and "\n" not in line
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not (tmp_path / "out").exists()


def test_quantised_weights_ask_for_bitsandbytes_by_name(monkeypatch):
    """An installation without the extra, where the dry run of a 4-bit recipe ended in a NameError."""
    monkeypatch.setattr("trl_dllm.scripts.common.find_spec", lambda name: None)
    recipe = ["--config", "llada_8b/grpo/gsm8k_step_merge", "--dry_run", "true"]
    with pytest.raises(SystemExit, match=r"load_in_4bit=True needs bitsandbytes, .*: pip install bitsandbytes"):
        cli.main(["grpo", *recipe])


def test_an_adapter_can_be_switched_off_over_a_recipe_that_sets_it_up(tmp_path):
    config = write_recipe(tmp_path, GRPO, output_dir=str(tmp_path), use_peft=True, lora_r=8)
    *_, model = grpo.make_parser().parse_args_and_config(["--config", config, "--use_peft", "false"])
    assert (model.use_peft, model.lora_r) == (False, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "--task", "sudoku"], "the following arguments are required: --output_dir"),
        (["eval", "--task", "sudoku", "--output_dir", "o"], "Name a model with --model_name_or_path"),
        (["eval", "--task", "sudok", "--output_dir", "o"], "unknown task 'sudok': did you mean 'sudoku'"),
        (["eval", "--task", "sudoku", "--output_dir", "o", "--parser", "d2"], "parser='d2' is unknown"),
        (["eval", "--task", "sudoku", "--output_dir", "o", "--num_examples", "0"], "'0' must be a whole number"),
        (["eval", "--task", "sudoku", "--output_dir", "o", "--task_kwargs", '{"blanks": 3}'], "no argument 'blanks'"),
        (["eval", "--task", "sudoku", "--output_dir", "o", "--data_dir", "no/such"], "data_dir='no/such' is not"),
        (["eval", "--task", "gsm8k", "--output_dir", "o", "--from_generations", "no/such.jsonl"], "no/such.jsonl"),
        (["eval", "--task", "sudoku", "--output_dir", "o", "--model_name_or_path", "no/such-model"], "no/such-model"),
        (
            ["generate", "--model_name_or_path", "m", "--prompt", "a", "--temperature", "nan"],
            "temperature=nan must be",
        ),
        (["generate", "--model_name_or_path", "m", "--prompt", "a", "--block_length", "5"], "block_length=5 does not"),
        (
            ["generate", "--model_name_or_path", "m", "--prompt", "a", "--dtype", "float17"],
            "argument --dtype: invalid",
        ),
        (["generate", "--model_name_or_path", "no/such-model", "--prompt", "a"], "no/such-model"),
        (["report", "--model_name_or_path", "m", "--task", "sudoku", "--batch_size", "0"], "argument --batch_size"),
        (["report", "--model_name_or_path", "m", "--task", "no_such.TASK"], "task: 'no_such.TASK' cannot be imported"),
        (["recipe", "no/such-recipe"], "no/such-recipe is neither a file nor the name of a recipe"),
        (["init-tiny", "o", "--hidden_size", "17"], "hidden_size=17 must be a multiple of 16"),
        (["merge", "no/such-adapter", "o"], "no/such-adapter"),
    ],
)
def test_every_other_command_ends_with_one_line_too(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as ended:
        cli.main(argv)
    line = str(ended.value)
    assert ended.value.code == 2 and line.startswith(f"trl-dllm {argv[0]}: ") and "\n" not in line
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_debug_shows_the_error_itself(tmp_path):
    config = write_recipe(tmp_path, GRPO, output_dir=str(tmp_path), beta=-1)
    for argv in (["--debug", "grpo", "--config", config], ["grpo", "--debug", "--config", config]):
        with pytest.raises(ValueError, match="beta=-1 must be 0 or more"):
            cli.main(argv)


def test_what_is_no_yaml_ends_with_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: [1,\nseed: 3\n")
    with pytest.raises(
        SystemExit, match=r": .*recipe\.yaml is not YAML: .* line 1, column 7: .* line 3, column 1$"
    ) as ended:
        cli.main(["grpo", "--config", str(path)])
    assert ended.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_launch_ends_with_its_processes_line_and_code(tmp_path, processes):
    """One line of process 0, and neither its traceback nor the launcher's."""
    config = write_recipe(tmp_path, GRPO, output_dir=str(tmp_path), model_name_or_path="no/such-model")
    launch = ["--num_processes", str(processes), "--cpu", *["--multi_gpu"] * (processes > 1)]
    if processes > 1:
        launch = ["--accelerate_config", "ddp", "--num_processes", "2"]
    argv = [sys.executable, "-m", "trl_dllm_cli", "grpo", "--config", config, *launch]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    said = [line for line in result.stderr.splitlines() if "trl-dllm grpo:" in line]
    assert result.returncode == 2, result.stderr
    assert len(said) == 1 and said[0].startswith("trl-dllm grpo: model_name_or_path='no/such-model' cannot be read")
    assert "Traceback" not in result.stderr


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
