"""Each decoding setting is declared once: trainer's config, command line and sampler take it from there."""

import argparse
import math
from dataclasses import fields, replace

import pytest
import yaml

from trl_dllm import DiffusionGRPOConfig
from trl_dllm.generation import DiffusionGenerationConfig, resolve_schedule
from trl_dllm.scripts import eval as evaluation
from trl_dllm.scripts import generate, grpo, report


# The decoding settings and their defaults, as they are promised to users.
DEFAULTS = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "block_length": None,
    "diffusion_steps": None,
    "tokens_per_step": None,
    "remasking": "low_confidence",
    "confidence_threshold": None,
    "stop_at_eos": True,
    "decoding": "denoising",
    "cache": None,
    "future_blocks": "masked",
    "cfg_scale": 0.0,
}
CHOICES = {
    "remasking": {"low_confidence", "margin", "entropy", "random", "left_to_right"},
    "decoding": {"denoising", "any_order"},
    "cache": {"exact", "prefix", "dual"},
    "future_blocks": {"masked", "absent"},
}
REQUIRED = {
    "generate": ["--model_name_or_path", "model", "--prompt", "1="],
    "eval": ["--model_name_or_path", "model", "--task", "sudoku", "--output_dir", "out"],
    "report": ["--model_name_or_path", "model", "--task", "sudoku"],
}
PARSERS = {"generate": generate.make_parser, "eval": evaluation.make_parser, "report": report.make_parser}


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The parser's flags by name, those of the form --no_… left out."""
    return {action.dest: action for action in parser._actions if f"--{action.dest}" in action.option_strings}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_decoding_setting_is_the_same_in_config_command_line_and_sampler(name):
    declared = {}
    for cls in (DiffusionGRPOConfig, DiffusionGenerationConfig):
        f = next(f for f in fields(cls) if f.name == name)
        declared[cls.__name__] = (f.default, f.metadata.get("choices"), f.metadata["help"])
    action = actions(grpo.make_parser())[name]
    declared["grpo"] = (action.default, action.choices, action.help)
    for command, make_parser in PARSERS.items():
        action = actions(make_parser())[name]
        assert action.default == argparse.SUPPRESS, "not given: what is saved with the model, then the default"
        declared[command] = (DEFAULTS[name], action.choices, action.help)
    (default, choices, text), *others = declared.values()
    assert all(other == (default, choices, text) for other in others), declared
    assert default == DEFAULTS[name] and set(choices or ()) == CHOICES.get(name, set()) and len(text) > 20


def test_there_is_no_decoding_setting_that_these_tests_do_not_know():
    own = {"max_new_tokens", "temperature", "eos_token_ids"}
    assert {f.name for f in fields(DiffusionGenerationConfig)} == {*DEFAULTS, *own}


VALUES = [
    {"block_length": 8, "diffusion_steps": 4, "remasking": "margin", "stop_at_eos": False},
    {"block_length": 4, "tokens_per_step": 1, "confidence_threshold": 0.5, "decoding": "any_order", "cache": "exact"},
    {"cfg_scale": 1.5},
    {"cache": "dual"},
    {"future_blocks": "absent"},
]


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("command", PARSERS)
def test_flags_reach_the_sampler(command, values):
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    args = PARSERS[command]().parse_args([*REQUIRED[command], "--max_new_tokens", "16", *argv])
    temperature = 1.0 if command == "report" else 0.0
    expected = DiffusionGenerationConfig(16, temperature=temperature, **values)
    assert generate.generation_config(args) == expected


@pytest.mark.parametrize("values", VALUES[:2], ids=str)
def test_a_recipes_settings_reach_the_sampler(tmp_path, values):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_completion_length": 16, **values}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "temperature": 0.7}))
    _, args, _ = grpo.make_parser().parse_args_and_config(["--config", str(recipe)])
    assert args.generation_config((5,)) == DiffusionGenerationConfig(16, temperature=0.7, eos_token_ids=(5,), **values)


@pytest.mark.parametrize(
    ("argv", "stop"),
    [
        ([], True),
        (["--no_stop_at_eos"], False),
        (["--stop_at_eos", "false"], False),
        (["--stop_at_eos", "true"], True),
        (["--stop_at_eos"], True),
    ],
)
def test_a_bool_is_given_as_on_the_trainers_command_line(tmp_path, argv, stop):
    args = generate.make_parser().parse_args([*REQUIRED["generate"], *argv])
    assert generate.generation_config(args).stop_at_eos is stop
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    _, args, _ = grpo.make_parser().parse_args_and_config([*common, *argv])
    assert args.stop_at_eos is stop


