"""What the scripts share: the parser of recipes, rewards by name, and going on from a checkpoint."""

import os
import shutil

import pytest
from helpers_scripts import GRPO, write_recipe

from trl_dllm.recipe import load_recipe, recipe_paths
from trl_dllm.scripts import grpo, sft
from trl_dllm.scripts.common import last_checkpoint


CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize(
    "name",
    [
        "tiny_llada/sft/sudoku_any_order",
        "tiny_llada/sft/config_sudoku_any_order.yaml",
        "recipes/tiny_llada/sft/config_sudoku_any_order.yaml",
    ],
)
def test_config_takes_a_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, args, _ = sft.make_parser().parse_args_and_config(["--config", name])
    assert (args.objective, args.max_steps) == ("any_order", 850)


def test_arguments_win_over_a_recipe_and_a_recipe_over_its_base():
    argv = ["--config", "llada_8b/grpo/gsm8k_pkl", *CPU, "--temperature", "0.7"]
    _, args, model = grpo.make_parser().parse_args_and_config(argv)
    own, whole = load_recipe(recipe_paths()["llada_8b/grpo/gsm8k_pkl"]), args
    assert (whole.temperature, whole.learning_rate, whole.beta) == (0.7, own["learning_rate"], 0.04)
    assert (whole.learning_rate, model.lora_r) == (5e-6, 128)


@pytest.mark.parametrize("where", ["recipe", "base"])
def test_an_unknown_key_is_an_error_in_a_recipe_and_in_its_base(where, tmp_path):
    texts = {"recipe": "base: _base.yaml\n", "base": "task: sudoku\n"}
    texts[where] += "objektive: any_order\n"
    (tmp_path / "_base.yaml").write_text(texts["base"])
    (tmp_path / "recipe.yaml").write_text(texts["recipe"])
    with pytest.raises(ValueError, match=r"or its base: objektive='any_order' \(did you mean 'objective'\?\)"):
        sft.make_parser().parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])


def test_a_recipe_sets_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_DLLM_TEST_VARIABLE", "before")
    config = write_recipe(tmp_path, GRPO, output_dir=str(tmp_path), env={"TRL_DLLM_TEST_VARIABLE": 3})
    grpo.make_parser().parse_args_and_config(["--config", config])
    assert os.environ["TRL_DLLM_TEST_VARIABLE"] == "3"
    with pytest.raises(ValueError, match=r"env=\['A'\] in the recipe must be a mapping"):
        grpo.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, GRPO, env=["A"])])


def test_config_needs_a_value():
    with pytest.raises(ValueError, match="--config needs a value"):
        grpo.make_parser().parse_args_and_config(["--beta", "0.1", "--config"])


def test_an_interrupted_run_resumes_from_its_last_checkpoint(tmp_path, tiny_checkpoint):
    config = write_recipe(
        tmp_path, GRPO, model_name_or_path=tiny_checkpoint, output_dir=str(tmp_path / "a"), max_steps=3, save_steps=1
    )
    parsed = grpo.make_parser().parse_args_and_config(["--config", config])
    whole = grpo.main(*parsed).state.log_history
    for path in (tmp_path / "a").iterdir():  # as if it had been killed behind its first checkpoint
        if path.name in ("checkpoint-2", "checkpoint-3"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    assert last_checkpoint(parsed[1]).endswith("checkpoint-1")
    again = grpo.main(*grpo.make_parser().parse_args_and_config(["--config", config])).state
    assert again.global_step == 3
    rewards, losses = (
        [[entry[key] for entry in history if key in entry] for history in (whole, again.log_history)]
        for key in ("reward", "loss")
    )
    assert rewards[0] == rewards[1] and losses[0] == losses[1] and len(losses[0]) == 3
