"""Fast-dLLM's approximate caches, against a decoder that runs every column but with keys and values of earlier on."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from cases import MASK, PROMPTS, SEEDS, SHIFT, THRESHOLDS, assert_same_rollout, forwards_of, sample
from oracles import slow_decode

from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.likelihood import ExactTrajectory, token_logps
from trl_dllm.models import ForwardFlops
from trl_dllm.noise import hash64


CACHES = ("prefix", "dual")


class StaleModel:
    """A model for `slow_decode` whose k_proj and v_proj give, at kept columns, what they gave at the block's start."""

    def __init__(self, model, prompt, cache, block_length, shift):
        self.model, self.cache, self.size, self.start = model, cache, block_length, len(prompt)
        self.shift, self.block, self.states = shift, None, {}

    def __call__(self, input_ids, use_cache):
        masked = (input_ids[0, self.start :] == MASK).nonzero()
        block = int(masked[0]) // self.size
        begins, self.block = block != self.block, block
        first = self.start + block * self.size - self.shift
        last = first + self.shift + self.size if self.cache == "dual" else input_ids.shape[1]
        kept = [column for column in range(input_ids.shape[1]) if not first <= column < last]
        with self.hooks(begins, kept):
            return self.model(input_ids=input_ids, use_cache=False)

    @contextmanager
    def hooks(self, begins, kept):
        def hook(module, args, output):
            if begins:
                self.states[module] = output.clone()
            output[:, kept] = self.states[module][:, kept]
            return output

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name.endswith(("k_proj", "v_proj")):
                    stack.callback(module.register_forward_hook(hook).remove)
            yield


def assert_equals_oracle(model, family, rollout, cache, block_length=6, **settings):
    for row, prompt in enumerate(PROMPTS):
        stale = StaleModel(model, prompt, cache, block_length, SHIFT[family])
        tokens, steps, logps = slow_decode(
            stale,
            prompt,
            seed=int(SEEDS[row]),
            canvas=12,
            block_length=block_length,
            mask=MASK,
            shift=SHIFT[family],
            **settings,
        )
        assert rollout.unmask_step[row].tolist() == steps, f"steps of row {row}"
        assert rollout.completion_ids[row].tolist() == tokens, f"tokens of row {row}"
        torch.testing.assert_close(rollout.logps[row].double(), torch.tensor(logps).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_even_schedule_equals_slow_decoder(models, family, remasking, cache):
    model, settings = models(family), {"remasking": remasking, "temperature": 0.7}
    rollout = sample(model, diffusion_steps=8, cache=cache, **settings)
    assert_equals_oracle(model, family, rollout, cache, schedule=[2, 2, 1, 1], **settings)
    plain = sample(model, diffusion_steps=8, **settings)
    assert not torch.equal(rollout.logps, plain.logps), "the cache is approximate, and nothing was seen of it"
    first = plain.unmask_step == 0
    torch.testing.assert_close(rollout.logps[first], plain.logps[first])


@pytest.mark.parametrize("cache", CACHES)
def test_rows_in_different_blocks_equal_slow_decoder(models, family, cache):
    """A threshold: rows begin their blocks at different times, and one forward runs rows of different blocks."""
    model = models(family)
    settings = {"remasking": "margin", "temperature": 1.0}
    rollout = sample(model, confidence_threshold=THRESHOLDS["margin"], cache=cache, block_length=3, **settings)
    assert_equals_oracle(model, family, rollout, cache, 3, threshold=THRESHOLDS["margin"], **settings)
    assert len(set(rollout.num_steps.tolist())) > 1


@pytest.mark.parametrize("cache", CACHES)
def test_blocks_of_one_step_are_exact(models, family, cache):
    settings = {"block_length": 3, "diffusion_steps": 4, "temperature": 0.7}
    assert_same_rollout(sample(models(family), cache=cache, **settings), sample(models(family), **settings))


@pytest.mark.parametrize("cache", CACHES)
def test_identity_7_rows_do_not_depend_on_their_batch(models, family, cache):
    settings = {"confidence_threshold": 0.4, "cache": cache, "block_length": 3, "temperature": 1.0}
    prompts, seeds = [PROMPTS[i % 4] for i in range(12)], hash64(3, torch.arange(12))
    together = sample(models(family), prompts, seeds, **settings)
    for size in (1, 5):
        assert_same_rollout(sample(models(family), prompts, seeds, batch_size=size, **settings), together)


@pytest.mark.parametrize("cache", CACHES)
def test_forwards_are_counted_as_run(models, family, cache):
    model, settings = models(family), {"diffusion_steps": 8, "block_length": 6, "temperature": 1.0, "cache": cache}
    rollout, shapes = forwards_of(model, sample, **settings)
    width, shift = rollout.prompt_ids.shape[1], SHIFT[family]
    assert rollout.num_forwards == 8
    behind = {"prefix": (12, 6), "dual": (6, 6)}[cache]
    assert [shape[1] for shape in shapes] == [w for b in behind for w in (width + 12, *[b + shift] * 3)]
    count = ForwardFlops(model)
    expected = 0
    for b in behind:
        for step, heads in enumerate((6, 4, 2, 1)):
            queries, keys = (width + 12, width + 12) if step == 0 else (b + shift, width + 12 + b + shift)
            expected += count(4, queries, keys, 4 * heads)
    assert rollout.flops == expected


@pytest.mark.parametrize("cache", CACHES)
def test_early_stop_leaves_the_other_rows_as_they_are(models, family, cache):
    settings = {"diffusion_steps": 12, "block_length": 3, "temperature": 1.0, "cache": cache}
    whole = sample(models(family), **settings)
    eos = int(whole.completion_ids[1, 1])
    stopped = sample(models(family), stop_at_eos=True, eos_token_ids=(eos,), **settings)
    revealed = stopped.revealed
    assert not revealed.all() and revealed.any(dim=1).all()
    assert torch.equal(stopped.completion_ids[revealed], whole.completion_ids[revealed])


@pytest.mark.parametrize("cache", CACHES)
def test_its_log_probs_are_the_samplers_and_the_exact_ones_differ(models, family, cache):
    rollout = sample(models(family), diffusion_steps=8, temperature=1.0, cache=cache)
    exact = token_logps(models(family), rollout, ExactTrajectory()).logps
    counted = rollout.counted
    first = (rollout.unmask_step % 4 == 0) & counted  # each block's first step
    torch.testing.assert_close(exact[first], rollout.logps[first].to(exact.dtype), atol=1e-5, rtol=0)
    assert (exact - rollout.logps)[counted & ~first].abs().max() > 1e-3


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match=r"cache='dual' is not available for decoding='any_order'"):
        DiffusionGenerationConfig(cache="dual", decoding="any_order")
    with pytest.raises(ValueError, match=r"cfg_scale=1.0 needs cache=None, got 'prefix'"):
        DiffusionGenerationConfig(cache="prefix", cfg_scale=1.0)
