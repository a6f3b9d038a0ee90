"""Evaluation: intervals, scores, and an interrupted run that ends with the file of an undisturbed one."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_dllm import evaluation
from trl_dllm.evaluation import (
    GENERATIONS,
    SUMMARY,
    complete,
    evaluate,
    pass_at_k,
    rescore,
    summarise,
    tokenize_prompts,
    wilson_interval,
)
from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.identity import module_identity
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


class Killed(Exception):
    pass


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_an_interrupted_evaluation_ends_with_the_undisturbed_file(tiny, tmp_path, monkeypatch, batches):
    whole = run(tiny, tmp_path / "whole")
    draw, calls = evaluation.generate, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) > batches:
            raise Killed
        return draw(*args, **kwargs)

    monkeypatch.setattr(evaluation, "generate", dying)
    if batches < 3:
        with pytest.raises(Killed):
            run(tiny, tmp_path / "cut")
        assert not (tmp_path / "cut" / GENERATIONS).exists()
    else:
        run(tiny, tmp_path / "cut")
    (tmp_path / "cut" / "parts").mkdir(exist_ok=True)
    (tmp_path / "cut" / "parts" / "000001.tmp").write_text('{"row": 4, "sam')  # killed while writing
    calls.clear()
    monkeypatch.setattr(evaluation, "generate", lambda *args, **kwargs: calls.append(1) or draw(*args, **kwargs))
    again = run(tiny, tmp_path / "cut")
    assert len(calls) == 3 - batches
    assert (tmp_path / "cut" / GENERATIONS).read_text() == (tmp_path / "whole" / GENERATIONS).read_text()
    whole.pop("seconds"), again.pop("seconds")
    assert again == whole


def test_a_row_draws_the_same_in_every_batch(tiny, tmp_path):
    run(tiny, tmp_path / "four", batch_size=4)
    run(tiny, tmp_path / "seven", batch_size=7)
    assert (tmp_path / "four" / GENERATIONS).read_text() == (tmp_path / "seven" / GENERATIONS).read_text()


def test_several_samples_give_pass_at_k(tiny, tmp_path):
    summary = run(tiny, tmp_path, n=3, num_samples=5)
    records = [json.loads(line) for line in (tmp_path / GENERATIONS).read_text().splitlines()]
    assert [(record["row"], record["sample"]) for record in records] == [(r, s) for r in range(3) for s in range(5)]
    assert len({record["completion"] for record in records[:5]}) > 1
    assert set(summary["pass_at_k"]) == {"1", "2", "4"}


def test_pass_at_k_is_the_probability_over_all_choices_of_k_samples():
    correct, samples = [0, 1, 3, 6], 6
    for k in (1, 2, 4):
        rates = []
        for right in correct:
            flags = [True] * right + [False] * (samples - right)
            choices = list(itertools.combinations(flags, k))
            rates.append(sum(any(choice) for choice in choices) / len(choices))
        assert pass_at_k(correct, samples, k)["value"] == pytest.approx(sum(rates) / 4)
    assert pass_at_k([1, 0, 1], 1, 1)["low"] == pytest.approx(wilson_interval(2, 3)[0])


def test_how_tests_of_programs_were_judged_is_counted():
    records = [{"row": 0, "correct": True, "judged_outside": 2, "judged_inside": 1}]
    records.append({"row": 1, "correct": False, "judged_outside": 3, "judged_inside": 0})
    summary = summarise(records, 1)
    assert (summary["judged_outside"], summary["judged_inside"], summary["correct"]) == (5, 1, 1)
    assert "judged_inside" not in summarise([{"row": 0, "correct": True}], 1)


def test_a_prefill_begins_the_answer_and_is_scored_with_it(tiny, tmp_path):
    run(tiny, tmp_path, n=2, prefill="<answer>")
    records = [json.loads(line) for line in (tmp_path / GENERATIONS).read_text().splitlines()]
    assert all(record["completion"].startswith("<answer>") for record in records)
    ids, mask = tokenize_prompts(tiny[1], ["1="], prefill="<answer>")
    assert tiny[1].decode(ids[0]) == "1=<answer>" and mask.all()


def test_a_text_ends_behind_its_first_stop_string_and_the_row_with_its_block(tiny):
    model, tokenizer = tiny
    prompts, seeds = ["1=", "22=", "3="], torch.arange(3)
    config = DiffusionGenerationConfig(16, block_length=4, tokens_per_step=1, stop_at_eos=False, eos_token_ids=())
    whole, rollout = complete(model, tokenizer, prompts, config, seeds)
    stops = [whole[0][5], whole[1][2:4]]  # in the second block of one row, and the first of another
    texts, cut = complete(model, tokenizer, prompts, config, seeds, stop_strings=stops)
    for row, (text, full) in enumerate(zip(texts, whole, strict=True)):
        ends = [full.index(stop) + len(stop) for stop in stops if stop in full]
        assert text == full[: min(ends, default=None)]
        decoded = int(cut.revealed[row].sum())
        shown = [tokenizer.decode(rollout.completion_ids[row, :end], skip_special_tokens=True) for end in (4, 8, 12)]
        holds = [4 * n for n, part in enumerate(shown, 1) if any(stop in part for stop in stops)]
        assert decoded == min(holds, default=16)
        assert torch.equal(cut.completion_ids[row, :decoded], rollout.completion_ids[row, :decoded])
    assert len({int(n) for n in cut.revealed.sum(dim=1)}) > 1


def test_stop_strings_belong_to_what_an_evaluation_is(tiny, tmp_path):
    summary = run(tiny, tmp_path, stop_strings=["1"])
    assert summary["stop_strings"] == ["1"]
    records = [json.loads(line) for line in (tmp_path / GENERATIONS).read_text().splitlines()]
    assert all("1" not in record["completion"][:-1] for record in records)
    with pytest.raises(ValueError, match="stop_strings differ"):
        run(tiny, tmp_path)


def test_other_settings_in_the_same_folder_are_refused(tiny, tmp_path):
    run(tiny, tmp_path)
    with pytest.raises(ValueError, match="seed differ"):
        run(tiny, tmp_path, seed=1)


def test_another_model_or_other_rows_in_the_same_folder_are_refused(tiny, tmp_path):
    whole = run(tiny, tmp_path)
    other = create_tiny_model(hidden_size=16, num_layers=1, seed=1)
    with pytest.raises(ValueError, match=r"holds an evaluation with other settings \(weights differ\)"):
        run(other, tmp_path)
    task = get_task("sudoku")
    with pytest.raises(ValueError, match=r"\(rows differ\)"):
        evaluate(*tiny, task, task.load("test", 10, seed=1), CONFIG, tmp_path, batch_size=4)
    again = run(tiny, tmp_path)
    whole.pop("seconds"), again.pop("seconds")
    assert again == whole


def test_finished_generations_need_no_model(tiny, tmp_path):
    identity, task = module_identity(*tiny), get_task("sudoku")
    whole = run(tiny, tmp_path, identity=identity)
    again = evaluate(None, None, task, task.load("test", 10), CONFIG, tmp_path, batch_size=4, identity=identity)
    assert again["solve_rate"] == whole["solve_rate"] and again["weights"] == identity["weights"]


@pytest.mark.parametrize("left", ["generations", "parts"])
def test_generations_of_nobody_knows_which_model_are_refused_and_kept(tiny, tmp_path, left):
    if left == "generations":
        (tmp_path / GENERATIONS).write_text("mine")
    else:
        (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match=r"holds generations without a fingerprint.json: .* Choose another"):
        run(tiny, tmp_path)
    assert left == "parts" or (tmp_path / GENERATIONS).read_text() == "mine"


@pytest.mark.parametrize("fact", ["batch_size", "dtype"])
def test_unfinished_generations_of_another_machine_are_drawn_anew(tiny, tmp_path, monkeypatch, fact):
    run(tiny, tmp_path / "whole", machine={"dtype": "float32"})
    draw, calls = evaluation.generate, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluation, "generate", dying)
        run(tiny, tmp_path / "cut", machine={"dtype": "float32", "model": "here"})
    change = {"machine": {"dtype": "float32", "model": "moved"}}
    change |= {"batch_size": 3} if fact == "batch_size" else {"machine": {"dtype": "bfloat16"}}
    with pytest.warns(UserWarning, match=f"{fact} .* so its unfinished generations are drawn anew"):
        summary = run(tiny, tmp_path / "cut", **change)
    assert (tmp_path / "cut" / GENERATIONS).read_text() == (tmp_path / "whole" / GENERATIONS).read_text()
    assert {name: summary[name] for name in change["machine"]} == change["machine"]
    assert summary["batch_size"] == change.get("batch_size", 4)


def test_finished_generations_say_which_machine_drew_them(tiny, tmp_path, capsys):
    run(tiny, tmp_path, machine={"dtype": "float32", "model": "here"})
    capsys.readouterr()
    summary = run(tiny, tmp_path, batch_size=3, machine={"dtype": "bfloat16", "model": "there"})
    assert (summary["dtype"], summary["batch_size"], summary["model"]) == ("float32", 4, "here")
    line = "dtype float32 → bfloat16, batch_size 4 → 3 changes none of them."
    assert capsys.readouterr().out == f"{tmp_path}: the generations are there already; {line}\n"


def test_drawn_and_stored_outputs_do_not_replace_each_other(tiny, tmp_path):
    record = {"question": "1 + 1?", "generations": r"\boxed{2}", "ground_truth": 2}
    stored, gsm8k = tmp_path / "stored.jsonl", get_task("gsm8k")
    stored.write_text(json.dumps(record) + "\n")
    run(tiny, tmp_path / "drawn")
    before = (tmp_path / "drawn" / GENERATIONS).read_text()
    with pytest.raises(ValueError, match=r"\(command differ\)"):
        rescore(gsm8k, stored, tmp_path / "drawn")
    assert (tmp_path / "drawn" / GENERATIONS).read_text() == before
    assert rescore(gsm8k, stored, tmp_path / "rescored")["total"] == 1
    with pytest.raises(ValueError, match=r"\(command differ\)"):
        run(tiny, tmp_path / "rescored")
    stored.write_text(2 * (json.dumps(record) + "\n"))
    with pytest.raises(ValueError, match=r"\(stored differ\)"):
        rescore(gsm8k, stored, tmp_path / "rescored")


def test_generations_are_kept_with_their_scores(tiny, tmp_path):
    summary = run(tiny, tmp_path)
    records = [json.loads(line) for line in (tmp_path / GENERATIONS).read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(10))
    assert summary["n"] == 10
    assert summary["solve_rate"] == sum(record["correct"] for record in records) / 10
    assert summary["total"] == sum(record["cells_total"] for record in records)  # blanks, for Sudoku
    assert summary["correct"] == sum(record["cells_correct"] for record in records)
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


@pytest.mark.parametrize(("task", "right", "total"), [("gsm8k", 863, 1130), ("countdown", 50, 256)])
def test_d1s_parsers_give_d1s_numbers_on_stored_outputs(data_dir, tmp_path, task, right, total):
    stored = Path(data_dir) / "llada_generations" / f"{task}_256.jsonl"
    summary = rescore(get_task(task), stored, tmp_path, "d1")
    assert (summary["correct"], summary["total"]) == (right, total)
    assert json.loads((tmp_path / SUMMARY).read_text())["correct"] == right
    default = rescore(get_task(task), stored, tmp_path, "default")
    assert summary["other_parsers"]["default"]["correct"] == default["correct"]
    assert summary["other_parsers"]["default"]["differ"] == default["other_parsers"]["d1"]["differ"] > 0


def test_an_unknown_parser_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="parser='d2': task 'gsm8k' has default, d1"):
        rescore(get_task("gsm8k"), "no/such/file", tmp_path, "d2")


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path / "tiny")
    script = Path(evaluation.__file__).parent / "scripts" / "eval.py"
    argv = [str(script), "--task", "sudoku", "--num_examples", "24", "--batch_size", "5", "--max_new_tokens", "16"]
    argv += ["--model_name_or_path", str(tmp_path / "tiny"), "--temperature", "1.0", "--output_dir"]
    for processes in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        subprocess.run(
            [*launch, *argv, str(tmp_path / processes)], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        )
    assert (tmp_path / "1" / GENERATIONS).read_text() == (tmp_path / "2" / GENERATIONS).read_text()
    assert not (tmp_path / "2" / "parts").exists()


def test_a_prompt_that_does_not_fit_is_refused_before_the_first_draw(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_dllm.evaluation.complete", lambda *args, **kwargs: pytest.fail("drawn"))
    model, tokenizer = tiny
    rows = [{"prompt": "ab"}, {"prompt": "a" * (model.config.max_position_embeddings - 15)}]
    with pytest.raises(ValueError, match=r"row 1: .* max_new_tokens=16 are beyond"):
        evaluate(model, tokenizer, get_task("sudoku"), rows, DiffusionGenerationConfig(16), tmp_path / "long")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{question", "line 2, is not JSON"),
        ('{"question": "a"}', "line 2, has no .*: a line is a mapping of question, generations and ground_truth"),
        ("[1]", "line 2, has no "),
    ],
)
def test_stored_outputs_of_another_form_are_refused_by_line(tmp_path, line, message):
    stored = tmp_path / "stored.jsonl"
    right = json.dumps({"question": "q", "generations": ["a"], "ground_truth": "1"})
    stored.write_text(f"{right}\n{line}\n")
    with pytest.raises(ValueError, match=rf"stored\.jsonl, {message}"):
        rescore(get_task("gsm8k"), stored, tmp_path / "out")
