"""`trl-dllm trace`: a page of what a model draws, of two models' completions, or of trajectories that a file has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracles import sharp_model

from trl_dllm import cli
from trl_dllm.generation import DiffusionGenerationConfig, decoding_of, save_decoding
from trl_dllm.likelihood import ExactTrajectory, MeanField, token_logps
from trl_dllm.models import create_tiny_model
from trl_dllm.scripts import trajectories
from trl_dllm.step_maps import read_lines, read_rollout
from trl_dllm.tasks import get_task
from trl_dllm.trace import read_page


SETTINGS = DiffusionGenerationConfig(17, block_length=17, diffusion_steps=4)


def save(folder: Path, seed: int = 0, family: str = "llada", config=SETTINGS, **kwargs) -> str:
    """A checkpoint that says how it is decoded, and whose predictions are far from uniform."""
    sharp_model(family, seed=seed, dtype=torch.float32, **kwargs).save_pretrained(folder)
    create_tiny_model(hidden_size=16, num_layers=1)[1].save_pretrained(folder)
    save_decoding(decoding_of(config), folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("model"))


def trace(tmp_path, *argv: str) -> dict:
    path = tmp_path / "page.html"
    cli.main(["trace", *argv, "--output", str(path)])
    return read_page(path)


def test_a_page_of_a_task_has_its_grid_and_rewards(model, tmp_path, capsys):
    page = trace(tmp_path, "--model_name_or_path", model, "--task", "sudoku", "--num_examples", "2", "--seed", "7")
    assert f"2 completions: open {tmp_path / 'page.html'} in a browser." in capsys.readouterr().out
    ((head,), rows) = page["models"], [row for (row,) in page["examples"]]
    assert head["name"] == model and head["facts"]["diffusion_steps"] == 4 and head["facts"]["temperature"] == 1.0
    assert head["facts"]["task"] == "sudoku" and head["facts"]["seed"] == 7
    task = get_task("sudoku")
    for row, columns in zip(rows, task.load("test", 2, seed=7), strict=True):
        assert "".join(head["vocab"][str(token)] for token in row["prompt"]) == columns["prompt"]
        texts = [head["vocab"][str(token)] for token, counts in zip(row["ids"], row["counted"], strict=True) if counts]
        text = "".join(texts).removesuffix("<eos>")
        expected = {"cells": task.rewards["cells"]([text], [columns["puzzle"]], [columns["solution"]])[0]}
        assert row["rewards"] == {**expected, "correct": False}
        given = [cell["given"] or "0" for cell in row["grid"]["cells"]]
        assert "".join(given) == columns["puzzle"] and row["grid"]["box"] == [2, 2]
        assert max(row["step"]) == 3 and row["estimates"][0]["name"] == "exact"


def test_two_models_complete_the_same_prompts_with_the_same_seeds(model, tmp_path):
    other = save(tmp_path / "other", seed=1, config=DiffusionGenerationConfig(12, block_length=6, diffusion_steps=6))
    source = ["--task", "sudoku", "--num_examples", "2", "--no_estimates"]
    page = trace(tmp_path, "--model_name_or_path", model, "--compare", other, *source)
    assert [head["name"] for head in page["models"]] == [model, other]
    for own, name in enumerate((model, other)):
        alone = trace(tmp_path, "--model_name_or_path", name, *source)
        assert [row[own] for row in page["examples"]] == [row for (row,) in alone["examples"]]
    assert {(len(a["ids"]), len(b["ids"])) for a, b in page["examples"]} == {(17, 12)}, "each as it was trained"
    assert [row[1]["blocks"] for row in page["examples"]] == [[0, 6]] * 2
    assert all(row["estimates"] == [] for pair in page["examples"] for row in pair)


@pytest.mark.parametrize("task", [True, False])
def test_stored_trajectories_are_shown_as_they_are(model, tmp_path, task):
    """The file's log-probs where it has some, the model's where it has none."""
    path, puzzle = tmp_path / "drawn.jsonl", "0423320003102000="
    words = ["generate", "--model_name_or_path", model, "--prompt", puzzle, "--prompt", "1+2=", "--temperature", "0.8"]
    cli.main([*words, "--save_rollouts", str(path)])
    lines = [line for _, line in read_lines(path)]
    lines[0] |= {"rewards": {"mine": 0.25, "none": None, "words": "no number"}, "logprobs": None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--model_name_or_path", model, "--rollouts", str(path), *["--task", "sudoku"] * task]
    page, rollout = trace(tmp_path, *argv), read_rollout(path)
    loaded = sharp_model("llada", dtype=torch.float32)
    with torch.no_grad():
        scores = {
            name: token_logps(loaded, rollout, estimator).logps
            for name, estimator in (("exact", ExactTrajectory()), ("mean field (d1)", MeanField()))
        }
    for i, (row,) in enumerate(page["examples"]):
        counted = rollout.counted[i]
        assert row["step"] == rollout.unmask_step[i].tolist() and row["blocks"] == [0]
        found = torch.tensor([value if value is not None else torch.nan for value in row["logp"]])
        assert torch.allclose(found[counted], scores["exact"][i][counted], atol=1e-4)
        estimates = {line["name"]: line["logps"] for line in row["estimates"]}
        for name, logps in scores.items():
            for value, counts, logp in zip(estimates[name], counted.tolist(), logps[i].tolist(), strict=True):
                assert (value is not None) is counts and (not counts or value == pytest.approx(logp, abs=1e-4))
    grids = [row["grid"] for (row,) in page["examples"]]
    assert (grids[0] is not None) is task and grids[1] is None, "the second prompt is no puzzle"
    assert [row["rewards"] for (row,) in page["examples"]] == [{"mine": 0.25, "none": None}, {}]
    assert "where the file has none" in page["models"][0]["facts"]["probabilities"]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llada", DiffusionGenerationConfig(12, block_length=6, diffusion_steps=4, decoding="any_order")),
        ("sdar", DiffusionGenerationConfig(12, block_length=4, diffusion_steps=12)),
    ],
    ids=["any order", "block-causal"],
)
def test_exact_is_what_the_sampler_saw_however_it_decodes(tmp_path, family, config):
    name = save(tmp_path / "model", family=family, config=config, **({"block_size": 4} if family == "sdar" else {}))
    page = trace(tmp_path, "--model_name_or_path", name, "--prompt", "1+2=", "--prompt", "abcdefg", "--chat")
    for (row,) in page["examples"]:
        exact = row["estimates"][0]["logps"]
        assert [logp for logp, counts in zip(row["logp"], row["counted"], strict=True) if counts] == pytest.approx(
            [value for value in exact if value is not None], abs=2e-4
        )
        assert len(row["blocks"]) > 1 and row["grid"] is None and row["rewards"] == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"Name a task .--task., prompts .--prompt. or a file of trajectories .--rollouts."),
        (["--task", "sudoku", "--prompt", "a"], "Name a task"),
        (["--rollouts", "a.jsonl", "--compare", "m"], r"compare='m' with rollouts='a\.jsonl': the file has its"),
        (["--rollouts", "a.jsonl", "--prompt", "m"], r"prompt=\['m'\] with rollouts"),
        (["--rollouts", "none.jsonl"], r"none\.jsonl"),
        (["--rollouts", "none.jsonl", "--dry_run"], r"dry_run=True with rollouts='none\.jsonl'"),
        (["--task", "sudoku", "--cfg_scale", "1.5"], r"cfg_scale=1\.5: the estimators do not follow guidance"),
        (
            ["--task", "sudoku", "--output", "."],
            r"output='\.' is a folder; name the file to write, such as trace\.html",
        ),
        (["--task", "sudok"], "did you mean 'sudoku'"),
        (["--task", "sudoku", "--compare", "no/model"], "compare='no/model' cannot be read"),
        (["--task", "sudoku", "--compare_adapter", "no/adapter"], "compare_adapter='no/adapter' cannot be read"),
    ],
)
def test_what_is_to_be_mended_ends_with_one_line(model, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trajectories, "load_model", lambda args: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match=message) as ended:
        cli.main(["trace", "--model_name_or_path", model, *argv])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())


def test_a_dry_run_loads_and_writes_nothing(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trajectories, "load_model", lambda args: pytest.fail("the model was loaded"))
    copied = shutil.copytree(model, tmp_path / "copy")
    argv = ["--model_name_or_path", model, "--compare", str(copied), "--prompt", "1="]
    cli.main(["trace", *argv, "--dry_run", "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.count("forward") >= 2 and not (tmp_path / "page.html").exists()
