"""The denoising sampler against a decoder that takes one row, one forward and one token at a time (METHODS §3.1)."""

import math
from collections import Counter

import pytest
import torch
from oracles import (
    chi_square_p,
    enumerate_trajectories,
    left_pad,
    random_table,
    sharp_model,
    slow_decode,
    token_distribution,
)

from trl_dllm.generation import DiffusionGenerationConfig, default_eos, generate, resolve_schedule
from trl_dllm.generation.order import VALUE_INDEPENDENT, draw_tokens, reveal
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model, log_probs
from trl_dllm.noise import hash64, uniform


MASK, VOCAB = 3, 101
PROMPTS = [[17, 60, 9], [44, 8, 71, 25, 90, 33, 12], [55], [81, 20, 20, 67, 5]]
SEEDS = torch.tensor([9, -(2**50), 77, 2**61])
REMASKING = ["low_confidence", "margin", "entropy", "random", "left_to_right"]
# About half of a step's candidates are above these on the tiny models.
THRESHOLDS = {"low_confidence": 0.15, "margin": 0.1, "entropy": -3.5, "random": 0.6}
SHIFT = {"llada": 0, "dream": 1}


def sample(model, prompts=PROMPTS, seeds=SEEDS, width=None, batch_size=None, **settings):
    settings = {"max_new_tokens": 12, "block_length": 6, "stop_at_eos": False, "eos_token_ids": (1,), **settings}
    ids, mask = left_pad(prompts, width)
    config = DiffusionGenerationConfig(**settings)
    return generate(model, ids, mask, config, seeds=seeds, batch_size=batch_size).validate()


