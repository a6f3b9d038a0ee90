"""`generate`: rows and batches, seeds, processes, and what it leaves alone."""

from collections import Counter
from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
from cases import MASK, PROMPTS, SEEDS, THRESHOLDS, VOCAB, assert_same_rollout, sample
from oracles import left_pad, sharp_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trl_dllm.generation import DiffusionGenerationConfig, LogitsNotFinite, decode, generate
from trl_dllm.noise import hash64


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
    assert made == [decoder]


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


# ------------------------------------------------------------------------------------------------- continuous batching


DECODERS = {
    "denoising": {},
    "guided": {"cfg_scale": 0.5},
    "truncated": {"top_p": 0.9},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "any_order": {"decoding": "any_order"},
    "cached": {"decoding": "any_order", "cache": "exact"},
}


@pytest.mark.parametrize("limit", [2, 3, 5])
@pytest.mark.parametrize("decoder", DECODERS)
def test_rows_that_take_finished_rows_places_are_decoded_as_alone(models, decoder, limit):
    """Rows of a threshold that also stop at an EOS: they join at any step of the others, and in any block."""
    model = models("llada")
    prompts, seeds = [PROMPTS[i % 4] for i in range(11)], hash64(4, torch.arange(11))
    settings = {
        **DECODERS[decoder],
        "remasking": "margin",
        "confidence_threshold": THRESHOLDS["margin"],
        "block_length": 4,
        "stop_at_eos": True,
        "eos_token_ids": tuple(range(40, 60)),
    }
    rollout = sample(model, prompts, seeds, batch_size=limit, **settings)
    for row in range(11):
        alone = sample(model, [prompts[row]], seeds[row : row + 1], **settings)
        assert_same_rollout(rollout, alone, [row])
        if alone.support is not None:
            assert {*rollout.support[row].flatten().tolist()} == {*alone.support.flatten().tolist()}
    assert len(set(rollout.num_steps.tolist())) > 2


def test_a_waiting_row_begins_in_the_forward_behind_the_last_of_another(models):
    """Every forward is full as long as rows wait, and the order of the rows is the prompts'."""
    model, sizes = models("llada"), []
    prompts, seeds = [PROMPTS[i % 4] for i in range(11)], hash64(4, torch.arange(11))
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rollout = sample(model, prompts, seeds, batch_size=3, confidence_threshold=0.15)
    hook.remove()
    places, waiting, expected = [], rollout.num_steps.tolist(), []
    while places or waiting:
        while waiting and len(places) < 3:
            places.append(waiting.pop(0))
        expected.append(len(places))
        places = [steps - 1 for steps in places if steps > 1]
    assert sizes == expected and rollout.num_forwards == len(expected)
    assert sum(expected) == int(rollout.num_steps.sum())
    assert len(expected) < sum(int(rollout.num_steps[n : n + 3].max()) for n in range(0, 11, 3))


# --------------------------------------------------------------------------------------- waiting for the device


class Waits(TorchDispatchMode):
    """Counts operations for which a program on a GPU waits for it, outside the model's own layers."""

    NAMES = "nonzero _local_scalar_dense isin _unique2 unique_dim unique_consecutive masked_select equal bincount"

    def __init__(self, model):
        super().__init__()
        self.counts, self.model, self.paused, self.stack = Counter(), model, 0, ExitStack()
        mode = self

        class Reads(TorchFunctionMode):
            """What reads a tensor, or copies one to the device, without an operation that a dispatcher sees."""

            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                copies = function in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
                if not mode.paused and (name in ("tolist", "numpy", "new_tensor") or copies):
                    mode.counts[name] += 1
                return function(*args, **(kwargs or {}))

        self.reads = Reads()

    def __enter__(self):
        body = self.model.model
        self.stack.enter_context(self.reads)
        self.stack.callback(body.register_forward_pre_hook(lambda *args: self.pause(1)).remove)
        self.stack.callback(body.register_forward_hook(lambda *args: self.pause(-1)).remove)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def pause(self, number):
        self.paused += number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if not self.paused and (name in self.NAMES.split() or masks or repeats):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def waits_of_steps(model, batch_size=None, **settings) -> tuple[list[int], torch.Tensor]:
    """How often each step waits, the prompts' pass into a cache among them, and the rows' steps."""
    asked, waits = [], Waits(model)

    def still_running(running: bool) -> bool:
        asked.append(waits.counts.total())
        return running

    config = DiffusionGenerationConfig(12, **{"stop_at_eos": False, **settings})
    with waits:
        rollout = generate(model, *left_pad(PROMPTS), config, SEEDS, None, batch_size, still_running)
    return [after - before for before, after in pairwise(asked)], rollout.num_steps


def test_what_waits_is_counted(models):
    x = torch.arange(6)
    with Waits(models("llada")) as waits:
        x[x > 3], x.nonzero(), bool(x.any()), int(x.max()), x.tolist(), torch.isin(x, x[:2]), torch.unique(x)
        x[x > 3] = 0
        torch.tensor([1], device="cpu"), torch.bincount(x), x.repeat_interleave(x), torch.equal(x, x)
        x[x[:2]], x.argsort(), torch.tensor([1]), x.max()
    assert waits.counts.total() >= 12 and waits.counts["index"] == 1 and waits.counts["_local_scalar_dense"] == 2


UNTRUNCATED = [name for name in DECODERS if name != "truncated"]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("decoder", UNTRUNCATED)
def test_a_step_of_a_fixed_schedule_waits_for_nothing(models, decoder, remasking):
    """With `stop_at_eos` the steps that complete a block read one table, and no others."""
    settings = {**DECODERS[decoder], "remasking": remasking, "block_length": 4, "temperature": 0.7}
    settings["diffusion_steps"], prompts = 6, [0] * (decoder == "cached")
    waits, _ = waits_of_steps(models("llada"), **settings)
    assert waits == prompts + [0] * 6
    waits, steps = waits_of_steps(models("llada"), stop_at_eos=True, eos_token_ids=(MASK,), **settings)
    assert waits == prompts + [0, 1] * 3 and steps.tolist() == [6] * 4
    eos = tuple(range(0, VOCAB, 4))
    waits, steps = waits_of_steps(models("llada"), 2, stop_at_eos=True, eos_token_ids=eos, **settings)
    assert 0 < sum(waits) <= len(waits) // 2 and len(set(steps.tolist())) > 1


@pytest.mark.parametrize("decoder", UNTRUNCATED)
def test_a_step_of_a_threshold_waits_once(models, decoder):
    for stop in (False, True):
        settings = {**DECODERS[decoder], "confidence_threshold": 0.15, "stop_at_eos": stop}
        waits, _ = waits_of_steps(models("llada"), 3, **settings)
        assert set(waits) <= {0, 1} and waits.count(0) == 2 * (decoder == "cached"), (
            "the prompts' passes wait for none"
        )


def test_a_truncated_draw_waits_for_the_number_of_its_tokens(models):
    """Two for each tile, whose rows name different numbers, and one for the step."""
    waits, _ = waits_of_steps(models("llada"), diffusion_steps=6, top_p=0.9)
    assert set(waits) == {3}
