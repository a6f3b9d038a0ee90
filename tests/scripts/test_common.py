"""What the scripts share: the parser of recipes, rewards by name, and going on from a checkpoint."""

import json
import os
import re
import shutil
import sys

import pytest
from helpers_scripts import GRPO, SFT, write_recipe

from trl_dllm import cli
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


# -------------------------------------------------------------------------------- an estimator and a task of one's own

MINE = """
from datasets import Dataset

from trl_dllm.likelihood import StepMerge
from trl_dllm.tasks import Task


class Halves(StepMerge):
    def __init__(self, cuts: int = 1):
        super().__init__(2 * cuts)


def load(split, num_examples, seed=0, prompt_format="text", data_dir=None, letters: str = "ab"):
    number = num_examples or 3
    return Dataset.from_dict({"prompt": [letters] * number, "completion": [letters] * number})


def same(completions, **kwargs):
    return [completion.count("a") + i % 2 for i, completion in enumerate(completions)]


def score(text, row):
    return {"correct": text == row["completion"]}


TASK = Task("letters", load, {"same": same}, score)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_letters.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_an_estimator_and_a_task_of_ones_own_are_trained_and_evaluated_by_their_paths(mine, tiny_checkpoint, capsys):
    """Dry run, run, fingerprint and card; in a recipe, and on the command line."""
    own = {"task": "my_letters.TASK", "task_kwargs": {"letters": "abc"}, "estimator": "my_letters.Halves"}
    recipe = write_recipe(
        mine, {**GRPO, **own}, model_name_or_path=tiny_checkpoint, output_dir="out", num_segments=None,
    )  # fmt: skip
    cli.main(["grpo", "--config", recipe, "--dry_run", "true"])
    assert re.search(r"views a completion\W+2\b", capsys.readouterr().out)
    cli.main(["grpo", "--config", recipe, "--estimator_kwargs", '{"cuts": 2}'])
    saved = json.loads((mine / "out" / "fingerprint.json").read_text())["meaning"]
    assert saved["estimator"] == "my_letters.Halves" and saved["estimator_kwargs"] == {"cuts": 2}
    assert saved["task"] == "my_letters.TASK" and saved["reward_funcs"] == ["my_letters.same"]
    assert "- Likelihood: `Halves`" in (mine / "out" / "README.md").read_text()
    with pytest.raises(SystemExit) as ended:
        cli.main(["grpo", "--config", recipe, "--estimator_kwargs", '{"cuts": 1}'])
    assert "estimator_kwargs" in str(ended.value) and ended.value.code == 2
    sft_recipe = write_recipe(
        mine, SFT, model_name_or_path=tiny_checkpoint, output_dir="sft", task="my_letters.TASK", max_steps=1
    )
    cli.main(["sft", "--config", sft_recipe])
    common = ["--model_name_or_path", "sft", "--task", "my_letters.TASK", "--max_new_tokens", "8"]
    cli.main(["eval", *common, "--output_dir", "eval"])
    assert json.loads((mine / "eval" / "summary.json").read_text())["total"] == 3
    cli.main(["report", *common, "--num_examples", "2"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": "my_letters.TASKS"},
            r"task: 'my_letters.TASKS' cannot be imported: .* did you mean my_letters.TASK",
        ),
        ({"task": "my_letters.load"}, r"task: 'my_letters.load' is a function, and must be an instance of .*Task"),
        (
            {"task": "my_letters.TASK", "task_kwargs": {"lettres": "a"}},
            r"no argument 'lettres'; did you mean 'letters'",
        ),
        ({"task": "my_letters.TASK", "task_kwargs": {"letters": 3}}, r"task_kwargs: letters=3 must be a string"),
    ],
    ids=str,
)
def test_what_is_no_task_is_refused(mine, settings, message):
    with pytest.raises(ValueError, match=message):
        grpo.make_parser().parse_args_and_config(["--config", write_recipe(mine, {**GRPO, **settings})])
