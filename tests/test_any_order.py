"""Any-order decoding: FLOPs, config and flags."""

import pytest
import torch
from cases import CACHES, PROMPTS, forwards_of

from trl_dllm import DiffusionGRPOConfig
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.models import ForwardFlops, LLaDAConfig, LLaDAModelLM
from trl_dllm.scripts import eval as evaluation
from trl_dllm.scripts.generate import generation_config


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


# --------------------------------------------------------------------------------------------- refusals, config, flags


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"decoding": "any"}, r"decoding='any' is unknown.*any_order.*denoising"),
        ({"cache": "exact"}, r"cache='exact' is not available for decoding='denoising'"),
        ({"decoding": "any_order", "cache": "prefix"}, r"cache='prefix'.*decoding='any_order'.*exact"),
        ({"decoding": "any_order", "cfg_scale": 0.5}, r"cfg_scale=0.5 needs decoding='denoising'"),
    ],
)
def test_config_errors_of_decoding_and_cache(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        DiffusionGenerationConfig(**settings)
    if "cfg_scale" not in settings:
        with pytest.raises(ValueError, match=match):
            DiffusionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"estimator": "step_merge", "decoding": "any_order"}, "StepMerge is not exact for decoding='any_order'"),
        ({"estimator": "any_order"}, "AnyOrder is not exact for decoding='denoising'"),
        (
            {"estimator": "any_order", "decoding": "any_order", "p_mask_prompt": 0.1},
            "the sampler saw the whole prompt, and p_mask_prompt=0.1",
        ),
        (
            {"estimator": "any_order", "decoding": "any_order", "temperature": 0.9, "score_temperature": 1.0},
            "the sampler scored at temperature=0.9, not score_temperature=1.0",
        ),
    ],
)
def test_the_samplers_log_probs_are_refused_where_they_are_not_exact(settings, match, tmp_path):
    common = {"use_cpu": True, "bf16": False, "max_completion_length": 8}
    with pytest.raises(ValueError, match=f"old_logps='rollout'.*{match}.*old_logps='recompute'"):
        DiffusionGRPOConfig(str(tmp_path), old_logps="rollout", **common, **settings)
    assert DiffusionGRPOConfig(str(tmp_path), **common, **settings).old_logps == "recompute"


def test_flags_of_eval_choose_decoding_and_cache():
    argv = ["--task", "sudoku", "--output_dir", "out", "--model_name_or_path", "model", "--max_new_tokens", "16"]
    parse = evaluation.make_parser().parse_args
    config = generation_config(parse([*argv, "--decoding", "any_order", "--cache", "exact"]))
    assert (config.decoding, config.cache) == ("any_order", "exact")
    config = generation_config(parse(argv))
    assert (config.decoding, config.cache) == ("denoising", None)
