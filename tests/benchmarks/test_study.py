"""benchmarks/study.py at toy size: equal operations, logs that are kept, and the page that says what they say."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, BlockPseudoLikelihood, token_logps
from trl_dllm.models import create_tiny_model


pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'trl-dllm[plots]'")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "study.md"


@pytest.fixture(scope="module")
def study():
    """The module, importable by its name and with its neighbour, as `python benchmarks/study.py` has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("study", ROOT / "benchmarks" / "study.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "study", module)
        spec.loader.exec_module(module)
        yield module


def write_log(study, folder: Path, slug: str, seed: int, solved: list[int], steps=10, puzzles=100_000) -> None:
    """A finished run of Sudoku, of a few equal steps, that solved so many per cent, first before training."""
    method = study.METHODS_BY_SLUG[slug]
    facts = {"task": "sudoku", "method": method.name, "slug": slug, "seed": seed, "flops_budget": 1e9}
    lines = [{"step": i, "flops": i * 1e9 / steps, "reward": i / 20} for i in range(1, steps + 1)]
    marks = [
        {"mark": mark, "flops": mark * 1e9, "solved": s * puzzles // 100, "n": puzzles}
        for mark, s in zip(study.MARKS, solved[1:], strict=True)
    ]
    end = {"before": {"solved": solved[0] * puzzles // 100, "n": puzzles}, "marks": marks, "seconds": 1.0}
    folder.mkdir(exist_ok=True)
    study.log_path(folder, facts).write_text("".join(json.dumps(line) + "\n" for line in (facts, *lines, end)))


def test_tables_say_what_the_logs_say(study, tmp_path, capsys):
    for seed, (low, high) in enumerate([(50, 60), (52, 62), (48, 59)]):
        write_log(study, tmp_path / "logs", "diffu_grpo", seed, [30, 45, 47, low])
        write_log(study, tmp_path / "logs", "pkl", seed, [30, 40, 41, high])
    args = study.make_parser().parse_args(["--draw", "--logs", str(tmp_path / "logs"), "--figures", str(tmp_path)])
    tables = study.main(args)
    found = {line.split(" | ")[1]: line.split(" | ")[2] for line in tables["claims"].splitlines()[2:]}
    # 10, 10 and 11 points: 10.33 and t(2) · 0.577 / √3 = 1.43 beside it. At a quarter each seed lost by 5, with the
    # interval of 100,000 puzzles: 1.96 · √((0.45 · 0.55 + 0.4 · 0.6) / 100,000 / 3).
    assert found["with all of them PKL leads d1"].startswith(
        "+10.3 (+8.9 to +11.8), above 0 in 3 of 3 seeds: **borne out**"
    )
    assert found["at few operations (a quarter) d1 leads PKL"].startswith(
        "+5.0 (+4.8 to +5.2), above 0 in 3 of 3 seeds: **borne out**"
    )
    assert found["PKL beats PKL-U"].startswith("not run")
    row = next(line for line in tables["sudoku"].splitlines() if "| diffu-GRPO |" in line)
    assert row == "| denoiser | diffu-GRPO | 3 | 30.0 | 45.0 | 47.0 | 50.0 (45.0 to 55.0) | 0.0 | 10 | 0.1 |"
    out = capsys.readouterr().out
    assert tables["claims"] in out and tables["sudoku"] in out
    assert {path.name for path in tmp_path.glob("*.png")} == {"study_sudoku.png", "study_held_out.png"}


def test_a_claim_is_contradicted_or_undecided(study, tmp_path):
    for seed in range(3):
        write_log(study, tmp_path, "diffu_grpo", seed, [30, 50, 50, 60])
        write_log(study, tmp_path, "pkl", seed, [30, 50, 50, 50 + seed])
        write_log(study, tmp_path, "pkl_u", seed, [30, 50, 50, 40 + 20 * seed])
    results = study.Results(tmp_path)
    verdicts = {c.text: study.judge(results, c, "sudoku").partition(": ")[2] for c in study.CLAIMS}
    assert verdicts["with all of them PKL leads d1"] == "**contradicted**"
    assert verdicts["PKL-U beats d1"] == "**undecided**"


def test_seeds_that_agree_by_chance_decide_nothing(study, tmp_path):
    for seed in range(3):
        write_log(study, tmp_path, "diffu_grpo", seed, [30, 50, 50, 60], puzzles=100)
        write_log(study, tmp_path, "pkl", seed, [30, 50, 50, 65], puzzles=100)
    claim = next(c for c in study.CLAIMS if c.text == "with all of them PKL leads d1")
    assert study.judge(study.Results(tmp_path), claim, "sudoku").endswith("**undecided**")


def test_likelihoods_and_costs_are_judged(study, tmp_path):
    kl = {"StepMerge, N = 1": 0.2, "StepMerge, N = 2": 0.1, "StepMerge, N = 4": 0.05, "StepMerge, N = 8": 0.0}
    kl |= {"PKL": 0.1, "PKL-U": 0.11, "PKL-T": 0.4}
    lines = [
        {"name": name, "logp": -0.1 - value, "divergence": 10 * value, "kl": value, "kl_error": 0.01}
        for name, value in kl.items()
    ]
    (tmp_path / "likelihood_sudoku_denoiser.json").write_text(json.dumps({"rows": 4, "lines": lines}))
    for slug in ("diffu_grpo", "pkl_u", "pkl_t"):
        write_log(study, tmp_path, slug, 0, [30, 50, 50, 60], steps=8 if slug == "pkl_t" else 10)
    found = study.judge_likelihoods(study.Results(tmp_path), "sudoku")
    said = {key[1].partition(" (")[0]: value for key, value in found.items()}
    assert said["D_N falls with N"] == "2.00, 1.00, 0.50: **borne out**"
    assert said["AnyOrder is far off on a plain denoiser"] == "-0.10, -0.50, -0.30: **borne out**"
    assert said["PKL is closer than d1"] == "+0.100 ± 0.028: **borne out**"
    assert said["PKL-T is closer than d1"] == "-0.200 ± 0.028: **contradicted**"
    assert said["PKL-U is less close than PKL"] == "+0.010 ± 0.028: **undecided**"
    assert said["a step of PKL-U costs what one of d1 does"] == "1.00 times: **borne out**"
    assert said["a step of PKL-T costs what one of d1 does"] == "1.25 times: **contradicted**"


def test_any_order_segments_are_exact_with_a_cut_a_step_and_the_mean_field_with_one(study):
    model, tokenizer = create_tiny_model()
    prompt = tokenizer(["2041000014020010=", "12="], return_tensors="pt", padding=True)
    config = DiffusionGenerationConfig(
        max_new_tokens=12, block_length=6, diffusion_steps=6, temperature=1.0, decoding="any_order", cache="exact"
    )
    rollout = generate(model, prompt["input_ids"], prompt["attention_mask"], config)

    def logps(estimator):
        return token_logps(model, rollout, estimator).logps[rollout.counted]

    exact = logps(AnyOrder())
    assert torch.allclose(logps(study.AnyOrderSegments(6)), exact, atol=1e-5)
    assert not torch.allclose(logps(study.AnyOrderSegments(3)), exact, atol=1e-2)
    assert torch.equal(logps(study.AnyOrderSegments(1)), logps(BlockPseudoLikelihood(12, 1, "isolated")))


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory) -> argparse.Namespace:
    """Three methods on Countdown and both bases, all of a few steps."""
    folder = tmp_path_factory.mktemp("study")
    argv = ["--seeds", "0", "--tasks", "countdown", "--methods", "stepmerge_n4", "justgrpo", "any_order_ddpo"]
    argv += ["--scale", "0.05", "--rows", "16", "--num_examples", "8", "--sft_steps", "2"]
    argv += ["--runs", str(folder / "runs"), "--logs", str(folder / "logs"), "--figures", str(folder)]
    args = study.make_parser().parse_args(argv)
    study.main(args)
    return args


@pytest.mark.slow
def test_methods_take_equal_operations(study, finished):
    logs = {path.stem: study.read_log(path) for path in finished.logs.glob("*.jsonl")}
    assert set(logs) == {f"countdown_{slug}_seed0" for slug in finished.methods}
    budget = 0.05 * study.TASKS["countdown"].budget
    for facts, steps, end in logs.values():
        flops = [step["flops"] for step in steps]
        assert flops[-1] >= budget and all(value < budget for value in flops[:-1]), "no step beyond"
        assert facts["flops_budget"] == budget and end["marks"][-1]["mark"] == 1.0 and end["before"]["n"] == 8
        assert ("own" in end["marks"][-1]) == (facts["slug"] == "justgrpo")
    # On one base, a method with more forwards a step takes fewer steps.
    assert len(logs["countdown_stepmerge_n4_seed0"][1]) > len(logs["countdown_justgrpo_seed0"][1])
    assert len(list(finished.logs.glob("likelihood_countdown_*.json"))) == 2


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_other_settings_are_refused(study, finished, monkeypatch):
    monkeypatch.setattr(study, "train", None)  # would raise if it were called
    study.main(finished)
    other = argparse.Namespace(**{**vars(finished), "scale": 0.1})
    with pytest.raises(ValueError, match="holds another run: flops_budget="):
        study.main(other)


def test_without_logs_it_says_what_to_do(study, tmp_path):
    with pytest.raises(ValueError, match="holds no log"):
        study.main(study.make_parser().parse_args(["--draw", "--logs", str(tmp_path)]))


def test_the_page_has_the_tables_of_the_kept_logs(study, tmp_path):
    args = study.make_parser().parse_args(["--draw", "--figures", str(tmp_path)])
    text = PAGE.read_text()
    for name, table in study.tables(study.Results(args.logs), args.tasks).items():
        assert table in text, f"docs/study.md: replace the table {name!r} by what --draw prints"
