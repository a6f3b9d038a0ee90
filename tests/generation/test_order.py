"""Which token is drawn, and which of the drawn are kept."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from cases import PROMPTS, REMASKING
from oracles import chi_square_p, left_pad, sharp_model

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.generation.order import choose, draw_tokens, measure
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
