"""Decoding of block-causal models and of growing canvases against one row and one token at a time
(docs/methods.md §2.8 and §3.1, identity 12)."""

from dataclasses import replace

import pytest
import torch
from cases import (
    PROMPTS,
    SEEDS,
    SHIFT,
    assert_equals_slow_decoder,
    assert_same_rollout,
    common_eos,
    forwards_of,
    sample,
)
from oracles import block_causal_logits, block_starts, left_pad, sharp_model

from trl_dllm.blocks import ALIGNMENTS, Blocks
from trl_dllm.generation import DiffusionGenerationConfig, generate


SIZE = 4
BLOCK = {"block_length": SIZE, "stop_at_eos": False}
CACHES = [None, "exact"]


@pytest.fixture(scope="module")
def model_of():
    models = {}

    def get(alignment: str = "position", size: int = SIZE):
        if (alignment, size) not in models:
            model = sharp_model("sdar", block_size=size)
            model.config.block_alignment = alignment
            models[alignment, size] = model
        return models[alignment, size]

    return get


def assert_equals_oracle(model, rollout, *prompts_and_seeds, size=SIZE, alignment="position", **settings):
    def of_prompt(prompt):
        return {
            "starts": block_starts(len(prompt), 12, size, alignment),
            "logits_of": block_causal_logits(size, len(prompt), alignment),
        }

    settings = {"remasking": "low_confidence", "block_length": size, "shift": 0, **settings}
    assert_equals_slow_decoder(model, rollout, *prompts_and_seeds, of_prompt=of_prompt, **settings)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("steps, schedule", [(3, [4]), (6, [2, 2]), (9, [2, 1, 1]), (12, [1] * 4)])
def test_identity_12_cached_and_uncached_decoding_equal_slow_decoder(model_of, cache, alignment, steps, schedule):
    """Rows whose prompt lengths leave 3, 3, 1 and 1 over the blocks of four; blocks cut by them take fewer steps."""
    model = model_of(alignment)
    rollout = sample(model, cache=cache, diffusion_steps=steps, **BLOCK)
    assert_equals_oracle(model, rollout, alignment=alignment, schedule=schedule)
    assert rollout.blocks == Blocks(SIZE, alignment) and rollout.steps is None


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("remasking", ["margin", "random"])
def test_threshold_and_temperature_equal_slow_decoder(model_of, cache, remasking):
    settings = {"remasking": remasking, "temperature": 0.8}
    threshold = {"margin": 0.05, "random": 0.6}[remasking]
    rollout = sample(model_of(), cache=cache, confidence_threshold=threshold, **BLOCK, **settings)
    assert_equals_oracle(model_of(), rollout, threshold=threshold, **settings)
    assert len(set(rollout.num_steps.tolist())) > 1, "rows should differ in their number of steps"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("size", [1, 3, 12])
def test_blocks_of_every_size_equal_slow_decoder(model_of, cache, size):
    rollout = sample(model_of(size=size), cache=cache, block_length=size, tokens_per_step=1, stop_at_eos=False)
    assert_equals_oracle(model_of(size=size), rollout, size=size, schedule=[1] * size)


@pytest.mark.parametrize("cache", CACHES)
def test_rows_stop_at_their_eos_at_the_end_of_a_block(model_of, cache):
    model, settings = model_of(), {"diffusion_steps": 6, "block_length": SIZE}
    whole = sample(model, **settings, stop_at_eos=False)
    eos = (int(whole.completion_ids[0, 1]), int(whole.completion_ids[2, 6]))
    rollout = sample(model, cache=cache, eos_token_ids=eos, stop_at_eos=True, **settings)
    assert_equals_oracle(model, rollout, schedule=[2, 2], eos=eos, stop_at_eos=True)
    assert not rollout.revealed.all() and rollout.revealed.any(dim=1).all()


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_alone_equals_itself_in_a_wider_batch(model_of, cache):
    settings = {**BLOCK, "diffusion_steps": 6, "cache": cache}
    together = sample(model_of(), width=13, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model_of(), [prompt], SEEDS[row : row + 1], **settings)
        assert_same_rollout(together, alone, rows=slice(row, row + 1))
    assert_same_rollout(sample(model_of(), batch_size=2, **settings), together)