def assert_equals_oracle(model, family, rollout, prompts=PROMPTS, seeds=SEEDS, atol=1e-5, **settings):
    settings = {"canvas": 12, "block_length": 6, "mask": MASK, "shift": SHIFT[family], **settings}
    for row, prompt in enumerate(prompts):
        tokens, steps, logps = slow_decode(model, prompt, seed=int(seeds[row]), **settings)
        assert rollout.unmask_step[row].tolist() == steps, f"steps of row {row}"
        assert rollout.completion_ids[row].tolist() == tokens, f"tokens of row {row}"
        torch.testing.assert_close(rollout.logps[row].double(), torch.tensor(logps).double(), atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------- the decoding oracle


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("remasking", REMASKING)
def test_even_schedule_equals_slow_decoder(models, family, remasking, temperature):
    """8 steps for 12 tokens in two blocks of 6: 2, 2, 1, 1 tokens a step; rows differ in prompt length."""
    model = models(family)
    rollout = sample(model, remasking=remasking, temperature=temperature, diffusion_steps=8)
    assert_equals_oracle(model, family, rollout, remasking=remasking, temperature=temperature, schedule=[2, 2, 1, 1])
    assert rollout.temperature == temperature and rollout.num_forwards == 8
    assert rollout.num_steps.tolist() == [8] * 4


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("remasking", [name for name in REMASKING if name != "left_to_right"])
def test_threshold_equals_slow_decoder(models, family, remasking, temperature):
    """Every position above the threshold and at least one; rows differ in the number of steps."""
    model, threshold = models(family), THRESHOLDS[remasking]
    rollout = sample(model, remasking=remasking, temperature=temperature, confidence_threshold=threshold)
    assert_equals_oracle(model, family, rollout, remasking=remasking, temperature=temperature, threshold=threshold)
    counts = [Counter(steps) for steps in rollout.unmask_step.tolist()]
    assert any(n > 1 for row in counts for n in row.values()), "the threshold was never passed by two positions"
    assert len(set(rollout.num_steps.tolist())) > 1, "rows should differ in their number of steps"
    assert rollout.num_forwards == int(rollout.num_steps.max())


def test_float32_model_equals_slow_decoder(models, family):
    model = models(family, torch.float32)
    rollout = sample(model, temperature=0.8, diffusion_steps=6)
    assert rollout.logps.dtype == torch.float32
    assert_equals_oracle(
        model, family, rollout, atol=1e-4, remasking="low_confidence", temperature=0.8, schedule=[2, 2, 2]
    )


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_guidance_equals_slow_decoder(models, family, temperature):
    """Classifier-free guidance: u + (w + 1)(c - u), u with every prompt token masked (padding stays padding)."""
    model, settings = models(family), {"remasking": "margin", "temperature": temperature, "cfg_scale": 0.8}
    rollout = sample(model, diffusion_steps=8, **settings)
    assert_equals_oracle(model, family, rollout, schedule=[2, 2, 1, 1], **settings)
    plain = sample(model, diffusion_steps=8, **{**settings, "cfg_scale": 0.0})
    assert not torch.equal(plain.completion_ids, rollout.completion_ids)


@pytest.mark.parametrize("remasking", VALUE_INDEPENDENT)
def test_sampled_trajectories_have_their_exact_probabilities(remasking):
    """Chi-square of 6,000 rollouts on a brute-force model against every trajectory's probability (§3.1)."""
    model, schedule = random_table(canvas=3, vocab=3, seed=5, scale=0.7), [2, 1]
    probability = Counter()
    for t in enumerate_trajectories(model, remasking, schedule, temperature=0.8):
        probability[t.tokens, t.steps] += t.order_prob * t.log_prob.exp().item()
    assert math.isclose(sum(probability.values()), 1.0, abs_tol=1e-12)
    n = 6000
    empty = torch.zeros(n, 0, dtype=torch.int64)
    config = DiffusionGenerationConfig(
        max_new_tokens=3, block_length=3, diffusion_steps=2, temperature=0.8, remasking=remasking, stop_at_eos=False
    )
    rollout = generate(model, empty, empty.bool(), config, seeds=hash64(123, torch.arange(n)))
    drawn = zip(rollout.completion_ids.tolist(), rollout.unmask_step.tolist(), strict=True)
    seen = Counter((tuple(tokens), tuple(steps)) for tokens, steps in drawn)
    assert set(seen) <= set(probability), "a trajectory of probability 0 was drawn"
    common = [key for key, p in probability.items() if n * p >= 8]
    observed = [seen[key] for key in common] + [n - sum(seen[key] for key in common)]
    expected = [n * probability[key] for key in common]
    if n - sum(expected) >= 5:
        expected.append(n - sum(expected))
    else:
        observed.pop()
    expected = [e * sum(observed) / sum(expected) for e in expected]
    assert chi_square_p(observed, expected) > 1e-3


# -------------------------------------------------------------------------------------------- stop at the EOS


def _common_eos(model, family, **settings):
    """End-of-sequence ids that a full decoding reveals in the first of three blocks of some rows only."""
    tokens = sample(model, max_new_tokens=12, block_length=4, diffusion_steps=6, **settings).completion_ids
    return int(tokens[0, 1]), int(tokens[2, 6])


def test_stop_at_eos_leaves_later_blocks_undecoded(models, family):
    """Later blocks stay [MASK] with step -1; the rows that go on are not changed by those that left the batch."""
    model = models(family)
    eos = _common_eos(model, family)
    settings = {"max_new_tokens": 12, "block_length": 4, "diffusion_steps": 6, "eos_token_ids": eos}
    stopped, whole = sample(model, stop_at_eos=True, **settings), sample(model, stop_at_eos=False, **settings)
    assert_equals_oracle(
        model, family, stopped, block_length=4, schedule=[2, 2], eos=eos, stop_at_eos=True, remasking="low_confidence"
    )
    ends = []
    for row in range(4):
        blocks = [b for b in range(3) if set(whole.completion_ids[row, 4 * b : 4 * b + 4].tolist()) & set(eos)]
        end = 4 * (blocks[0] + 1) if blocks else 12
        ends.append(end)
        assert stopped.completion_ids[row, :end].tolist() == whole.completion_ids[row, :end].tolist()
        assert stopped.completion_ids[row, end:].tolist() == [MASK] * (12 - end)
        assert stopped.unmask_step[row, end:].tolist() == [-1] * (12 - end)
        assert stopped.logps[row, end:].eq(0).all()
    assert ends[0] == 4 and ends[2] <= 8 and len(set(ends)) > 1, f"ends {ends} should differ"
    assert stopped.num_forwards == max(ends) // 2
    assert whole.num_forwards == 6 and whole.revealed.all()


def test_counted_ends_with_the_first_eos(models, family):
    """Counted: revealed positions up to and including the first EOS, any of the given ids."""
    model = models(family)
    eos = _common_eos(model, family)
    for stop in (True, False):
        rollout = sample(
            model, max_new_tokens=12, block_length=4, diffusion_steps=6, eos_token_ids=eos, stop_at_eos=stop
        )
        for row in range(4):
            tokens, steps = rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist()
            expected = [steps[i] >= 0 and not set(tokens[:i]) & set(eos) for i in range(12)]
            assert rollout.counted[row].tolist() == expected
    assert len(set(rollout.counted.sum(1).tolist())) > 1


def test_eos_of_the_model_is_the_default(models):
    model = models("llada")
    assert default_eos(model) == (1,)
    table = random_table(2, 3, 0)
    assert default_eos(table) == ()
    table.config.eos_token_id = [0, 1]
    assert default_eos(table) == (0, 1)
    empty = torch.zeros(5, 0, dtype=torch.int64)
    rollout = generate(table, empty, empty.bool(), DiffusionGenerationConfig(max_new_tokens=2, block_length=1))
    assert rollout.unmask_step.tolist() == [[0, -1]] * 5, "every token of this table is an EOS"


# --------------------------------------------------------------------------------------- identity 7: contract


def _rows_equal(a, b, order=None):
    order = list(range(len(a))) if order is None else order
    assert torch.equal(a.completion_ids[order], b.completion_ids), "tokens"
    assert torch.equal(a.unmask_step[order], b.unmask_step), "steps"
    torch.testing.assert_close(a.logps[order], b.logps, atol=1e-5, rtol=0)
    assert torch.equal(a.counted[order], b.counted)


@pytest.mark.parametrize("settings", [{"diffusion_steps": 8}, {"confidence_threshold": 0.15, "stop_at_eos": True}])
def test_identity_7_rows_do_not_depend_on_their_batch(models, family, settings):
    """Left padding, batch order, batch size: same seeds, same tokens and steps."""
    model = models(family)
    settings = {"temperature": 0.9, "eos_token_ids": tuple(range(40, 60)), **settings}
    rollout = sample(model, **settings)
    _rows_equal(rollout, sample(model, width=15, **settings))
    order = [2, 0, 3, 1]
    shuffled = sample(model, [PROMPTS[i] for i in order], SEEDS[order], **settings)
    _rows_equal(rollout, shuffled, order)
    _rows_equal(rollout, sample(model, batch_size=1, **settings))
    _rows_equal(rollout, sample(model, batch_size=3, **settings))
    _rows_equal(rollout, sample(model, PROMPTS[1:2], SEEDS[1:2], **settings), [1])
    other = sample(model, seeds=SEEDS + 1, **settings)
    assert not torch.equal(other.completion_ids, rollout.completion_ids)


def test_identity_7_padding_tokens_are_never_read(models, family):
    model = models(family)
    ids, mask = left_pad(PROMPTS, 9, pad=0)
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, cfg_scale=0.5)
    a = generate(model, ids, mask, config, seeds=SEEDS)
    b = generate(model, ids.masked_fill(~mask, 88), mask, config, seeds=SEEDS)
    _rows_equal(a, b)
    c = generate(model, ids, mask.long(), config, seeds=SEEDS)  # tokenizers give integers
    _rows_equal(a, c)
    assert c.prompt_mask.dtype == torch.bool


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
    _rows_equal(generate(model, ids, mask, config, seeds=SEEDS), rollout)


