"""`trl-dllm grpo` with one prompt for all rows, with a classifier's label as the reward, and with pages of its own."""

import pytest
import yaml
from helpers_scripts import GRPO, write_recipe

from trl_dllm import cli
from trl_dllm.scripts.grpo import make_parser
from trl_dllm.scripts.rewards import resolve_rewards
from trl_dllm.trace import read_page
from trl_dllm.trainer.classifier import ClassifierReward


CPU = ["--use_cpu", "true", "--bf16", "false"]


def parse(folder, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "runs/none", **settings}))
    return make_parser().parse_args_and_config(["--config", str(path), *CPU])[0]


@pytest.mark.parametrize("prompt", ["", "<|endoftext|>", "1"])
def test_every_row_is_the_prompt(tmp_path, prompt):
    script_args = parse(tmp_path, prompt=prompt)
    rows = script_args.load("train", 3, seed=0)
    assert rows.column_names == ["prompt"] and rows["prompt"] == [prompt] * 3
    assert parse(tmp_path, task="sudoku").load("train", 3, seed=0)["prompt"][0] != prompt


@pytest.mark.parametrize(
    ("name", "value"), [("task", "sudoku"), ("dataset_name", "a/set"), ("task_kwargs", {"a": 1}), ("puzzle_seed", 3)]
)
def test_a_prompt_beside_other_data_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"prompt='' and {name}=.*Leave out one of both"):
        parse(tmp_path, prompt="", **{name: value})


def test_a_label_makes_a_classifier_of_a_reward_model():
    reward, other = resolve_rewards("sudoku", ["solved"], "a/model", "toxic")
    assert isinstance(reward, ClassifierReward) and (reward.name, reward.label) == ("a/model", "toxic")
    assert other is resolve_rewards("sudoku", ["solved"], None)[0]
    with pytest.raises(ValueError, match="reward_model_label='toxic' without a reward model: name the"):
        resolve_rewards("sudoku", ["solved"], None, "toxic")


@pytest.mark.slow
def test_a_dry_run_needs_neither_data_nor_the_reward_model(capsys):
    cli.main(["grpo", "--config", "eso_lm/grpo/toxicity", "--dry_run", "true"])
    assert "dry run, no weights loaded" in (printed := capsys.readouterr().out) and "512" in printed


def test_a_label_that_is_none_ends_the_command_before_weights_are_loaded(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "id2label": {"0": "a", "1": "b"}}')
    settings = {
        "model_name_or_path": tiny_checkpoint,
        "reward_model_name_or_path": str(tmp_path),
        "reward_model_label": "c",
        "prompt": "",
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
        "estimator": "any_order",
        "decoding": "any_order",
        "max_completion_length": 8,
        "block_length": 8,
        "diffusion_steps": 8,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        SystemExit, match=r"^trl-dllm grpo: reward_model_label='c' is no label of .*: name one of a, b"
    ):
        cli.main(["grpo", "--config", str(tmp_path / "recipe.yaml"), *CPU])


def test_the_pages_of_a_run_show_the_tasks_grid(tmp_path, tiny_checkpoint):
    """With the clues of the puzzle that stands in the prompt; a run that starts over begins without pages."""
    run = tmp_path / "run"
    settings = {"model_name_or_path": tiny_checkpoint, "output_dir": str(run), "trace_steps": 1}
    config = write_recipe(tmp_path, GRPO, **settings)
    cli.main(["grpo", "--config", config])
    page = read_page(run / "traces" / "step-1.html")
    for (row,) in page["examples"]:
        prompt = "".join(page["models"][0]["vocab"][str(token)] for token in row["prompt"])
        assert "".join(cell["given"] or "0" for cell in row["grid"]["cells"]) == prompt.removesuffix("=")
        assert set(row["rewards"]) == {"sudoku_cells_reward", "advantage"}
    assert "(traces/step-1.html)" in (run / "README.md").read_text()
    cli.main(["grpo", "--config", config, "--start_over", "true", "--trace_steps", "2", "--seed", "1"])
    assert [path.name for path in (run / "traces").iterdir()] == ["step-0.html"]
    assert (run / "_replaced-1" / "traces" / "step-1.html").exists()
