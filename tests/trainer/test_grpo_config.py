"""What does not apply to a diffusion model is refused before any weight is loaded, by field, value and remedy."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers_grpo import build, config, losses, moved, reward, text_prompts, tiny, weights
from trl import GRPOConfig

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_dllm.generation import DecodingArguments
from trl_dllm.likelihood import ESTIMATORS, ExactTrajectory, MeanField, StepMerge
from trl_dllm.scripts import grpo


# field and value(s) -> (the value as the message must show it, a word of the remedy)
REFUSED = [
    ({"estimator": "step_merg"}, "'step_merg'", "did you mean 'step_merge'"),
    ({"estimator": "zzz"}, "'zzz'", "mean_field"),
    ({"num_segments": 0}, "0", "between 1 and"),
    ({"num_segments": 5, "diffusion_steps": 4}, "5", "decoding steps, 4"),
    ({"num_segments": 9, "confidence_threshold": 0.5, "diffusion_steps": None}, "9", "8"),
    ({"num_segments": 2, "estimator_kwargs": {"num_segments": 3}}, "2", "set one"),
    ({"num_segments": 2.0}, "2.0", "a whole number or None"),
    ({"num_segments": True}, "True", "a whole number or None"),
    ({"num_segments": "2"}, "'2'", "a whole number or None"),
    ({"estimator_kwargs": {"num_segmentz": 4}}, "'num_segmentz'", "did you mean 'num_segments'"),
    ({"estimator_kwargs": {"args": 4}, "estimator": "exact_trajectory"}, "'args'", "it takes no arguments"),
    ({"estimator_kwargs": [4]}, "[4]", "a mapping"),
    ({"estimator_kwargs": "num_segments: 4"}, "'num_segments: 4'", "a mapping"),
    ({"block_length": 3}, "3", "choose a divisor of 8"),
    ({"block_length": 0}, "0", "choose a divisor of 8"),
    ({"diffusion_steps": 3}, "3", "multiple of 2"),
    ({"diffusion_steps": 16}, "16", "between 2 and 8"),
    ({"tokens_per_step": 2, "diffusion_steps": 4}, "2", "set one"),
    ({"tokens_per_step": 3, "diffusion_steps": None}, "3", "choose a divisor of 4"),
    ({"max_completion_length": None}, "None", "set a number"),
    ({"remasking": "confidence"}, "'confidence'", "low_confidence"),
    ({"decoding": "autoregressive"}, "'autoregressive'", "denoising"),
    ({"future_blocks": "hidden"}, "'hidden'", "absent"),
    ({"old_logps": "sampler"}, "'sampler'", "choose 'recompute'"),
    ({"old_logps": "rollout", "num_segments": 2}, "'rollout'", "old_logps='recompute'"),
    (
        {"old_logps": "rollout", "estimator": "exact_trajectory", "p_mask_prompt": 0.15},
        "'rollout'",
        "p_mask_prompt=0.15",
    ),
    (
        {"old_logps": "rollout", "estimator": "exact_trajectory", "score_temperature": 0.5},
        "'rollout'",
        "score_temperature=0.5",
    ),
    ({"confidence_threshold": 0.9, "remasking": "left_to_right"}, "0.9", "choose 'low_confidence'"),
    ({"temperature": -1.0}, "-1.0", "0 is greedy"),
    ({"p_mask_prompt": 1.0}, "1.0", "0.15"),
    ({"p_mask_prompt": -0.1}, "-0.1", "[0, 1)"),
    ({"p_mask_prompt": float("nan")}, "nan", "a finite number"),
    ({"loss_tokens": "all"}, "'all'", "choose 'eos' or 'canvas'"),
    ({"ratio_denominator": "old_policy"}, "'old_policy'", "choose 'old', 'ref' or 'current'"),
    ({"kl_estimator": "k1"}, "'k1'", "choose 'k3' or 'full'"),
    ({"redraw_views": "no"}, "'no'", "true, false or a number"),
    ({"redraw_views": 3, "num_iterations": 2}, "3", "num_iterations=2"),
    ({"redraw_views": 0}, "0", "from 1 to"),
    ({"redraw_views": 1.5}, "1.5", "a number of draws"),
    ({"score_temperature": 0.0}, "0.0", "1.0"),
    ({"score_temperature": float("nan")}, "nan", "a finite number or None"),
    ({"score_temperature": float("inf")}, "inf", "a finite number or None"),
    ({"sampler_batch_size": 0}, "0", "None"),
    ({"sampler_batch_size": 4.0}, "4.0", "a whole number or None"),
    ({"cfg_scale": 1.5}, "1.5", "generation and evaluation"),
    ({"use_vllm": True}, "True", "masked diffusion decoding"),
    ({"use_transformers_continuous_batching": True}, "True", "leave it off"),
    ({"top_k": 50, "estimator": "pkl"}, "50", "take step_merge"),
    ({"top_p": 0.9, "estimator": "elbo"}, "0.9", "take step_merge"),
    ({"min_p": 0.1, "decoding": "any_order"}, "0.1", "any_order for any-order decoding"),
    ({"top_p": 1.5}, "1.5", "draws among all tokens"),
    ({"repetition_penalty": 1.1}, "1.1", "leave it at 1.0"),
    ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2", "block_length"),
    ({"generation_kwargs": {"block_lenght": 2}}, "block_lenght=2", "did you mean 'block_length'"),
    ({"cache_implementation": "static"}, "'static'", "use `cache`"),
    ({"use_liger_kernel": True}, "True", "leave it off"),
    ({"router_aux_loss_coef": 0.1}, "0.1", "leave it at 0"),
]


@pytest.mark.parametrize(
    "settings, value, remedy", REFUSED, ids=["-".join(map(str, case[0])) + f"={case[1]}" for case in REFUSED]
)
def test_a_setting_that_does_not_apply_is_refused_by_field_value_and_remedy(tmp_path, settings, value, remedy):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **settings)
    message = str(error.value)
    assert next(iter(settings)) in message, message
    assert value in message, message
    assert remedy in message, message


# ------------------------------------------------------------------------------------------------------------ defaults


def test_a_stock_config_runs_with_the_diffusion_defaults(tmp_path):
    model, tokenizer = tiny()
    args = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        num_iterations=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        beta=0.04,
    )
    trainer = DiffusionGRPOTrainer(model, reward, args, text_prompts(), processing_class=tokenizer)
    assert isinstance(trainer.args, DiffusionGRPOConfig) and isinstance(trainer.estimator, StepMerge)
    assert trainer.args.disable_dropout
    assert (trainer.sampling.block_length, trainer.sampling.diffusion_steps) == (12, 6)
    assert trainer.args.num_segments == 6 == trainer.estimator.num_segments
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer) and len(losses(trainer)) == 2


@pytest.mark.parametrize(
    "canvas, block, steps, segments",
    [(256, 32, 128, 8), (8, 8, 4, 4), (7, 7, 3, 3), (62, 31, 30, 8), (37, 1, 37, 8), (1, 1, 1, 1)],
)
def test_defaults_fit_every_canvas(tmp_path, canvas, block, steps, segments):
    found = config(tmp_path, max_completion_length=canvas, block_length=None, diffusion_steps=None)
    sampling = found.generation_config()
    assert (sampling.block_length, sampling.diffusion_steps, found.num_segments) == (block, steps, segments)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"estimator": "mean_field"}, MeanField),
        ({"estimator": "exact_trajectory"}, ExactTrajectory),
        ({"estimator_kwargs": {"num_segments": 3}}, StepMerge),
        ({"estimator_kwargs": '{"num_segments": 3}'}, StepMerge),
    ],
    ids=str,
)
def test_the_estimator_that_the_fields_name_is_built(tmp_path, settings, expected):
    built = config(tmp_path, **settings).build_estimator()
    assert type(built) is expected
    assert expected is not StepMerge or built.num_segments == 3


@pytest.mark.parametrize("segments", [2.0, True, "2", 0.0])
def test_segments_among_the_estimators_arguments_are_a_whole_number(tmp_path, segments):
    with pytest.raises(ValueError, match=f"num_segments={segments!r} must be a whole number"):
        config(tmp_path, estimator_kwargs={"num_segments": segments})


def test_segments_may_be_given_in_both_places_if_they_agree(tmp_path):
    found = config(tmp_path, num_segments=3, estimator_kwargs={"num_segments": 3})
    assert found.num_segments == 3 == found.build_estimator().num_segments
    assert config(tmp_path, estimator_kwargs={"num_segments": 3}).num_segments == 3


def test_under_a_threshold_a_canvas_may_take_a_step_a_token(tmp_path):
    found = config(tmp_path, num_segments=8, confidence_threshold=0.5, diffusion_steps=None)
    assert found.build_estimator().num_segments == 8


@pytest.mark.parametrize("estimator", ["mean_field", "exact_trajectory", "pkl"])
def test_segments_are_ignored_with_one_warning_by_an_estimator_that_has_none(tmp_path, recwarn, estimator):
    """More of them than decoding steps, too: the value belongs to another estimator."""
    found = config(tmp_path, estimator=estimator, num_segments=64)
    assert type(found.build_estimator()) is ESTIMATORS[estimator] and found.num_segments is None
    messages = [str(w.message) for w in recwarn if "num_segments" in str(w.message)]
    assert messages == [f"num_segments=64 is ignored: estimator={estimator!r} has no segments."]


def test_another_estimator_on_the_command_line_works_over_a_recipe_with_segments(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nnum_segments: 8\n")
    _, found, _ = grpo.make_parser().parse_args_and_config(["--config", str(recipe)])
    assert type(found.build_estimator()) is StepMerge and found.num_segments == 8
    with pytest.warns(UserWarning, match="num_segments=8 is ignored"):
        _, found, _ = grpo.make_parser().parse_args_and_config(["--config", str(recipe), "--estimator", "mean_field"])
    assert type(found.build_estimator()) is MeanField


def test_an_estimator_instance_replaces_the_named_one(tmp_path):
    trainer = build(tmp_path, estimator=StepMerge(2), num_segments=4)
    assert trainer.estimator.num_segments == 2
    trainer.train()


def test_every_field_is_documented_twice():
    # Those that TRL has too are documented where they mean something here (top_k, …).
    stock = {f.name for f in fields(GRPOConfig)} - {f.name for f in fields(DecodingArguments)}
    documented = " ".join(DiffusionGRPOConfig.__doc__.split())
    for f in fields(DiffusionGRPOConfig):
        if f.name not in stock or f.name == "disable_dropout":
            assert f.metadata.get("help"), f.name
            assert f.name in DiffusionGRPOConfig.__doc__, f.name
            assert f.metadata["help"] in documented, f.name
        else:
            assert f.metadata.get("help", "no help") not in documented, f.name


def test_importing_the_package_does_not_import_trl():
    """TRL takes seconds to import; samplers and likelihoods do without it."""
    code = (
        "import sys, trl_dllm as t; m = sys.modules; assert 'trl' not in m; t.DiffusionGRPOConfig; assert 'trl' in m"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def test_decoding_settings_may_stand_in_generation_kwargs(tmp_path):
    """Where they go before fields, as in TRL."""
    given = config(tmp_path, generation_kwargs={"block_length": 8, "remasking": "random"}, block_length=4)
    assert (given.block_length, given.remasking) == (8, "random")
    assert given.generation_config().block_length == 8
    build(tmp_path, generation_kwargs={"block_length": 8}).train()


# ------------------------------------------------------------------------------------------- an estimator of one's own

MINE = """
import trl_dllm.likelihood


