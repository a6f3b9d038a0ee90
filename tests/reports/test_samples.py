"""Measures of sampled texts against numbers that are known."""

import math

import pytest
import torch
from oracles import sharp_model

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder
from trl_dllm.reports.samples import cross_entropy, distinct, mean_interval, t_quantile


def test_distinct_counts_runs_of_words_over_all_texts():
    assert distinct(["best best best best"], 1) == 1 / 4 and distinct(["best best best best"], 2) == 1 / 3
    assert distinct(["a b", "A B", "b c"], 1) == 3 / 6 and distinct(["a b", "A B", "b c"], 2) == 2 / 3
    assert distinct(["a", "b"], 2) == 0, "no run goes from one text to the next"
    assert distinct([], 1) == 0


def test_in_groups_it_does_not_depend_on_how_many_texts_there_are():
    four = ["a b", "c d", "a b", "e f"]
    assert distinct(four, 2, group=2) == 1.0 > distinct(four, 2) == 3 / 4
    assert distinct(four, 2, group=3) == (2 / 3 + 1) / 2 and distinct(four, 2, group=4) == 3 / 4


def test_the_interval_is_the_normal_one():
    found = mean_interval([0.0, 1.0, 2.0, 3.0])
    half = 1.959964 * math.sqrt(5 / 3 / 4)  # the sample variance is 5/3
    assert found == pytest.approx({"mean": 1.5, "low": 1.5 - half, "high": 1.5 + half})
    assert mean_interval([0.25]) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    with pytest.raises(ValueError, match="values"):
        mean_interval([])


def test_cross_entropy_under_the_sampler_itself_is_what_it_drew_with_and_under_another_is_more():
    """At temperature 1 the any-order likelihood of the sampler's own model is the sampler's log-probs."""
    model, other = sharp_model("llada"), sharp_model("llada", seed=1)
    config = DiffusionGenerationConfig(
        max_new_tokens=12, block_length=4, diffusion_steps=12, temperature=1.0, decoding="any_order", cache="exact"
    )
    prompts = torch.randint(5, 20, (6, 3), generator=torch.Generator().manual_seed(0))
    rollout = generate(model, prompts, torch.ones_like(prompts), config, torch.arange(6))
    rollout = type(rollout)(**{**rollout.__dict__, "counted": rollout.counted & (torch.arange(12) < 9)})
    drawn = -(rollout.logps * rollout.counted).sum() / rollout.counted.sum()
    assert cross_entropy(model, rollout, AnyOrder()) == pytest.approx(float(drawn), abs=1e-5)
    assert cross_entropy(model, rollout, AnyOrder(), batch_size=2) == pytest.approx(float(drawn), abs=1e-5)
    assert cross_entropy(other, rollout, AnyOrder()) > float(drawn) + 0.1


@pytest.mark.parametrize(
    ("df", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_students_t_is_the_tables(df, value):
    """Of any table of the 97.5 % points."""
    assert t_quantile(df) == pytest.approx(value, abs=5e-5)


def test_one_value_has_no_t_interval():
    with pytest.raises(ValueError, match="df=0 must be at least 1"):
        t_quantile(0)
