"""Which token is drawn, and which of the drawn are kept."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from cases import PROMPTS, REMASKING
from hypothesis import assume, given, settings, strategies
from oracles import chi_square_p, left_pad, sharp_model

from trl_dllm.generation import DiffusionGenerationConfig, generate, order
from trl_dllm.generation.order import choose, draw_tokens, measure, which
from trl_dllm.models import log_probs
from trl_dllm.noise import uniform


# ----------------------------------------------------------------------------------------------- exactness of the draw


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


def test_draws_are_exact_to_float64():
    """A point just inside a token's interval draws that token; a float32 sum is off by more than a small interval."""
    generator = torch.Generator().manual_seed(0)
    log_p = log_probs(3 * torch.randn(20_000, generator=generator), mask_token_id=7)
    assert log_p.dtype == torch.float32
    sizes = [Fraction(math.exp(value)) for value in log_p.tolist()]
    edges = list(itertools.accumulate(sizes))
    tokens = [token for token in range(0, 20_000, 100) if sizes[token] > 1e-9]
    assert len(tokens) > 150 and min(sizes[token] for token in tokens) < 1e-7
    for inside in (Fraction(1, 1000), Fraction(999, 1000)):
        points = [float((edges[token] - inside * sizes[token]) / edges[-1]) for token in tokens]
        drawn = draw_tokens(log_p.expand(len(tokens), -1), torch.tensor(points, dtype=torch.float64))
        assert drawn.tolist() == tokens


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


LAST = 1 - 2.0**-53  # the largest uniform


@settings(deadline=None, max_examples=300)
@given(
    weights=strategies.lists(strategies.sampled_from([0.0, 1e-300, 1e-9, 0.1, 1.0, 7.0]), min_size=1, max_size=40),
    draw=strategies.one_of(strategies.sampled_from([0.0, LAST]), strategies.floats(0, LAST)),
    size=strategies.integers(1, 9),
)
def test_a_draw_in_blocks_is_the_one_of_the_whole_sum(weights, draw, size):
    """In exact arithmetic the first token whose cumulative probability is above the point; rounding decides at edges."""
    assume(any(weights))
    log_p = torch.tensor([weights], dtype=torch.float64).log().clamp(min=torch.finfo(torch.float32).min / 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_BLOCK", size)
        token = int(draw_tokens(log_p, torch.tensor([draw], dtype=torch.float64)))
    assert weights[token] > 0
    edges = list(itertools.accumulate(Fraction(p) for p in log_p.exp()[0].tolist()))
    point = Fraction(draw) * edges[-1]
    if all(abs(point - edge) > edges[-1] * Fraction(1, 10**14) for edge in edges):
        assert token == next(number for number, edge in enumerate(edges) if edge > point)


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 1024, 32_768, 126_464])
def test_many_draws_are_those_of_a_cumulative_sum_in_float64(vocab):
    """More rows than are in float64 at a time, every one from a distribution of its own."""
    generator = torch.Generator().manual_seed(vocab)
    rows = 40 if vocab > 2000 else 400
    log_p = log_probs(4 * torch.randn(rows, vocab + 1, generator=generator), mask_token_id=vocab // 2)
    draws = uniform(5, torch.arange(rows))
    draws[:2] = torch.tensor([0.0, LAST], dtype=torch.float64)
    cumulative = log_p.double().exp().cumsum(dim=1)
    expected = [int((line <= draw * line[-1]).sum()) for line, draw in zip(cumulative, draws, strict=True)]
    expected[1] = int((cumulative[1] < cumulative[1, -1]).sum())  # the last token that has any probability
    assert draw_tokens(log_p, draws).tolist() == expected
    assert vocab // 2 not in expected


@pytest.mark.parametrize("token", [0, 511, 512, 1023, 1024, 1299])
def test_all_probability_on_one_token(token):
    logits = torch.full((3, 1300), -torch.inf)
    logits[:, token] = 0
    assert draw_tokens(logits, torch.tensor([0.0, 0.5, LAST], dtype=torch.float64)).tolist() == [token] * 3


def test_which_entries_are_true():
    mask = torch.tensor([False, True, False, False, True, True])
    assert which(mask, 3).tolist() == [1, 4, 5] and which(~mask, 3).tolist() == [0, 2, 3]
    assert which(mask[:1], 0).tolist() == []


# -------------------------------------------------------------------------------------------------- which are revealed


@pytest.mark.parametrize("remasking", REMASKING)
def test_measures_equal_loops(remasking):
    """From the plain distribution, the token drawn and the draw for the order; a larger measure is revealed first."""
    generator = torch.Generator().manual_seed(1)
    log_p = (2 * torch.randn(40, 6, generator=generator, dtype=torch.float64)).log_softmax(dim=1)
    tokens, draws = torch.randint(6, (40,), generator=generator), uniform(3, torch.arange(40))
    got = measure(remasking, log_p, tokens, draws)
    for row, (line, token) in enumerate(zip(log_p.tolist(), tokens.tolist(), strict=True)):
        p = sorted(map(math.exp, line), reverse=True)
        expected = {
            "low_confidence": math.exp(line[token]),
            "margin": p[0] - p[1],
            "entropy": sum(q * math.log(q) for q in p),
            "random": draws[row].item(),
            "left_to_right": 0.0,
        }[remasking]
        assert got[row].item() == pytest.approx(expected, abs=1e-12)


def test_reveal_breaks_ties_to_the_smaller_position():
    measures = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [-3.0, -2.0, -2.0, -9.0]])
    candidates = torch.tensor([[True] * 4, [False, True, True, True], [True, False, True, True]])
    assert choose(measures, candidates, torch.tensor([2, 2, 1]), None).nonzero().tolist() == [
        [0, 0], [0, 1], [1, 1], [1, 2], [2, 2]
    ]  # fmt: skip


def test_reveal_takes_candidates_alone():
    """Where there are fewer than asked for, too; what is no candidate has no measure that counts."""
    measures = torch.tensor([[0.9, 0.1, 0.8], [0.5, 0.7, 0.6]])
    candidates = torch.tensor([[False, True, False], [False, False, False]])
    for threshold in (None, 0.3):
        assert torch.equal(choose(measures, candidates, torch.tensor([2, 1]), threshold), candidates)


def test_reveal_with_a_threshold_keeps_strictly_more_and_at_least_one():
    measures = torch.tensor([[0.5, 0.9, 0.6, 0.2], [0.1, 0.3, 0.3, 0.9]])
    candidates = torch.tensor([[True] * 4, [True, True, True, False]])
    kept = choose(measures, candidates, torch.tensor([1, 1]), 0.5)
    assert kept.nonzero().tolist() == [[0, 1], [0, 2], [1, 1]]


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