class Mine(trl_dllm.likelihood.StepMerge):
    def __init__(self, strength: float, num_segments: int = 2):
        super().__init__(num_segments)
        self.strength = strength


mine = Mine(1.0)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_estimators.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_an_estimator_of_ones_own_is_named_by_its_path(mine):
    args = config(mine, estimator="my_estimators.Mine", estimator_kwargs={"strength": 2}, num_segments=3)
    built = args.build_estimator()
    assert type(built).__name__ == "Mine" and (built.strength, built.num_segments) == (2, 3)
    assert type(config(mine, estimator="trl_dllm.likelihood.MeanField").build_estimator()) is MeanField


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "no_such.Mine"}, r"estimator: 'no_such.Mine' cannot be imported: No module named 'no_such'"),
        ({"estimator": "my_estimators.Mein"}, r"has no 'Mein'; did you mean my_estimators.Mine\?"),
        ({"estimator": "my_estimators.mine"}, r"is a Mine, and must be a subclass of trl_dllm.likelihood.Estimator"),
        ({"estimator": "trl_dllm.Rollout"}, r"'trl_dllm.Rollout' is the class Rollout, and must be a subclass of"),
        ({"estimator": "my_estimators.Mine"}, r"estimator_kwargs=\{\}: 'my_estimators.Mine' needs .*'strength'"),
        (
            {"estimator": "my_estimators.Mine", "estimator_kwargs": {"strength": "2"}},
            r"estimator_kwargs: strength='2' must be a finite number",
        ),
        (
            {"estimator": "my_estimators.Mine", "estimator_kwargs": {"strength": 2, "strenght": 2}},
            r"estimator_kwargs: 'my_estimators.Mine' has no argument 'strenght'; did you mean 'strength'",
        ),
    ],
    ids=str,
)
def test_what_is_no_estimator_is_refused_by_field_value_and_remedy(mine, settings, message):
    with pytest.raises(ValueError, match=message):
        config(mine, **settings)
