"""Evaluation: intervals, scores, and an interrupted run that ends with the file of an undisturbed one."""

import json

import pytest

from trl_dllm.evaluation import GENERATIONS, SUMMARY, evaluate, tokenize_prompts, wilson_interval
from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.models import create_tiny_model
from trl_dllm.tasks import get_task


CONFIG = DiffusionGenerationConfig(max_new_tokens=16, block_length=16, diffusion_steps=4, temperature=1.0)


@pytest.fixture(scope="module")
def tiny():
    return create_tiny_model(hidden_size=16, num_layers=1)


def run(tiny, folder, n=10, batch_size=4, **kwargs):
    task = get_task("sudoku")
    return evaluate(*tiny, task, task.load("test", n), CONFIG, folder, batch_size=batch_size, **kwargs)


def test_wilson_interval_is_the_published_one():
    # Wilson (1927): 10 of 20 gives 0.299 to 0.701; at the ends the interval does not collapse.
    assert wilson_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize("rows_written", [0, 3, 4, 6, 8])
def test_an_interrupted_evaluation_ends_with_the_undisturbed_file(tiny, tmp_path, rows_written):
    whole = run(tiny, tmp_path / "whole")
    run(tiny, tmp_path / "cut")
    lines = (tmp_path / "whole" / GENERATIONS).read_text().splitlines(keepends=True)
    # Killed in the middle of a batch, and of a line.
    (tmp_path / "cut" / GENERATIONS).write_text("".join(lines[:rows_written]) + lines[rows_written][:7])
    (tmp_path / "cut" / SUMMARY).unlink()
    again = run(tiny, tmp_path / "cut")
    assert (tmp_path / "cut" / GENERATIONS).read_text() == (tmp_path / "whole" / GENERATIONS).read_text()
    whole.pop("seconds"), again.pop("seconds")
    assert again == whole


def test_other_settings_in_the_same_folder_are_refused(tiny, tmp_path):
    run(tiny, tmp_path)
    with pytest.raises(ValueError, match="seed differ"):
        run(tiny, tmp_path, seed=1)


def test_generations_are_kept_with_their_scores(tiny, tmp_path):
    summary = run(tiny, tmp_path)
    records = [json.loads(line) for line in (tmp_path / GENERATIONS).read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(10))
    assert summary["n"] == summary["total"] == 10
    assert summary["correct"] == sum(record["correct"] for record in records)
    assert summary["low"] <= summary["solve_rate"] <= summary["high"]
    assert json.loads((tmp_path / SUMMARY).read_text()) == summary
    assert all(record["steps"] == 4 for record in records)


def test_prompts_are_tokenized_as_trl_does_it(tiny):
    _, tokenizer = tiny
    ids, mask = tokenize_prompts(tokenizer, ["12=", "1="])
    assert ids.shape == (2, 3) and mask.tolist() == [[True] * 3, [False, True, True]]
    assert tokenizer.decode(ids[1][mask[1]]) == "1="
    chat = [[{"role": "user", "content": "hi"}]]
    ids, mask = tokenize_prompts(tokenizer, chat)
    text = tokenizer.apply_chat_template(chat[0], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids[0]) == text
