"""benchmarks/language.py at toy size: equal operations, prompts and none, logs that are kept and drawn again."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
from helpers_tasks import write_reviews


pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed: pip install 'trl-dllm[language]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'trl-dllm[plots]'")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

_spec = importlib.util.spec_from_file_location("language_comparison", BENCHMARKS / "language.py")
comparison = importlib.util.module_from_spec(_spec)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(BENCHMARKS)  # as the script finds the modules beside it
    _spec.loader.exec_module(comparison)


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint, tmp_path_factory) -> argparse.Namespace:
    folder = tmp_path_factory.mktemp("comparison")
    texts = [f"A {word} film{i} is {word} fun" for word in ("great", "awful", "odd") for i in range(60)]
    data = write_reviews(folder / "data", texts)
    argv = ["--model", tiny_checkpoint, "--data_dir", str(data), "--runs", str(folder / "runs")]
    argv += ["--logs", str(folder / "logs"), "--figure", str(folder / "figure.png"), "--seeds", "0"]
    argv += ["--sft_steps", "2", "--num_examples", "3", "--flops", "4e8", "--methods", "AnyOrder", "StepMerge, N = 4"]
    return comparison.make_parser().parse_args(argv)


@pytest.fixture(scope="module")
def table(arguments) -> list[tuple]:
    return comparison.main(arguments)


def test_methods_take_equal_operations_with_prompts_and_without(arguments, table):
    assert [row[:4] for row in table] == [
        ("blocks1", words, name, 1) for words in (3, 0) for name in ("AnyOrder", "StepMerge, N = 4")
    ]
    logs = {path.stem: comparison.read_log(path) for path in arguments.logs.glob("*.jsonl")}
    assert set(logs) == {f"blocks1_words{w}_{m}_seed0" for w in (0, 3) for m in ("any_order", "step_merge")}
    for facts, steps, end in logs.values():
        flops = [step["flops"] for step in steps]
        assert flops[-1] >= arguments.flops and all(value < arguments.flops for value in flops[:-1]), "no step beyond"
        assert end["before"]["n"] == end["after"]["n"] == 3 == len(end["samples"])
        assert all((sample["prompt"] == "") == (facts["prompt_words"] == 0) for sample in end["samples"])
    assert arguments.figure.stat().st_size > 1000
    assert not list(arguments.runs.glob("*/*_seed0/checkpoint-*")) and list(arguments.runs.glob("*/sft/checkpoint-*"))


def test_what_is_finished_is_not_run_again_and_draws_the_same(arguments, table, monkeypatch):
    monkeypatch.setattr(comparison, "train", None)  # would raise if it were called
    assert comparison.main(arguments) == table
    assert comparison.main(argparse.Namespace(**{**vars(arguments), "draw": True, "flops": None})) == table


def test_logs_of_other_settings_are_refused(arguments, table):
    other = argparse.Namespace(**{**vars(arguments), "flops": 2.5e9})
    with pytest.raises(ValueError, match=r"holds another run: flops_budget=400000000.0 there and 2500000000.0 here"):
        comparison.main(other)


def test_without_operations_or_logs_it_says_what_to_give(tmp_path):
    for words in ([], ["--flops", "-1"]):
        with pytest.raises(ValueError, match=r"--flops=.* must be a positive number"):
            comparison.main(comparison.make_parser().parse_args(words))
    with pytest.raises(ValueError, match="holds no log"):
        comparison.main(comparison.make_parser().parse_args(["--draw", "--logs", str(tmp_path)]))


def test_the_methods_of_a_masked_diffusion_model_train_on_one(arguments, tmp_path):
    argv = {"models": ["masked"], "methods": ["PKL-U, 8 at once"], "prompt_words": [3], "logs": tmp_path / "logs"}
    (row,) = comparison.main(argparse.Namespace(**{**vars(arguments), **argv}))
    assert row[:4] == ("masked", 3, "PKL-U, 8 at once", 1)
    assert [path.name for path in argv["logs"].iterdir()] == ["masked_words3_pkl_u_seed0.jsonl"]
    of = [json.loads(path.read_text())["of"] for path in (arguments.runs / "masked_words3").glob("*/summary.json")]
    assert len(of) == 2 and of[0]["model"] != of[1]["model"], "the base, and what came of it"
    assert of[0]["generation"] == of[1]["generation"] and "remasking='random'" in of[0]["generation"], of


def test_every_file_that_is_kept_is_a_whole_log():
    for path in sorted((Path(comparison.__file__).parent / "language").glob("*.jsonl")):
        facts, steps, end = comparison.read_log(path)
        assert comparison.log_path(path.parent, facts) == path and facts["method"] in comparison.RECIPES
        assert steps[-1]["flops"] >= facts["flops_budget"] and {"before", "after", "samples"} <= set(end)
        assert json.dumps(facts) == path.open().readline().strip()


def run_of(method: str, seed: int, before: float, after: float) -> tuple:
    measures = [{"mean": mean, "low": mean - 0.098, "high": mean + 0.098} for mean in (before, after)]
    facts = {"method": method, "model": "blocks1", "prompt_words": 3, "seed": seed}
    return facts, [], dict(zip(("before", "after"), measures, strict=True))


def test_methods_are_compared_over_common_seeds_and_all_with_one_base(capsys):
    one = [run_of("AnyOrder", seed, 0.1, value) for seed, value in enumerate((0.5, 0.6, 0.9))]
    other = [run_of("DDPO", seed, 0.1, value) for seed, value in enumerate((0.4, 0.7))]
    ours, base = comparison._scores(one), comparison._scores(one, "before")
    assert comparison.difference(ours, comparison._scores(other)).values == pytest.approx((0.1, -0.1))
    base = comparison.difference(ours, base, one_base=True)
    student = 4.303 * 0.2081666 / 3**0.5
    assert base.mean == pytest.approx(1.7 / 3) and base.high - base.mean == pytest.approx(
        (student**2 + 0.098**2) ** 0.5, abs=1e-4
    )
    assert comparison.difference(ours, comparison._scores([run_of("DDPO", 5, 0.1, 0.3)])) is None
    comparison.print_claims([*one, *other], [("blocks1", 3)])
    said = capsys.readouterr().out.splitlines()[3:]
    assert [line.split(" | ")[0] for line in said] == [
        "| d2 Fig. 6: AnyOrder above the base",
        "| d2 Tab. 2: AnyOrder above DDPO",
    ], "the others have no runs"
    assert said[0].endswith("above 0 in 3 of 3 seeds | borne out |") and said[1].endswith("1 of 2 seeds | undecided |")
