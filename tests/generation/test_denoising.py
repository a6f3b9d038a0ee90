"""The denoising sampler against a decoder that takes one row and one token at a time (docs/methods.md §3.1)."""

import math
from collections import Counter

import pytest
import torch
from cases import (
    MASK,
    PROMPTS,
    REMASKING,
    SEEDS,
    SHIFT,
    THRESHOLDS,
    VOCAB,
    assert_equals_slow_decoder,
    assert_same_rollout,
    common_eos,
    sample,
)
from oracles import chi_square_p, enumerate_trajectories, left_pad, random_table

from trl_dllm.generation import DiffusionGenerationConfig, default_eos, generate
from trl_dllm.generation.order import VALUE_INDEPENDENT
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.noise import hash64


def assert_equals_oracle(model, family, rollout, **settings):
    assert_equals_slow_decoder(model, rollout, **{"shift": SHIFT[family], **settings})


# ------------------------------------------------------------------------------------------------- the decoding oracle


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


# ----------------------------------------------------------------------------------------------------- stop at the EOS


def test_stop_at_eos_leaves_later_blocks_undecoded(models, family):
    """Later blocks stay [MASK] with step -1; the rows that go on are not changed by those that left the batch."""
    model = models(family)
    eos = common_eos(model)
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
    eos = common_eos(model)
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
    other, _ = create_tiny_model(hidden_size=16, num_layers=1)
    other.generation_config.eos_token_id = [5, 6]
    assert default_eos(other) == (5, 6), "its generation config comes first"
    table = random_table(2, 3, 0)
    assert default_eos(table) == ()
    table.config.eos_token_id = [0, 1]
    assert default_eos(table) == (0, 1)
    empty = torch.zeros(5, 0, dtype=torch.int64)
    rollout = generate(table, empty, empty.bool(), DiffusionGenerationConfig(max_new_tokens=2, block_length=1))
    assert rollout.unmask_step.tolist() == [[0, -1]] * 5, "every token of this table is an EOS"


# ------------------------------------------------------------------------------------------------------------ the mask


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


# ------------------------------------------------------------------------------------------------ prompts and families


def test_identity_7_padding_tokens_are_never_read(models, family):
    model = models(family)
    ids, mask = left_pad(PROMPTS, 9, pad=0)
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, cfg_scale=0.5)
    a = generate(model, ids, mask, config, seeds=SEEDS)
    b = generate(model, ids.masked_fill(~mask, 88), mask, config, seeds=SEEDS)
    assert_same_rollout(a, b)
    c = generate(model, ids, mask.long(), config, seeds=SEEDS)  # tokenizers give integers
    assert_same_rollout(a, c)
    assert c.prompt_mask.dtype == torch.bool


def test_empty_prompts_work_for_an_unshifted_family(models):
    """P = 0, and a row without a token in a padded batch, are the same decoding."""
    model = models("llada")
    rollout = sample(model, [[]] * 4, diffusion_steps=8)
    assert rollout.prompt_ids.shape == (4, 0)
    assert_equals_oracle(model, "llada", rollout, prompts=[[]] * 4, schedule=[2, 2, 1, 1], remasking="low_confidence")
    mixed = sample(model, [[], *PROMPTS[1:]], diffusion_steps=8)
    assert torch.equal(mixed.completion_ids[0], rollout.completion_ids[0])


def test_a_given_spec_wins_over_the_config(models):
    """`spec=`: a stock decoder's other mask token, and no shift."""
    model, (ids, mask) = models("dream"), left_pad(PROMPTS)
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=6, diffusion_steps=4, temperature=0.7)
    rollout = generate(model, ids, mask, config, seeds=SEEDS, spec=MaskedDiffusionSpec(mask_token_id=50))
    assert rollout.mask_token_id == 50
    assert_equals_oracle(
        model, "llada", rollout, mask=50, schedule=[3, 3], temperature=0.7, remasking="low_confidence"
    )


# ------------------------------------------------------------------------------------------------------------ counters


def test_forwards_and_flops_are_counted(models):
    """Two a multiply-add: linear layers, attention, head tiles of 8 rows and more; finished rows are not counted."""
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
        head = -(-head_rows // 8) * 8 * 2 * hidden * VOCAB
        return rows * width * linear + rows * width * width * layers * 4 * hidden + head

    steps = rollout.num_steps.tolist()
    assert len(set(steps)) > 1
    alive = [sum(taken > step for taken in steps) for step in range(max(steps))]
    assert rollout.num_forwards == len(alive)
    assert rollout.flops == sum(forward(rows, rows * (4 if step % 2 == 0 else 2)) for step, rows in enumerate(alive))
    parts = sample(model, batch_size=3, **settings)
    assert parts.num_forwards == max(*steps[:3], min(steps[:3]) + steps[3])  # the last row takes the first free place
    guided = sample(model, cfg_scale=0.5, **{**settings, "stop_at_eos": False})
    assert guided.num_forwards == 6
    # Tiles of 16 and of 8 positions, and their unconditional twins.
    assert guided.flops == 3 * (forward(8, 2 * 16) + forward(8, 2 * 8))


def test_head_tiles_are_whole(models):
    """70 scored rows cost two tiles of 40."""
    model = models("llada")
    ids, mask = left_pad([[5]] * 10)
    config = DiffusionGenerationConfig(max_new_tokens=7, block_length=7, diffusion_steps=1)
    one, two = (generate(model, ids[:n], mask[:n], config).flops for n in (9, 10))
    assert one / 9 < two / 10 and two - one == one_row_flops() + (2 * 40 - 64) * 2 * 32 * VOCAB


def one_row_flops(width: int = 8) -> int:
    return width * 2 * 2 * (4 * 32 * 32 + 3 * 32 * 80) + width * width * 2 * 4 * 32