# -------------------------------------------------------------------------------------- exactness of sampling


def test_draws_from_a_few_tokens_are_exact():
    p = torch.tensor([0.05, 0.0, 0.4, 0.25, 0.3, 0.0], dtype=torch.float64)
    n = 20_000
    tokens = draw_tokens(p.log().expand(n, -1), uniform(1, torch.arange(n)))
    counts = torch.bincount(tokens, minlength=6)
    assert counts[1] == counts[5] == 0
    assert chi_square_p(counts[p > 0], n * p[p > 0]) > 1e-3


def test_draws_at_the_ends_of_the_interval():
    """u = 0 skips leading zeros; the largest u below 1 stays on a token that has probability."""
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).double().repeat(3, 1)
    assert draw_tokens(p.log(), torch.tensor([0.0, 0.5, 1 - 2.0**-53]).double()).tolist() == [1, 2, 2]


def test_a_diffuse_tail_is_drawn_exactly():
    """.60/.30/.10 with the .10 spread over 126k tokens: Gumbel noise in bf16 never draws the tail (§3.1)."""
    vocab, n, chunk = 126_464, 800, 50
    logits = torch.full((vocab,), math.log(0.1 / (vocab - 3)))
    logits[7], logits[90_000], logits[5] = math.log(0.6), math.log(0.3), 3.0  # 5 is the mask
    log_p = log_probs(logits, mask_token_id=5)
    draws = uniform(2, torch.arange(n))
    tokens = torch.cat([draw_tokens(log_p.expand(chunk, -1), draws[i : i + chunk]) for i in range(0, n, chunk)])
    counts = [int((tokens == 7).sum()), int((tokens == 90_000).sum())]
    counts.append(n - sum(counts))
    assert chi_square_p(counts, [0.6 * n, 0.3 * n, 0.1 * n]) > 1e-3
    tail = tokens[(tokens != 7) & (tokens != 90_000)]
    thirds = torch.bincount(tail * 3 // vocab, minlength=3)
    assert chi_square_p(thirds, torch.full((3,), len(tail) / 3)) > 1e-3


def test_the_mask_is_never_drawn_on_a_fresh_model():
    """The mask's own probability is 1/V before training: 2,560 draws would draw it 25 times."""
    model, tokenizer = create_tiny_model("llada", hidden_size=16, num_layers=1)
    empty = torch.zeros(160, 0, dtype=torch.int64)
    for temperature in (1.0, 3.0):
        config = DiffusionGenerationConfig(
            max_new_tokens=16, block_length=16, diffusion_steps=1, temperature=temperature, remasking="random"
        )
        rollout = generate(model, empty, empty.bool(), config, seeds=torch.arange(160)).validate()
        assert rollout.revealed.all() and (rollout.completion_ids != tokenizer.mask_token_id).all()
        assert len(rollout.completion_ids.unique()) == len(tokenizer) - 1


def test_the_mask_is_never_drawn_where_it_is_the_favourite():
    """Greedy or not, and the reported log-probs are those of the distribution without it."""
    model = random_table(canvas=3, vocab=4, seed=0, mask_token_id=1)
    with torch.no_grad():
        model.table[..., 1] += 50
    empty = torch.zeros(40, 0, dtype=torch.int64)
    for temperature in (0, 1.0):
        config = DiffusionGenerationConfig(
            max_new_tokens=3, block_length=3, diffusion_steps=3, temperature=temperature, remasking="left_to_right"
        )
        rollout = generate(model, empty, empty.bool(), config, seeds=torch.arange(40)).validate()
        assert rollout.revealed.all() and (rollout.completion_ids != 1).all()
        for tokens, logps in zip(rollout.completion_ids.tolist(), rollout.logps.tolist(), strict=True):
            for i in range(3):
                canvas = tuple(tokens[:i] + [1] * (3 - i))
                assert math.isclose(model.conditional(canvas, i)[tokens[i]].item(), logps[i], abs_tol=1e-9)


# ----------------------------------------------------------------------------------------- which are revealed


def test_reveal_breaks_ties_to_the_smaller_position():
    measures = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [-3.0, -2.0, -2.0, -9.0]])
    candidates = torch.tensor([[True] * 4, [False, True, True, True], [True, False, True, True]])
    assert reveal(measures, candidates, torch.tensor([2, 2, 1]), None).nonzero().tolist() == [
        [0, 0], [0, 1], [1, 1], [1, 2], [2, 2]
    ]  # fmt: skip


