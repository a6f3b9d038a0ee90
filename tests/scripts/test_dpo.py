"""Preferences that a task's demonstrations make, or a data set has."""

import json

import pytest
from helpers_scripts import DPO, write_recipe

from trl_dllm.scripts import dpo


def parse(folder, *argv, **changes):
    return dpo.make_parser().parse_args_and_config(
        ["--config", write_recipe(folder, {**DPO, "output_dir": str(folder / "dpo"), **changes}), *argv]
    )


def test_answers_of_a_task_are_preferred_to_worse_ones(tmp_path):
    script_args, _, _ = parse(tmp_path, rejected_kwargs={"answer_noise": 0.1})
    pairs = dpo.load_pairs(script_args, "train", 64, seed=0)
    assert pairs.column_names == ["prompt", "chosen", "rejected"] and 32 < len(pairs) < 64, "equal ones are left out"
    for row in pairs:
        puzzle = row["prompt"].rstrip("=")
        wrong = [i for i in range(16) if row["chosen"][i] != row["rejected"][i]]
        assert wrong and all(puzzle[i] == "0" for i in wrong), "filled-in digits alone are made wrong"


def test_pairs_of_a_task_are_trained_on(tmp_path, tiny_checkpoint):
    argv = ["--rejected_kwargs", '{"answer_noise": 0.9}']
    trainer = dpo.main(*parse(tmp_path, *argv, model_name_or_path=tiny_checkpoint))
    assert trainer.state.global_step == 2 and trainer.ref_model is not None
    assert (tmp_path / "dpo" / "fingerprint.json").is_file()


def test_pairs_of_a_data_set_are_trained_on(tmp_path, tiny_checkpoint):
    rows = [{"prompt": f"{i}=", "chosen": "1" * i, "rejected": "2", "score": i} for i in range(1, 9)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    left_out = {"task": None, "rejected_kwargs": None, "num_train_examples": None}
    settings = {key: value for key, value in {**DPO, **left_out}.items() if value is not None}
    settings |= {"dataset_name": str(tmp_path), "model_name_or_path": tiny_checkpoint, "eval_strategy": "steps"}
    settings |= {"dataset_test_split": "test", "eval_steps": 1, "output_dir": str(tmp_path / "out")}
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    parsed = dpo.make_parser().parse_args_and_config(["--config", write_recipe(recipe, settings)])
    trainer = dpo.main(*parsed)
    assert trainer.state.global_step == 2
    assert len([entry for entry in trainer.state.log_history if "eval_rewards/margins" in entry]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected_kwargs": None}, "rejected_kwargs=None with task='sudoku'"),
        ({"rejected_kwargs": {"noise": 1.0}}, "rejected_kwargs: task='sudoku' has no argument 'noise'"),
        ({"rejected_kwargs": {"answer_noise": "x"}}, "rejected_kwargs: answer_noise='x' must be a finite number"),
        ({"rejected_kwargs": "[1]"}, "rejected_kwargs='\\[1\\]' must be a mapping"),
        ({"task": None}, "rejected_kwargs=.* without task"),
    ],
)
def test_settings_that_make_no_pairs(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, **changes)


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        ({"min_blanks": 12, "max_blanks": 12}, "changes the prompts of task='sudoku'"),
        ({"answer_noise": 0.0}, "leaves the answers of task='sudoku' as they are"),
    ],
)
def test_answers_that_are_not_worse_ones_to_one_question(worse, message, tmp_path):
    script_args, _, _ = parse(tmp_path, rejected_kwargs=worse)
    with pytest.raises(ValueError, match=message):
        dpo.load_pairs(script_args, "train", 8, seed=0)
