"""The language pipeline at toy size: the same code on a tiny model, a toy corpus and a few steps."""

import argparse
import json
from types import SimpleNamespace

import pytest
from helpers_tasks import write_reviews
from transformers import TrainerControl

from trl_dllm.scripts import language
from trl_dllm.scripts.language import StopAtBudget, make_parser, prepare


NAMES = ("before", "after")


def steps_until_it_stops(callback: StopAtBudget, clock: list[float], took: list[float], first: int = 0) -> int:
    """Steps that a run has taken in the end whose `i`-th one takes `took[i]` seconds, all further ones the last."""
    args, state, control = SimpleNamespace(max_steps=50), SimpleNamespace(global_step=first), TrainerControl()
    clock[0] += 1000  # loading
    callback.on_train_begin(args, state, control)
    while not control.should_training_stop and state.global_step < args.max_steps:
        clock[0] += took[min(state.global_step - first, len(took) - 1)]
        state.global_step += 1
        callback.on_step_end(args, state, control)
        assert control.should_save == control.should_training_stop
    return state.global_step


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(language.time, "monotonic", lambda: now[0])
    return now


def test_steps_are_those_that_fit_into_the_budget(tmp_path, clock):
    path = tmp_path / "run" / "time.json"
    assert steps_until_it_stops(StopAtBudget(20.5, path, "sft"), clock, [2.0]) == 10
    assert json.loads(path.read_text())["sft"] == {"seconds": 20.0, "steps": 10, "seconds_a_step": 2.0}
    assert steps_until_it_stops(StopAtBudget(20.5, path, "slower"), clock, [1.0, 1.0, 4.0]) == 6  # 18 s, then 3 more
    assert steps_until_it_stops(StopAtBudget(1000.0, path, "grpo"), clock, [1.0]) == 50, "no more than the recipe's"
    assert steps_until_it_stops(StopAtBudget(1.0, path, "slow"), clock, [5.0]) == 1, "one at least"
    assert set(json.loads(path.read_text())) == {"sft", "slower", "grpo", "slow"}


def test_what_earlier_sessions_took_counts(tmp_path, clock):
    path = tmp_path / "time.json"
    steps_until_it_stops(StopAtBudget(10.0, path, "sft"), clock, [2.0])
    resumed = StopAtBudget(20.5, path, "sft")
    assert steps_until_it_stops(resumed, clock, [2.0], first=5) == 10
    assert resumed.spent == 20, "and not the time between them"


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "soon"])
def test_a_budget_that_is_no_time_is_refused(budget):
    with pytest.raises(ValueError, match=f"'{budget}' must be a positive number of minutes"):
        make_parser().parse_args(["--budget", budget])


def test_what_is_named_is_not_fetched(tmp_path):
    model, data_dir = tmp_path / "model", tmp_path / "data"
    assert prepare(tmp_path / "run", model, data_dir) == (model, data_dir)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """(arguments, summary) of the pipeline on a tiny model."""
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed: pip install 'trl-dllm[language]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'trl-dllm[plots]'")
    folder = tmp_path_factory.mktemp("language")
    adjectives, films = ("great", "awful", "odd", "slow", "warm"), range(40)
    texts = [f"A {word} film{i} is {word} fun" for word in adjectives for i in films]
    data = write_reviews(folder / "data", texts)
    argv = ["--model", tiny_checkpoint, "--data_dir", str(data), "--output_dir", str(folder / "run")]
    args = make_parser().parse_args([*argv, "--sft_steps", "3", "--grpo_steps", "2", "--num_examples", "4"])
    return args, language.main(args)


def test_the_pipeline_leaves_models_measures_samples_and_curves(run):
    args, summary = run
    folder = args.output_dir
    assert (summary["sft_steps"], summary["grpo_steps"]) == (3, 2)
    for name in NAMES:
        found = summary[name]
        assert -1 <= found["low"] <= found["mean"] <= found["high"] <= 1 and found["n"] == 4
        assert 0 < found["distinct_2"] <= 1 and 0 <= found["ended"] <= 1 and 0 < found["tokens"] <= 32
        assert 0 < found["cross_entropy"] < 10
        samples = [json.loads(line) for line in (folder / name / "samples.jsonl").open()]
        assert len(samples) == 4 == len({sample["prompt"] for sample in samples})
        assert sum(sample["compound"] for sample in samples) / 4 == pytest.approx(found["mean"])
    assert json.loads((folder / "summary.json").read_text()) == summary
    decoded = [json.loads((folder / name / "summary.json").read_text())["of"]["generation"] for name in NAMES]
    assert decoded[0] == decoded[1] and "diffusion_steps=32" in decoded[0]
    page = (folder / "samples.txt").read_text()
    assert all(sample["prompt"] in page.splitlines() for sample in samples)
    assert (folder / "curves.png").stat().st_size > 1000
    assert (folder / "grpo" / "model.safetensors").exists()


def test_the_pipeline_given_again_takes_no_step_and_says_the_same(run, capsys):
    args, summary = run
    again = language.main(args)
    said = capsys.readouterr().out
    assert "is already trained: 3 of 3 steps" in said and "is already trained: 2 of 2 steps" in said
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_the_evaluation_is_run_again_for_another_model(run):
    """A stored summary belongs to the weights that it was made with."""
    args, summary = run
    folder = args.output_dir
    rows = language.get_task("reviews").load("test", 4, data_dir=str(args.data_dir))
    found = language.examine(folder / "grpo", folder / "sft", folder / "before", rows, args.seed)
    assert found["of"]["model"] == json.loads((folder / "after" / "summary.json").read_text())["of"]["model"]
    assert found["mean"] == summary["after"]["mean"]


def test_more_steps_go_on_where_fewer_ended(run, capsys):
    args, _ = run
    longer = argparse.Namespace(**{**vars(args), "grpo_steps": 3})
    assert language.main(longer)["grpo_steps"] == 3
    assert "Resuming from" in capsys.readouterr().out
