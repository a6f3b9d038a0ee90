"""The decoding that a model was trained with, saved beside it; what is given explicitly wins."""

import json

import pytest

from trl_dllm.generation import (
    DiffusionGenerationConfig,
    decoding_of,
    read_decoding,
    save_decoding,
    saved_decoding_config,
)
from trl_dllm.generation.saved import DECODING, decoding_config
from trl_dllm.models import create_tiny_model


TRAINED = DiffusionGenerationConfig(
    34,
    block_length=17,
    diffusion_steps=16,
    remasking="margin",
    stop_at_eos=False,
    decoding="any_order",
    cache="exact",
    temperature=0.9,
)


def schedule(config) -> tuple[int, int | None, int | None]:
    return config.max_new_tokens, config.block_length, config.diffusion_steps


@pytest.mark.parametrize("steps", [{"diffusion_steps": 16}, {"tokens_per_step": 1}, {}], ids=str)
def test_a_config_is_read_back_as_it_was_saved_but_for_the_temperature(tmp_path, steps):
    config = DiffusionGenerationConfig(34, block_length=17, remasking="margin", temperature=0.9, **steps)
    save_decoding(decoding_of(config), tmp_path)
    assert json.loads((tmp_path / DECODING).read_text())["temperature"] == 0.9, "a record of the training"
    found = decoding_config(read_decoding(tmp_path), {"temperature": 0.0})
    assert schedule(found) == schedule(config) and found.schedule == config.schedule
    assert (found.remasking, found.temperature) == ("margin", 0.0)


def test_what_is_given_wins():
    saved = decoding_of(TRAINED)
    given = {"remasking": "random", "stop_at_eos": True, "temperature": 0.5}
    found = decoding_config(saved, given)
    assert schedule(found) == schedule(TRAINED) and (found.decoding, found.cache) == ("any_order", "exact")
    assert all(getattr(found, name) == value for name, value in given.items())
    found = decoding_config(saved, {"decoding": "denoising"})
    assert (found.decoding, found.cache) == ("denoising", None), "the saved cache is of the saved decoding"
    assert decoding_config(saved, {"cache": None}).cache is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_new_tokens": 17}, (17, 17, 8)),  # 17 tokens in 8 steps as before
        ({"max_new_tokens": 68}, (68, 17, 32)),
        ({"max_new_tokens": 36}, (36, 18, 16)),  # blocks of 17 do not divide it: the default ones
        ({"block_length": 2}, (34, 2, 17)),  # 17/8 tokens a step, rounded up to the whole block
        ({"block_length": 34}, (34, 34, 16)),
        ({"max_new_tokens": 64, "block_length": 32}, (64, 32, 30)),
        ({"diffusion_steps": 34}, (34, 17, 34)),
        ({"tokens_per_step": 17}, (34, 17, 2)),
        ({"max_new_tokens": 68, "tokens_per_step": 1}, (68, 17, 68)),
        ({"max_new_tokens": 16, "block_length": 8, "diffusion_steps": 4}, (16, 8, 4)),
    ],
    ids=str,
)
def test_another_canvas_or_block_keeps_the_tokens_a_step(given, expected):
    assert schedule(decoding_config(decoding_of(TRAINED), given)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 20, "block_length": 17}, "block_length=17 does not divide max_new_tokens=20"),
        ({"max_new_tokens": 68, "diffusion_steps": 3}, r"diffusion_steps=3 .* 4 blocks of 17 \(max_new_tokens=68\)"),
        ({"diffusion_steps": 4, "tokens_per_step": 1}, "say the same thing twice"),
        ({"max_new_tokens": "16"}, "max_new_tokens='16' must be a whole number"),
        ({"block_length": 2.0}, "block_length=2.0 must be a whole number or None"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        decoding_config(decoding_of(TRAINED), given)


@pytest.mark.parametrize("given", [{}, {"max_new_tokens": 16}, {"max_new_tokens": 96}, {"block_length": 8}], ids=str)
def test_nothing_saved_is_the_defaults(given):
    assert decoding_config({}, given) == DiffusionGenerationConfig(**given)


def test_a_part_is_filled_in():
    any_order = {"block_length": 17, "decoding": "any_order", "cache": "exact"}  # SFT without a canvas
    assert schedule(decoding_config(any_order, {})) == (255, 17, 120), "256 in whole blocks"
    assert schedule(decoding_config(any_order, {"max_new_tokens": 34})) == (34, 17, 16)
    assert schedule(decoding_config({"max_new_tokens": 16}, {})) == (16, 16, 8)


def test_the_first_place_that_has_one_counts_and_is_named(tmp_path):
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    adapter.mkdir(), model.mkdir()
    config, line = saved_decoding_config([str(adapter), str(model)], {})
    assert config == DiffusionGenerationConfig() and "256 tokens, the default" in line
    assert saved_decoding_config([None, str(model)], {"max_new_tokens": 8})[1] is None
    save_decoding(decoding_of(TRAINED), model)
    _, line = saved_decoding_config([str(adapter), str(model)], {})
    assert line.startswith(f"Decoding as saved with {model}: max_new_tokens=34, ") and "\n" not in line
    assert "but" not in line and "temperature" not in line
    save_decoding({"max_new_tokens": 8}, adapter)
    config, line = saved_decoding_config([str(adapter), str(model)], {"max_new_tokens": 16})
    assert config.max_new_tokens == 16 and line.endswith("; but max_new_tokens=16.")


def test_a_model_that_does_not_exist_is_left_to_whoever_loads_it(tmp_path):
    assert read_decoding("no/such-model") == read_decoding(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[3]", "is no decoding setting"),
        ('{"canvas": 3}', "'canvas' is no decoding setting of this version; choose from max_new_tokens"),
        ('{"eos_token_ids": [3]}', "'eos_token_ids' is no decoding setting"),
        ('{"block_length": "x"}', "block_length='x' must be a whole number"),
        ('{"max_new_tokens": 16, "block_length": 5}', "block_length=5 does not divide max_new_tokens=16"),
    ],
)
def test_a_file_to_mend_is_named(tmp_path, text, message):
    (tmp_path / DECODING).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        saved_decoding_config([str(tmp_path)], {})
    assert str(tmp_path) in str(error.value)


def test_nothing_known_removes_what_another_model_left(tmp_path):
    save_decoding({"max_new_tokens": 8}, tmp_path)
    save_decoding({}, tmp_path)
    assert not list(tmp_path.iterdir())
    save_decoding({}, tmp_path)


def test_a_block_causal_model_is_decoded_in_its_own_blocks_whatever_was_saved(tmp_path):
    """Before any weight is loaded; another block length that is given is refused with the remedy."""
    create_tiny_model("sdar", 16, 1)[0].save_pretrained(tmp_path)
    assert saved_decoding_config([None, str(tmp_path)], {})[0].block_length == 4
    save_decoding({"max_new_tokens": 18}, tmp_path)
    config, _ = saved_decoding_config([str(tmp_path)], {})
    assert (config.max_new_tokens, config.block_length, config.diffusion_steps) == (20, 4, 10)
    with pytest.raises(ValueError, match=r"block_length=10, and the model is block-causal .*Set block_length=4"):
        saved_decoding_config([str(tmp_path)], {"block_length": 10})
    with pytest.raises(ValueError, match="decoding='any_order' does not apply to a block-causal model"):
        saved_decoding_config([str(tmp_path)], {"decoding": "any_order"})