@pytest.mark.parametrize("cache", CACHES)
def test_an_empty_prompt_decodes(model_of, cache):
    rollout = sample(model_of(), [[], []], SEEDS[:2], cache=cache, diffusion_steps=6, **BLOCK)
    assert_equals_oracle(model_of(), rollout, [[], []], SEEDS[:2], schedule=[2, 2])


def test_the_cache_runs_a_block_or_two_and_each_distinct_prompt_once(model_of):
    prompts, seeds = [PROMPTS[1]] * 3 + [PROMPTS[3]], torch.arange(4)
    rollout, shapes = forwards_of(model_of(), sample, prompts=prompts, seeds=seeds, cache="exact", **BLOCK)
    assert shapes[0] == (2, 7)
    # Seven prompt tokens: three share the first block of the canvas, whose last block has three positions.
    assert {columns for _, columns in shapes[1:]} == {SIZE, 2 * SIZE}
    assert rollout.num_forwards == len(shapes)
    assert [columns for _, columns in shapes[1:]].count(2 * SIZE) <= 2 * (len(set(map(len, prompts))) + 1)
    uncached = sample(model_of(), prompts, seeds, **BLOCK)
    assert rollout.flops < uncached.flops / 2


def test_guidance_follows_the_blocks(model_of):
    rollout = sample(model_of(), cfg_scale=0.7, diffusion_steps=6, **BLOCK)
    assert_equals_oracle(model_of(), rollout, schedule=[2, 2], cfg_scale=0.7)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_length": 6}, r"block_length=6, and the model is block-causal with block_size=4: .*block_length=4"),
        ({"decoding": "any_order"}, r"decoding='any_order' does not apply to a block-causal model.*Set decoding="),
        ({"cache": "dual"}, r"cache='dual' does not apply to a block-causal model.*Set cache='exact'"),
    ],
)
def test_settings_that_such_a_model_has_not_are_refused(model_of, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(model_of(), **{**BLOCK, **settings})


def test_the_exact_cache_is_refused_where_every_position_sees_every_other():
    with pytest.raises(ValueError, match="cache='exact' with decoding='denoising' needs a block-causal model"):
        sample(sharp_model("llada"), cache="exact")


# ------------------------------------------------------------------------------------------------- a canvas that grows


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_a_growing_canvas_equals_slow_decoder(models, family, threshold):
    model, settings = models(family), {"remasking": "margin", "temperature": 0.8}
    draws = {"diffusion_steps": 8} if threshold is None else {"confidence_threshold": threshold}
    rollout = sample(model, future_blocks="absent", **draws, **settings)
    schedule = {"schedule": [2, 2, 1, 1]} if threshold is None else {"threshold": threshold}
    assert_equals_slow_decoder(model, rollout, shift=SHIFT[family], grows=True, **schedule, **settings)
    masked = sample(model, **draws, **settings)
    assert not torch.equal(rollout.logps, masked.logps), "later blocks should matter"
    assert rollout.flops / rollout.num_forwards < masked.flops / masked.num_forwards
    assert rollout.blocks == Blocks(6, "canvas", causal=False)


def test_a_growing_canvas_stops_at_its_eos(models, family):
    model = models(family)
    eos = common_eos(model)
    settings = {"max_new_tokens": 12, "block_length": 4, "diffusion_steps": 6, "eos_token_ids": eos}
    rollout = sample(model, future_blocks="absent", stop_at_eos=True, **settings)
    whole = sample(model, future_blocks="absent", stop_at_eos=False, **settings)
    kept = rollout.revealed
    assert torch.equal(rollout.completion_ids[kept], whole.completion_ids[kept])


def test_what_a_growing_canvas_does_not_go_with_is_refused():
    for settings in ({"decoding": "any_order"}, {"cache": "dual"}):
        with pytest.raises(ValueError, match="future_blocks='absent' needs decoding='denoising' and no approximate"):
            DiffusionGenerationConfig(12, future_blocks="absent", **settings)
    with pytest.raises(ValueError, match="future_blocks='none'"):
        DiffusionGenerationConfig(12, future_blocks="none")


def test_a_config_keeps_the_alignment(model_of, tmp_path):
    from transformers import AutoModelForCausalLM

    model_of("canvas").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids, mask = left_pad(PROMPTS)
    config = DiffusionGenerationConfig(12, **BLOCK)
    assert_same_rollout(generate(loaded, ids, mask, config, SEEDS), sample(model_of("canvas"), **BLOCK))
    other = replace(generate(loaded, ids, mask, config, SEEDS), blocks=None)
    assert other.blocks is None