def test_reveal_with_a_threshold_keeps_strictly_more_and_at_least_one():
    measures = torch.tensor([[0.5, 0.9, 0.6, 0.2], [0.1, 0.3, 0.3, 0.9]])
    candidates = torch.tensor([[True] * 4, [True, True, True, False]])
    kept = reveal(measures, candidates, torch.tensor([1, 1]), 0.5)
    assert kept.nonzero().tolist() == [[0, 1], [0, 2], [1, 1]]


# --------------------------------------------------------------------------------------- prompts and families


def test_empty_prompts_work_for_an_unshifted_family(models):
    """P = 0, and a row without a token in a padded batch, are the same decoding."""
    model = models("llada")
    rollout = sample(model, [[]] * 4, diffusion_steps=8)
    assert rollout.prompt_ids.shape == (4, 0)
    assert_equals_oracle(model, "llada", rollout, prompts=[[]] * 4, schedule=[2, 2, 1, 1], remasking="low_confidence")
    mixed = sample(model, [[], *PROMPTS[1:]], diffusion_steps=8)
    assert torch.equal(mixed.completion_ids[0], rollout.completion_ids[0])


@pytest.mark.parametrize("prompts", [[[]] * 4, [[5], [], [6, 7], [8]]])
def test_empty_prompts_are_refused_for_a_shifted_family(models, prompts):
    with pytest.raises(ValueError, match=r"logits_shift=1.*prompt of at least one token"):
        sample(models("dream"), prompts)


