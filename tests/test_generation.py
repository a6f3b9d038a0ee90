"""Denoising: counted FLOPs, and the config."""

import pytest
from cases import PROMPTS, VOCAB, common_eos, sample
from oracles import left_pad

from trl_dllm.generation import DiffusionGenerationConfig, generate, resolve_schedule


# ------------------------------------------------------------------------------------------------------------ counters


def test_forwards_and_flops_are_counted(models):
    """Two a multiply-add: linear layers, attention, head tiles of 64 rows; finished rows are not counted."""
    model = models("llada")
    hidden, layers, inner = 32, 2, 80
    eos = common_eos(model)
    settings = {
        "max_new_tokens": 12,
        "block_length": 4,
        "diffusion_steps": 6,
        "eos_token_ids": eos,
        "stop_at_eos": True,
    }
    rollout = sample(model, **settings)
    width = max(map(len, PROMPTS)) + 12

    def forward(rows, head_rows):
        linear = layers * 2 * (4 * hidden * hidden + 3 * hidden * inner)
        head = -(-head_rows // 64) * 64 * 2 * hidden * VOCAB
        return rows * width * linear + rows * width * width * layers * 4 * hidden + head

    steps = rollout.num_steps.tolist()
    assert len(set(steps)) > 1
    alive = [sum(taken > step for taken in steps) for step in range(max(steps))]
    assert rollout.num_forwards == len(alive)
    assert rollout.flops == sum(forward(rows, rows * (4 if step % 2 == 0 else 2)) for step, rows in enumerate(alive))
    parts = sample(model, batch_size=3, **settings)
    assert parts.num_forwards == max(steps[:3]) + steps[3]
    guided = sample(model, cfg_scale=0.5, **{**settings, "stop_at_eos": False})
    assert guided.num_forwards == 6
    assert guided.flops == 6 * forward(8, 2 * 64)  # a tile of 64 positions, and their unconditional twins


def test_head_tiles_are_whole(models):
    """70 scored rows cost two tiles of 64."""
    model = models("llada")
    ids, mask = left_pad([[5]] * 10)
    config = DiffusionGenerationConfig(max_new_tokens=7, block_length=7, diffusion_steps=1)
    one, two = (generate(model, ids[:n], mask[:n], config).flops for n in (9, 10))
    assert one / 9 < two / 10 and two - one == one_row_flops() + 64 * 2 * 32 * VOCAB


def one_row_flops(width: int = 8) -> int:
    return width * 2 * 2 * (4 * 32 * 32 + 3 * 32 * 80) + width * width * 2 * 4 * 32


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"remasking": "confident"}, "remasking='confident'.*low_confidence"),
        ({"decoding": "diagonal"}, "decoding='diagonal'"),
        ({"cache": "sliding"}, "cache='sliding'"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"remasking": "left_to_right", "confidence_threshold": 0.5}, "confidence_threshold=0.5.*left_to_right"),
        ({"max_new_tokens": 12, "block_length": 5}, "block_length=5 does not divide max_new_tokens=12.*4"),
        ({"max_new_tokens": 12, "block_length": 0}, "block_length=0"),
        ({"max_new_tokens": 12, "block_length": 24}, "block_length=24.*12"),
        ({"max_new_tokens": 12, "block_length": 4, "diffusion_steps": 4}, "diffusion_steps=4.*multiple of 3"),
        ({"max_new_tokens": 12, "block_length": 4, "diffusion_steps": 15}, "diffusion_steps=15.*between 3 and 12"),
        ({"max_new_tokens": 12, "block_length": 4, "diffusion_steps": 0}, "diffusion_steps=0"),
        ({"max_new_tokens": 12, "block_length": 4, "tokens_per_step": 3}, "tokens_per_step=3.*block_length=4"),
        ({"tokens_per_step": 2, "diffusion_steps": 128}, "tokens_per_step=2 and diffusion_steps=128"),
    ],
)
def test_config_errors_name_field_value_and_remedy(settings, match):
    with pytest.raises(ValueError, match=match):
        DiffusionGenerationConfig(**settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (32, 128)),
        ({"max_new_tokens": 30}, (30, 15)),
        ({"max_new_tokens": 70}, (14, 35)),
        ({"max_new_tokens": 37}, (1, 37)),
        ({"max_new_tokens": 12, "block_length": 3}, (3, 4)),
        ({"max_new_tokens": 64, "tokens_per_step": 4}, (32, 16)),
        ({"max_new_tokens": 12, "block_length": 4, "diffusion_steps": 9}, (4, 9)),
    ],
)
def test_defaults_of_the_schedule(given, expected):
    """Blocks: the largest divisor up to 32; steps: half the canvas, the same number in each block."""
    config = DiffusionGenerationConfig(**given)
    assert (config.block_length, config.diffusion_steps) == expected


@pytest.mark.parametrize(
    ("block", "steps", "schedule"), [(6, 4, [2, 2, 1, 1]), (7, 3, [3, 2, 2]), (4, 4, [1, 1, 1, 1])]
)
def test_remainder_goes_to_the_first_steps(block, steps, schedule):
    config = DiffusionGenerationConfig(max_new_tokens=2 * block, block_length=block, diffusion_steps=2 * steps)
    assert config.schedule == schedule and config.steps_per_block == steps


def test_a_threshold_needs_no_schedule_that_divides():
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=4, diffusion_steps=7, confidence_threshold=0.9)
    assert config.block_length == 4


def test_single_eos_becomes_a_tuple_and_names_of_the_caller_are_used():
    assert DiffusionGenerationConfig(eos_token_ids=5).eos_token_ids == (5,)
    with pytest.raises(ValueError, match="max_completion_length=10"):
        resolve_schedule(10, 4, None, None, canvas_name="max_completion_length")
