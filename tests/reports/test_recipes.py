"""The table of recipes is the files' own, and its page in docs is up to date."""

from pathlib import Path

import pytest

from trl_dllm.recipe import recipe_paths
from trl_dllm.reports.recipes import markdown, method, notice, recipe_tables
from trl_dllm.scripts import grpo


ROWS = {f"{folder}/{row['recipe']}": row for folder, rows in recipe_tables().items() for row in rows}
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == markdown(), "run: trl-dllm recipe --markdown > docs/recipes.md"


def test_every_recipe_has_a_row_with_a_method_and_what_to_notice():
    assert list(ROWS) == list(recipe_paths())
    for name, path in recipe_paths().items():
        title, text = method(path), notice(path)
        assert title.endswith(".") and "trl-dllm " not in title and 20 < len(title) < 240, name
        assert text.endswith(".") and 20 < len(text) < 140, name
        assert (ROWS[name]["method"], ROWS[name]["what to notice"]) == (title, text)


def test_a_row_says_what_the_recipe_sets():
    row = ROWS["llada_8b/grpo/gsm8k_any_order"]
    assert row["estimator"] == "any_order, score_temperature 1.0"
    assert row["decoding"] == (
        "256 tokens in 128 steps, blocks of 32, low_confidence, temperature 0.9, decoding any_order, cache exact"
    )
    assert (row["loss"], row["KL"]) == ("grpo, scale_rewards group, epsilon 0.5", "beta 0.04, k3")
    assert row["inner iterations"] == "2"
    row = ROWS["llada_8b/grpo/gsm8k_espo"]
    assert row["loss"] == "grpo, scale_rewards none, epsilon 0.2, ratio of a sequence"
    assert row["KL"] == "beta 0.001, k3"
    assert ROWS["llada_8b/grpo/gsm8k_wd1"]["loss"] == "wd1, scale_rewards none"
    assert ROWS["llada_8b/grpo/gsm8k_spg"]["loss"] == "bnpo, scale_rewards none, no ratio"
    assert ROWS["tiny_llada/sft/sudoku_any_order"]["trained"] == "all"
    assert ROWS["llada_8b/sft/s1k_d1"]["trained"] == "LoRA r 128 on q_proj, k_proj, v_proj"


@pytest.mark.parametrize("name", [name for name in ROWS if "/grpo/" in name])
def test_a_rows_numbers_are_those_that_the_script_gets(name):
    """Defaults included: the table reads files and fields, the script parses."""
    _, args, _ = grpo.make_parser().parse_args_and_config(
        ["--config", name, "--use_cpu", "true", "--bf16", "false", "--output_dir", "runs/none"]
    )
    row = ROWS[name]
    steps = len(args.generation_config().schedule) * args.max_completion_length // args.block_length
    assert row["estimator"].split(", ")[0] == args.estimator
    assert row["decoding"].startswith(f"{args.max_completion_length} tokens in {steps} steps, ")
    assert f"blocks of {args.block_length}, {args.remasking}, temperature {args.temperature}" in row["decoding"]
    assert ("decoding any_order" in row["decoding"]) == (args.decoding == "any_order")
    assert row["loss"].startswith(f"{args.loss_type}, scale_rewards {args.scale_rewards}")
    assert (f"epsilon {args.epsilon:g}" in row["loss"]) == (
        args.loss_type != "wd1" and args.ratio_denominator != "current"
    )
    assert row["KL"] == ("none" if args.beta == 0 else f"beta {args.beta:g}, {args.kl_estimator}")
    assert row["inner iterations"] == str(args.num_iterations)
