"""Any-order decoding, recomputed in full and with the exact cache: docs/methods.md §3.2 and identities 3 and 7."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from cases import (
    CACHES,
    MASK,
    PROMPTS,
    REMASKING,
    SEEDS,
    THRESHOLDS,
    VOCAB,
    assert_same_rollout,
    forwards_of,
    sample_any_order,
)
from oracles import left_pad, next_logits, sharp_model, slow_decode

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.models import ForwardFlops, LLaDAConfig, LLaDAModelLM
from trl_dllm.noise import hash64


class OrderReader:
    """An any-order model that `slow_decode` takes for a denoiser: it reads the order off the canvases it is shown."""

    def __init__(self, model, prompt: list[int]):
        self.model, self.prompt, self.before = model, prompt, []

    def __call__(self, input_ids, use_cache):
        canvas = input_ids[0].tolist()[len(self.prompt) :]
        known = {position for position, _ in self.before}
        self.before += [(i, t) for i, t in enumerate(canvas) if t != MASK and i not in known]
        masked = [i for i, token in enumerate(canvas) if token == MASK]
        logits = torch.full((1, input_ids.shape[1], VOCAB), torch.nan, dtype=torch.float64)
        logits[0, [len(self.prompt) + i for i in masked]] = next_logits(self.model, self.prompt, self.before, masked)
        return SimpleNamespace(logits=logits)


def assert_equals_oracle(oracle, rollout, prompts=PROMPTS, seeds=SEEDS, **settings):
    settings = {"canvas": 12, "block_length": 6, "mask": MASK, "shift": 0, **settings}
    for row, prompt in enumerate(prompts):
        reader = OrderReader(oracle, prompt)
        tokens, steps, logps = slow_decode(reader, prompt, seed=int(seeds[row]), **settings)
        assert rollout.unmask_step[row].tolist() == steps, f"steps of row {row}"
        assert rollout.completion_ids[row].tolist() == tokens, f"tokens of row {row}"
        torch.testing.assert_close(rollout.logps[row].double(), torch.tensor(logps).double(), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("remasking", REMASKING)
def test_even_schedule_equals_slow_decoder(models, remasking, temperature, cache):
    """8 steps for 12 tokens in two blocks of 6: 2, 2, 1, 1 tokens a step; rows differ in prompt length."""
    settings = {"remasking": remasking, "temperature": temperature}
    rollout = sample_any_order(models("llada"), cache, diffusion_steps=8, **settings)
    assert_equals_oracle(models("llada", attn="eager"), rollout, schedule=[2, 2, 1, 1], **settings)
    assert rollout.num_forwards == 8 + (cache == "exact")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("remasking", [name for name in REMASKING if name != "left_to_right"])
def test_threshold_equals_slow_decoder(models, remasking, cache):
    """Rows reveal different numbers in a step, and are in different blocks."""
    threshold = THRESHOLDS[remasking]
    rollout = sample_any_order(
        models("llada"), cache, remasking=remasking, confidence_threshold=threshold, temperature=0.8
    )
    assert_equals_oracle(
        models("llada", attn="eager"), rollout, remasking=remasking, threshold=threshold, temperature=0.8
    )
    assert len(set(rollout.num_steps.tolist())) > 1, "rows should differ in their number of steps"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_tie_widths_equal_slow_decoder(models, width, cache):
    rollout = sample_any_order(models("llada"), cache, tokens_per_step=width)
    schedule = [width] * (6 // width)
    assert_equals_oracle(models("llada", attn="eager"), rollout, schedule=schedule, remasking="low_confidence")


@pytest.mark.parametrize("cache", CACHES)
def test_empty_prompts_equal_slow_decoder(models, cache):
    """P = 0 has no prompt pass; a row without a token in a padded batch is the same row."""
    oracle, settings = models("llada", attn="eager"), {"schedule": [2, 2, 1, 1], "remasking": "low_confidence"}
    rollout = sample_any_order(models("llada"), cache, [[]] * 4, diffusion_steps=8)
    assert rollout.prompt_ids.shape == (4, 0) and rollout.num_forwards == 8
    assert_equals_oracle(oracle, rollout, [[]] * 4, **settings)
    mixed = sample_any_order(models("llada"), cache, [[], *PROMPTS[1:]], diffusion_steps=8)
    assert torch.equal(mixed.completion_ids[0], rollout.completion_ids[0])
    assert_equals_oracle(oracle, mixed, [[], *PROMPTS[1:]], **settings)


@pytest.mark.parametrize("cache", CACHES)
def test_early_stop_equals_slow_decoder(models, cache):
    """Rows finish at different blocks and leave the cache; those that go on are not changed."""
    settings = {"block_length": 4, "diffusion_steps": 6}
    tokens = sample_any_order(models("llada"), cache, **settings).completion_ids.tolist()
    ends = {  # a token of some row's first block and one of some row's second, by which all three lengths occur
        (a, b): {next((n for n in range(2) if {a, b} & set(row[4 * n : 4 * n + 4])), 2) for row in tokens}
        for first, second in itertools.permutations(tokens, 2)
        for a, b in itertools.product(first[:4], second[4:8])
    }
    eos = next(pair for pair, lengths in ends.items() if len(lengths) == 3)
    rollout = sample_any_order(models("llada"), cache, stop_at_eos=True, eos_token_ids=eos, **settings)
    assert set(rollout.num_steps.tolist()) == {2, 4, 6}, "rows should stop behind different blocks"
    assert_equals_oracle(
        models("llada", attn="eager"),
        rollout,
        block_length=4,
        schedule=[2, 2],
        eos=eos,
        stop_at_eos=True,
        remasking="low_confidence",
    )


# ----------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("block_length", [4, 12])
def test_identity_3_cached_equals_uncached_for_many_rows_in_different_blocks(models, block_length):
    """64 rows with a random threshold: the widest chunk comes from one row, the fullest cache from another."""
    model, prompts = models("llada"), [PROMPTS[i % 4] for i in range(64)]
    settings = {"remasking": "random", "confidence_threshold": 0.5, "block_length": block_length}
    cached, uncached = (
        sample_any_order(model, cache, prompts, hash64(5, torch.arange(64)), **settings) for cache in ("exact", None)
    )
    assert_same_rollout(cached, uncached)
    assert len(set(cached.num_steps.tolist())) > 3


@pytest.mark.parametrize("settings", [{"diffusion_steps": 8}, {"confidence_threshold": 0.15, "stop_at_eos": True}])
def test_identity_7_cached_rows_do_not_depend_on_their_batch(models, settings):
    """Left padding, its tokens, batch order, sub-batches: same seeds, same tokens and steps."""
    model = models("llada")
    settings = {"temperature": 0.9, "eos_token_ids": tuple(range(40, 60)), **settings}
    rollout = sample_any_order(model, **settings)
    assert_same_rollout(rollout, sample_any_order(model, width=15, **settings))
    order = [2, 0, 3, 1]
    shuffled = sample_any_order(model, prompts=[PROMPTS[i] for i in order], seeds=SEEDS[order], **settings)
    assert_same_rollout(rollout, shuffled, order)
    assert_same_rollout(rollout, sample_any_order(model, batch_size=1, **settings))
    assert_same_rollout(rollout, sample_any_order(model, batch_size=3, **settings))
    ids, mask = left_pad(PROMPTS, 9, pad=0)
    config = DiffusionGenerationConfig(max_new_tokens=12, decoding="any_order", cache="exact")
    a, b = (generate(model, x, mask.long(), config, SEEDS) for x in (ids, ids.masked_fill(~mask, 88)))
    assert_same_rollout(a, b)


def test_a_group_costs_one_prompt_pass(models):
    """8 completions of one prompt, and of another: two rows in the prompt pass; the same completions as one by one."""
    model = models("llada")
    prompts = [PROMPTS[1]] * 8 + [PROMPTS[0]] * 8
    seeds = hash64(3, torch.arange(16))
    rollout, shapes = forwards_of(model, prompts=prompts, seeds=seeds, diffusion_steps=6)
    assert shapes[0] == (2, 7) and all(shape[0] == 16 for shape in shapes[1:])
    assert len(shapes) == rollout.num_forwards == 7
    assert_same_rollout(rollout, sample_any_order(model, None, prompts, seeds, diffusion_steps=6))
    assert len(rollout.completion_ids[:8].unique(dim=0)) == 8
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mixed, shapes = forwards_of(model, prompts=[prompts[i] for i in shuffle], seeds=seeds[shuffle], diffusion_steps=6)
    assert shapes[0] == (2, 7)
    assert_same_rollout(rollout, mixed, shuffle)
    _, shapes = forwards_of(model, prompts=[[7, 7], [0, 7, 7], [7]], seeds=SEEDS[:3], diffusion_steps=6)
    assert shapes[0] == (3, 3), "a prompt that differs from another by its padding alone is a prompt of its own"


# ------------------------------------------------------------------------------------------------------------ contract


def test_a_process_without_rows_left_still_runs_forwards(models):
    """`still_running` keeps a finished process in step: spare forwards, the same rollout."""
    model, (ids, mask) = models("llada"), left_pad(PROMPTS)
    for cache in CACHES:
        asked = []

        def still_running(local, asked=asked):
            asked.append(local)
            return len(asked) <= 9

        config = DiffusionGenerationConfig(
            max_new_tokens=12, block_length=6, diffusion_steps=6, decoding="any_order", cache=cache
        )
        rollout = generate(model, ids, mask, config, seeds=SEEDS, still_running=still_running)
        # The prompts' pass into the cache is asked for as a step is.
        assert asked == [True] * (6 + (cache == "exact")) + [False] * (4 - (cache == "exact"))
        assert rollout.num_forwards == 9
        assert_same_rollout(generate(model, ids, mask, config, seeds=SEEDS), rollout)


def test_the_cache_takes_sdpa_where_the_model_has_flex_attention(models):
    """FlexAttention would be compiled for every chunk; behind the call, and behind an error, it is as it was."""
    model, seen = sharp_model("llada", dtype=torch.float32), []
    model.config._attn_implementation = "flex_attention"

    def look(module, args):
        seen.append(module.config._attn_implementation)
        if len(seen) == 20:
            raise RuntimeError("in the middle")

    model.register_forward_pre_hook(look)
    rollout = sample_any_order(model)
    assert set(seen) == {"sdpa"} and model.config._attn_implementation == "flex_attention"
    assert_same_rollout(rollout, sample_any_order(models("llada", torch.float32)))
    with pytest.raises(RuntimeError, match="in the middle"):
        while True:
            sample_any_order(model)
    assert model.config._attn_implementation == "flex_attention"


def test_decoding_leaves_model_and_global_generator_alone(models):
    model, before = models("llada"), torch.get_rng_state()
    sample_any_order(model)
    assert torch.equal(before, torch.get_rng_state()) and model.config._attn_implementation == "sdpa"
    assert "forward" not in model.get_output_embeddings().__dict__


# --------------------------------------------------------------------------------------------------------------- FLOPs


def test_forwards_of_a_cached_rollout_are_counted_as_run(models):
    """Prompt pass, then chunks: the tokens of the step before and the masks of the block, attending to the cache."""
    model, count = models("llada"), ForwardFlops(models("llada"))
    rollout, shapes = forwards_of(model, prompts=[PROMPTS[0]] * 4, tokens_per_step=2)
    assert shapes == [(1, 3), (4, 6), (4, 2 + 4), (4, 2 + 2), (4, 2 + 6), (4, 2 + 4), (4, 2 + 2)]
    keys = [3, 3 + 6, 3 + 6, 5 + 4, 7 + 8, 9 + 6, 11 + 4]
    heads = [0, 6, 4, 2, 6, 4, 2]
    assert rollout.flops == sum(
        count(rows, width, k, 4 * head) for (rows, width), k, head in zip(shapes, keys, heads, strict=True)
    )


def test_the_cache_takes_ten_times_fewer_flops():
    """P = 200, L = 256, block 32, 2 tokens a step. Counted on a model in which, as in LLaDA, layers outweigh the head.

    (At a tiny width and a vocabulary of its size the head's tiles of 64 rows dominate, which the cache does not
    change; here a token costs 26 times more in the layers than in the head, in LLaDA-8B 14 times.)
    """
    config = LLaDAConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        mask_token_id=3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=None,
    )
    model = LLaDAModelLM(config).eval()
    assert 25 < ForwardFlops(model).per_token / ForwardFlops(model).per_head_row < 27
    prompt = torch.randint(4, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    flops = []
    for cache in CACHES:
        settings = DiffusionGenerationConfig(
            max_new_tokens=256, block_length=32, tokens_per_step=2, decoding="any_order", cache=cache
        )
        rollout = generate(model, prompt, torch.ones_like(prompt), settings)
        assert rollout.num_forwards == 128 + (cache == "exact")
        flops.append(rollout.flops)
    assert flops[0] / flops[1] > 10, flops


@pytest.mark.parametrize("group", [1, 8])
def test_the_cache_takes_ten_times_fewer_flops_at_the_shapes_of_llada_8b(group):
    """The same count from LLaDA-8B's shapes, without running it: weights on the meta device."""
    with torch.device("meta"):
        count = ForwardFlops(LLaDAModelLM(LLaDAConfig()))
    assert 13e9 < count.per_token < 16e9 and 13 < count.per_token / count.per_head_row < 15
    uncached = cached = 0
    cached += count(1, 200, 200, 0)
    for step in range(128):
        masks, new = 32 - 2 * (step % 16), 2 * (step > 0)
        uncached += count(group, 456, 456, group * masks)
        cached += count(group, new + masks, 200 + 2 * max(0, step - 1) + new + masks, group * masks)
    assert uncached / cached > 10, (group, uncached / cached)