def test_the_d1_protocol_replaces_the_schedule_flags(tmp_path, monkeypatch):
    configs = []

    def dry_run_decoding(command, name, config, *args):
        configs.append(config)

    monkeypatch.setattr(evaluation, "dry_run_decoding", dry_run_decoding)
    flags = ["--protocol", "d1", "--dry_run", "--num_examples", "2", "--tokens_per_step", "1", "--temperature", "0.5"]
    evaluation.main(evaluation.make_parser().parse_args([*REQUIRED["eval"], *flags]))
    assert [(c.max_new_tokens, c.block_length, c.diffusion_steps) for c in configs] == [
        (128, 32, 64),
        (256, 32, 128),
        (512, 32, 256),
    ]
    assert all(c.temperature == 0 and not c.stop_at_eos for c in configs)


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("block_length", 8.0, "a whole number or None"),
        ("block_length", True, "a whole number or None"),
        ("diffusion_steps", "4", "a whole number or None"),
        ("diffusion_steps", math.nan, "a whole number or None"),
        ("tokens_per_step", True, "a whole number or None"),
        ("tokens_per_step", 1.0, "a whole number or None"),
        ("confidence_threshold", math.nan, "a finite number or None"),
        ("confidence_threshold", math.inf, "a finite number or None"),
        ("confidence_threshold", True, "a finite number or None"),
        ("confidence_threshold", "0.9", "a finite number or None"),
        ("temperature", math.nan, "a finite number."),
        ("temperature", math.inf, "a finite number."),
        ("temperature", False, "a finite number."),
        ("temperature", "1", "a finite number."),
        ("cfg_scale", None, "a finite number."),
        ("stop_at_eos", 0, "True or False."),
        ("stop_at_eos", "false", "True or False."),
        ("stop_at_eos", None, "True or False."),
        ("remasking", None, "a string."),
        ("decoding", 3, "a string."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_field_value_and_remedy(tmp_path, name, value, remedy):
    def message(make) -> str:
        with pytest.raises(ValueError) as error:
            make()
        return str(error.value)

    expected = f"{name}={value!r} must be {remedy}"
    assert message(lambda: DiffusionGenerationConfig(16, **{name: value})).startswith(expected)
    if name == "cfg_scale":  # refused by the trainer whatever it is
        return
    common = {"use_cpu": True, "bf16": False, "max_completion_length": 16}
    assert message(lambda: DiffusionGRPOConfig(str(tmp_path), **common, **{name: value})).startswith(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_guidance_is_a_finite_number(value):
    with pytest.raises(ValueError, match=f"cfg_scale={value} must be a finite number"):
        DiffusionGenerationConfig(16, cfg_scale=value)


@pytest.mark.parametrize("value", [16.0, True, "16", None])
def test_the_length_of_a_canvas_is_a_whole_number(tmp_path, value):
    with pytest.raises(ValueError, match=f"max_new_tokens={value!r} must be a whole number"):
        DiffusionGenerationConfig(value)
    if value is not None:  # what None means to the trainer is said in its own words
        with pytest.raises(ValueError, match=f"max_completion_length={value!r} must be a whole number"):
            DiffusionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=value)


def test_an_int_is_a_float_and_none_is_the_default():
    config = DiffusionGenerationConfig(16, temperature=0, confidence_threshold=1, cfg_scale=0, cache=None)
    assert config == DiffusionGenerationConfig(16, temperature=0.0, confidence_threshold=1.0)


def test_under_a_threshold_steps_need_not_divide_but_are_counted():
    DiffusionGenerationConfig(16, block_length=4, diffusion_steps=7, confidence_threshold=0.9)
    with pytest.raises(ValueError, match="diffusion_steps=0 "):
        DiffusionGenerationConfig(16, block_length=4, diffusion_steps=0, confidence_threshold=0.9)


def test_only_the_canvas_is_given_by_place():
    assert DiffusionGenerationConfig(17, tokens_per_step=1) == DiffusionGenerationConfig(
        max_new_tokens=17, block_length=17, tokens_per_step=1
    )
    with pytest.raises(TypeError, match="positional"):
        DiffusionGenerationConfig(17, 17)


@pytest.mark.parametrize(("given", "kept"), [(5, (5,)), ([5, 6], (5, 6)), ((5,), (5,)), ((), ()), (None, None)])
def test_eos_tokens_become_a_tuple(given, kept):
    assert DiffusionGenerationConfig(eos_token_ids=given).eos_token_ids == kept


@pytest.mark.parametrize("given", [True, 5.0, "5", [5, None]])
def test_eos_tokens_are_whole_numbers(given):
    with pytest.raises(ValueError, match=r"eos_token_ids=.* must be a whole number"):
        DiffusionGenerationConfig(eos_token_ids=given)


def test_a_config_may_be_changed():
    config = replace(DiffusionGenerationConfig(16, block_length=8), temperature=0.0)
    assert (config.block_length, config.diffusion_steps, config.temperature) == (8, 8, 0.0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"decoding": "any"}, r"decoding='any' is unknown.*any_order.*denoising"),
        ({"cache": "slots"}, r"cache='slots' is not available for decoding='denoising'"),
        ({"decoding": "any_order", "cache": "prefix"}, r"cache='prefix'.*decoding='any_order'.*exact"),
        ({"decoding": "any_order", "cfg_scale": 0.5}, r"cfg_scale=0.5 needs decoding='denoising'"),
        ({"cache": "exact", "cfg_scale": 0.5}, r"cfg_scale=0.5 needs cache=None, got 'exact'"),
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


def test_single_eos_becomes_a_tuple_and_names_of_the_caller_are_used():
    assert DiffusionGenerationConfig(eos_token_ids=5).eos_token_ids == (5,)
    with pytest.raises(ValueError, match="max_completion_length=10"):
        resolve_schedule(10, 4, None, None, canvas_name="max_completion_length")


# ------------------------------------------------------------------------------------------------------------ schedule


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


# ------------------------------------------------------------------------------------------------------- documentation


@pytest.mark.parametrize("cls", [DiffusionGenerationConfig, DiffusionGRPOConfig])
def test_the_docstring_says_what_the_fields_say(cls):
    text = " ".join(cls.__doc__.split())
    for f in fields(cls):
        if f.name in DEFAULTS:
            default = f'"{f.default}"' if isinstance(f.default, str) else f.default
            optional = "*optional*" if default is None else f"*optional*, defaults to `{default}`"
            assert f", {optional}): {f.metadata['help']}" in text.partition(f" {f.name} (`")[2], f.name
