"""The command line: recipes, overrides, errors that say what to mend, and a run through every command."""

import json

import pytest
import yaml

from trl_dllm import cli
from trl_dllm.scripts import grpo, sft
from trl_dllm.scripts.common import last_checkpoint, resolve_rewards


RUN = {
    "task": "sudoku",
    "num_train_examples": 16,
    "output_dir": "",
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 1,
    "logging_steps": 1,
    "resume_from_checkpoint": True,
}
GRPO = {
    **RUN,
    "max_completion_length": 16,
    "block_length": 8,
    "diffusion_steps": 4,
    "num_generations": 4,
    "num_segments": 2,
}


def recipe(tmp_path, settings, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return str(path)


@pytest.fixture
def tiny(tmp_path):
    cli.main(["init-tiny", str(tmp_path / "tiny"), "--hidden_size", "16", "--num_layers", "1"])
    return str(tmp_path / "tiny")


def test_every_command_runs_one_after_the_other(tmp_path, tiny, capsys):
    fine_tuned, trained = str(tmp_path / "sft"), str(tmp_path / "grpo")
    config = recipe(tmp_path, RUN, model_name_or_path=tiny, output_dir=fine_tuned, canvas_length=16)
    cli.main(["sft", "--config", config])
    config = recipe(tmp_path, GRPO, model_name_or_path=fine_tuned, output_dir=trained)
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


def test_an_interrupted_run_resumes_from_its_last_checkpoint(tmp_path, tiny):
    config = recipe(tmp_path, GRPO, model_name_or_path=tiny, output_dir=str(tmp_path / "a"), max_steps=3, save_steps=1)
    parsed = grpo.make_parser().parse_args_and_config(["--config", config])
    whole = grpo.main(*parsed).state.log_history
    for name in ("checkpoint-2", "checkpoint-3"):
        for file in sorted((tmp_path / "a" / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (tmp_path / "a" / name).rmdir()
    assert last_checkpoint(parsed[1]).endswith("checkpoint-1")
    again = grpo.main(*grpo.make_parser().parse_args_and_config(["--config", config])).state
    assert again.global_step == 3
    rewards, losses = (
        [[entry[key] for entry in history if key in entry] for history in (whole, again.log_history)]
        for key in ("reward", "loss")
    )
    assert rewards[0] == rewards[1] and losses[0] == losses[1] and len(losses[0]) == 3


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
    ],
)
def test_a_recipe_to_mend_ends_with_one_line(tmp_path, changes, argv, message):
    """Before any model is loaded: the recipe names none that exists."""
    config = recipe(tmp_path, GRPO, model_name_or_path="no/such-model", output_dir=str(tmp_path), **changes)
    with pytest.raises(SystemExit, match=message):
        cli.main(["grpo", "--config", config, *argv])


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="unknown command 'grop'"):
        cli.main(["grop"])


def test_launch_arguments_are_told_from_the_scripts_own():
    flags = {flag for action in grpo.make_parser()._actions for flag in action.option_strings}
    argv = ["--config", "r.yaml", "--num_processes", "8", "--reward_funcs", "a", "b", "--accelerate_config", "zero2"]
    launch, script = cli.split_launch_arguments([*argv, "--main_process_port=29501", "--beta", "-0.1"], flags)
    assert launch == ["--num_processes", "8", "--accelerate_config", "zero2", "--main_process_port=29501"]
    assert script == ["--config", "r.yaml", "--reward_funcs", "a", "b", "--beta", "-0.1"]
    resolved = cli.resolve_accelerate_config(launch)
    assert resolved[0] == "--config_file" and resolved[1].endswith("recipes/accelerate_configs/zero2.yaml")
    with pytest.raises(ValueError, match="zero9 is neither a file nor one of"):
        cli.resolve_accelerate_config(["--accelerate_config", "zero9"])


def test_rewards_by_name_by_path_and_by_default():
    from trl.rewards import think_format_reward

    from trl_dllm.tasks.sudoku import sudoku_cells_reward, sudoku_solved_reward

    assert resolve_rewards("sudoku", None, None) == [sudoku_cells_reward]
    names = ["solved", "think_format_reward", "trl_dllm.tasks.sudoku.sudoku_cells_reward"]
    assert resolve_rewards("sudoku", names, None) == [sudoku_solved_reward, think_format_reward, sudoku_cells_reward]
    with pytest.raises(ValueError, match="'sovled' is neither a reward of task 'sudoku'"):
        resolve_rewards("sudoku", ["sovled"], None)


def test_sft_rows_carry_nothing_but_the_conversation(tmp_path, tiny):
    config = recipe(tmp_path, RUN, model_name_or_path=tiny, output_dir=str(tmp_path / "sft"), canvas_length=16)
    trainer = sft.main(*sft.make_parser().parse_args_and_config(["--config", config]))
    assert trainer.state.global_step == 2


def test_a_dry_run_loads_no_weights_and_counts_the_batch(tmp_path, tiny, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights loaded"))
    config = recipe(tmp_path, GRPO, model_name_or_path=tiny, output_dir=str(tmp_path), num_iterations=2, beta=0.04)
    parsed = grpo.make_parser().parse_args_and_config(["--config", config, "--dry_run", "true"])
    facts = grpo.main(*parsed)
    assert facts["completions a generation batch"] == 4 and facts["prompts a generation batch"] == 1
    assert facts["decoding steps a completion"] == 4 and facts["views a completion"] == 2
    parameters = 5840
    assert facts["FLOPs of sampling a generation batch (d2 App. C.2)"] == 4 * 16 * 4 * 2 * parameters
    assert facts["FLOPs of old and reference log-probs"] == 2 * 4 * 16 * 2 * 2 * parameters
    assert facts["FLOPs of its updates"] == 4 * 16 * 2 * 6 * parameters * 2
    common = ["--model_name_or_path", tiny, "--max_new_tokens", "16", "--diffusion_steps", "4", "--dry_run"]
    cli.main(["eval", *common, "--task", "sudoku", "--num_examples", "64", "--output_dir", str(tmp_path / "e")])
    cli.main(["generate", *common, "--prompt", "1="])
    assert "forwards" in capsys.readouterr().out


def test_a_dry_run_knows_the_published_shapes_without_the_hub(monkeypatch):
    from trl_dllm.reports import dry_run

    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(dry_run.AutoConfig, "from_pretrained", offline)
    assert 7.9e9 < dry_run.count_parameters(dry_run.read_config("GSAI-ML/LLaDA-8B-Instruct")) < 8.1e9
    assert 7.5e9 < dry_run.count_parameters(dry_run.read_config("Dream-org/Dream-v0-Instruct-7B")) < 7.7e9
    with pytest.raises(OSError, match="no network"):
        dry_run.read_config("some/other-model")