def test_a_given_spec_wins_over_the_config(models):
    """`spec=`: a stock decoder's other mask token, and no shift."""
    model, (ids, mask) = models("dream"), left_pad(PROMPTS)
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, diffusion_steps=4, temperature=0.7)
    rollout = generate(model, ids, mask, config, seeds=SEEDS, spec=MaskedDiffusionSpec(mask_token_id=50))
    assert rollout.mask_token_id == 50
    assert_equals_oracle(
        model, "llada", rollout, mask=50, schedule=[3, 3], temperature=0.7, remasking="low_confidence"
    )


# --------------------------------------------------------------------------------------------------- counters


def test_forwards_and_flops_are_counted(models):
    """Two a multiply-add: linear layers, attention, head tiles of 64 rows; finished rows are not counted."""
    model = models("llada")
    hidden, layers, inner = 32, 2, 80
    eos = _common_eos(model, "llada")
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


# ----------------------------------------------------------------------------------------------------- config


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


def test_only_low_confidence_depends_on_drawn_values():
    """Under the other four orders two draws of the first step reveal the same positions (§3.1)."""
    model = sharp_model("llada", seed=3)
    for remasking in REMASKING:
        config = DiffusionGenerationConfig(max_new_tokens=12, block_length=12, diffusion_steps=4, remasking=remasking)
        assert config.value_independent == (remasking != "low_confidence")
        ids, mask = left_pad([PROMPTS[0]] * 12)
        rollout = generate(model, ids, mask, config, seeds=torch.arange(12))
        first = {tuple(row) for row in (rollout.unmask_step == 0).tolist()}
        assert (len(first) == 1) == (remasking in ("margin", "entropy", "left_to_right"))


def test_oracle_distribution_leaves_the_mask_out():
    p = token_distribution(torch.tensor([0.0, 1.0, 9.0]).double(), mask=2, temperature=0.5)
    assert p[2] == 0 and math.isclose(p[1] / p[0], math.exp(2)) and math.isclose(p.sum(), 1)
