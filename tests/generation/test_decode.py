"""`generate`: rows and batches, seeds, processes, and what it leaves alone."""

import pytest
import torch
from cases import PROMPTS, SEEDS, assert_same_rollout, sample
from oracles import left_pad, sharp_model

from trl_dllm.generation import DiffusionGenerationConfig, LogitsNotFinite, decode, generate


@pytest.mark.parametrize("settings", [{"diffusion_steps": 8}, {"confidence_threshold": 0.15, "stop_at_eos": True}])
def test_identity_7_rows_do_not_depend_on_their_batch(models, family, settings):
    """Left padding, batch order, batch size: same seeds, same tokens and steps."""
    model = models(family)
    settings = {"temperature": 0.9, "eos_token_ids": tuple(range(40, 60)), **settings}
    rollout = sample(model, **settings)
    assert_same_rollout(rollout, sample(model, width=15, **settings))
    order = [2, 0, 3, 1]
    shuffled = sample(model, [PROMPTS[i] for i in order], SEEDS[order], **settings)
    assert_same_rollout(rollout, shuffled, order)
    assert_same_rollout(rollout, sample(model, batch_size=1, **settings))
    assert_same_rollout(rollout, sample(model, batch_size=3, **settings))
    assert_same_rollout(rollout, sample(model, PROMPTS[1:2], SEEDS[1:2], **settings), [1])
    other = sample(model, seeds=SEEDS + 1, **settings)
    assert not torch.equal(other.completion_ids, rollout.completion_ids)


def test_seeds_are_kept_and_default_ones_repeat(models):
    model = models("llada")
    assert torch.equal(sample(model).view_seed, SEEDS)
    first, again = sample(model, seeds=None), sample(model, seeds=None)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert len(first.view_seed.unique()) == len(PROMPTS)
    same_prompt = sample(model, [PROMPTS[1]] * 2, seeds=None)
    assert not torch.equal(same_prompt.completion_ids[0], same_prompt.completion_ids[1])


def test_global_generator_and_model_are_left_alone(models, family):
    model, before = models(family), torch.get_rng_state()
    head = model.get_output_embeddings()
    sample(model)
    assert torch.equal(before, torch.get_rng_state())
    assert "forward" not in head.__dict__


def test_a_process_without_rows_left_still_runs_forwards(models):
    """`still_running` keeps a finished process in step: spare forwards, the same rollout."""
    model, asked = models("llada"), []

    def still_running(local: bool) -> bool:
        asked.append(local)
        return len(asked) <= 9

    ids, mask = left_pad(PROMPTS)
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, diffusion_steps=6)
    rollout = generate(model, ids, mask, config, seeds=SEEDS, still_running=still_running)
    assert asked == [True] * 6 + [False] * 4
    assert_same_rollout(generate(model, ids, mask, config, seeds=SEEDS), rollout)


@pytest.mark.parametrize("prompts", [[[]] * 4, [[5], [], [6, 7], [8]]])
def test_empty_prompts_are_refused_for_a_shifted_family(models, prompts):
    with pytest.raises(ValueError, match=r"logits_shift=1.*prompt of at least one token"):
        sample(models("dream"), prompts)


@pytest.mark.parametrize(
    ("decoding", "cache", "decoder"),
    [
        ("denoising", None, "Denoising"),
        ("any_order", None, "AnyOrderDecoding"),
        ("any_order", "exact", "CachedAnyOrderDecoding"),
    ],
)
def test_each_decoding_has_its_decoder(models, monkeypatch, decoding, cache, decoder):
    """Told apart by what they are, as both any-order decoders draw the same."""
    made = []
    for name in ("Denoising", "AnyOrderDecoding", "CachedAnyOrderDecoding"):
        plain = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *args, plain=plain: made.append(plain.__name__) or plain(*args))
    sample(models("llada"), batch_size=3, diffusion_steps=2, decoding=decoding, cache=cache)
    assert made == [decoder] * 2, "one for each batch"


def test_no_rows_give_an_empty_rollout(models):
    """A process may have none; it still runs what it is asked to."""
    ids, asked = torch.zeros(0, 3, dtype=torch.int64), []

    def still_running(local: bool) -> bool:
        asked.append(local)
        return False

    config = DiffusionGenerationConfig(max_new_tokens=4)
    rollout = generate(models("llada"), ids, ids.bool(), config, still_running=still_running).validate()
    assert len(rollout) == rollout.num_forwards == 0 and rollout.completion_ids.shape == (0, 4)
    assert asked == [False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "settings",
    [
        {"diffusion_steps": 4},
        {"diffusion_steps": 4, "temperature": 0.0},
        {"confidence_threshold": 0.5, "batch_size": 1},
        {"decoding": "any_order", "remasking": "random"},
        {"decoding": "any_order", "remasking": "random", "cache": "exact"},
    ],
    ids=["sampled", "greedy", "threshold", "any_order", "cached"],
)
def test_logits_that_are_not_finite_are_an_error_that_names_the_rows(settings, value):
    """One weight is broken, of a token that is in two of the prompts. Any token could have been drawn."""
    model = sharp_model("llada", dtype=torch.float32)
    assert (sample(model, **settings).logps <= 0).all()
    with torch.no_grad():
        model.get_input_embeddings().weight[90, 3] = value
    prompts = [[90, 7], [7, 8, 9], [10], [11, 90]]
    with pytest.raises(LogitsNotFinite, match=r"in 2 row\(s\) of the batch: 0, 3\. Its weights may be") as error:
        sample(model, prompts, **settings)
    assert error.value.rows == [0, 3]


def test_a_prompt_and_canvas_beyond_the_models_positions_are_refused(models):
    """Of each row, not of its padding."""
    model = models("llada")
    limit, config = model.config.max_position_embeddings, DiffusionGenerationConfig(8)
    ids = torch.full((1, limit - 7), 5)
    with pytest.raises(ValueError, match=f"{limit - 7} prompt tokens and max_new_tokens=8 are beyond"):
        generate(model, ids, torch.ones_like(ids), config)
    short = torch.ones_like(ids)
    short[:, : limit - 20] = 0
    decode.check_positions(model.config, int(short.sum()), 8, "max_new_tokens")
