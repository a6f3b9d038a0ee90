"""The counter-based randomness of docs/methods.md §2.6, and identity 7 of its §7."""

import itertools
import random

import numpy as np
import pytest
import torch
from oracles import chi_square_p, ks_p, slow_hash, splitmix_finaliser

from trl_dllm.noise import Purpose, hash64, random_ranks, row_seeds, uniform


def _unsigned(x: int) -> int:
    return x % 2**64


def test_oracle_is_splitmix64():
    """The first output of the published generator for seed 0."""
    assert splitmix_finaliser(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("keys", [(0,), (1, 2), (2, 1), (-1, 5, 0), (2**63 - 1, -(2**63), 7, 3), (0, 0, 0, 0, 0)])
def test_hash_equals_big_integer_arithmetic(keys):
    """Products and shifts wrap like unsigned 64-bit ones, for negative keys too; a tensor hashes like its number."""
    assert _unsigned(hash64(*keys).item()) == slow_hash(*keys)
    assert _unsigned(hash64(*[torch.tensor(key) for key in keys]).item()) == slow_hash(*keys)
    assert uniform(*keys).item() == (slow_hash(*keys) >> 11) / 2**53


def test_hash_broadcasts_like_a_loop():
    seeds, steps = torch.tensor([3, -8, 2**40]), torch.arange(4)
    table = hash64(seeds[:, None], Purpose.TOKEN, steps)
    assert table.shape == (3, 4) and table.dtype == torch.int64
    for i, j in itertools.product(range(3), range(4)):
        assert _unsigned(table[i, j].item()) == slow_hash(seeds[i].item(), 2, j)


def test_uniform_is_float64_in_the_unit_interval():
    draws = uniform(torch.arange(100_000))
    assert draws.dtype == torch.float64
    assert draws.min() >= 0 and draws.max() < 1
    assert len(draws.unique()) == len(draws)


@pytest.mark.parametrize("axis", range(4))
def test_uniform_along_each_key(axis):
    """Seed, purpose-like, step and position axes: each alone gives a uniform stream without serial correlation."""
    keys = [11, 2, 3, 4]
    keys[axis] = torch.arange(20_000)
    draws = uniform(*keys)
    assert ks_p(draws) > 1e-3
    bins = torch.bincount((draws * 50).long(), minlength=50)
    assert chi_square_p(bins, torch.full((50,), 400.0)) > 1e-3
    pairs = (draws[:-1:2] * 10).long() * 10 + (draws[1::2] * 10).long()
    assert chi_square_p(torch.bincount(pairs, minlength=100), torch.full((100,), 100.0)) > 1e-3


def test_purposes_and_keys_do_not_collide():
    """All purposes × small seeds × steps × positions: every draw is another one."""
    purposes = torch.tensor([int(purpose) for purpose in Purpose])
    assert len(purposes.unique()) == len(Purpose.__members__), "a number given twice makes an alias"
    draws = hash64(
        torch.arange(6)[:, None, None, None], purposes[:, None, None], torch.arange(40)[:, None], torch.arange(60)
    )
    assert len(draws.unique()) == 6 * len(Purpose) * 40 * 60


def test_order_and_number_of_keys_count():
    assert len({hash64(*keys).item() for keys in itertools.permutations((1, 2, 3))}) == 6
    assert len({hash64(*[0] * n).item() for n in range(1, 8)}) == 7


def test_draws_are_repeatable_and_leave_global_generators_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    keep = torch.ones(3, 5, dtype=torch.bool)
    first = uniform(7, torch.arange(10)), random_ranks(keep, torch.arange(3)), row_seeds(1, 0, 2, 3, torch.arange(4))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(states[2], np.random.get_state(), strict=True))
    torch.manual_seed(123)
    again = uniform(7, torch.arange(10)), random_ranks(keep, torch.arange(3)), row_seeds(1, 0, 2, 3, torch.arange(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_row_seeds_differ_in_every_argument_and_not_with_the_split_of_rows():
    """A row seed is a hash of (seed, train or eval, global step, generation round, global row)."""
    rows = torch.arange(8)
    seeds = [
        row_seeds(seed, split, step, generation_round, rows)
        for seed, split, step, generation_round in itertools.product(range(3), range(2), range(5), range(3))
    ]
    assert len(torch.cat(seeds).unique()) == 3 * 2 * 5 * 3 * 8
    whole = row_seeds(42, 0, 17, 1, rows)
    parts = torch.cat([row_seeds(42, 0, 17, 1, rows[:3]), row_seeds(42, 0, 17, 1, rows[3:])])
    assert torch.equal(whole, parts)


def test_random_ranks_are_permutations_with_the_others_behind():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(50, 7, generator=generator) < 0.6
    ranks = random_ranks(keep, torch.arange(50), 3, Purpose.VIEW)
    for row in range(50):
        n = int(keep[row].sum())
        assert sorted(ranks[row].tolist()) == list(range(7))
        assert sorted(ranks[row][keep[row]].tolist()) == list(range(n))


def test_random_ranks_are_a_uniform_permutation():
    """4 of 6 positions kept: the 24 orders are equally likely."""
    keep = torch.tensor([True, False, True, True, False, True]).expand(9600, -1)
    ranks = random_ranks(keep, torch.arange(9600), 5, Purpose.VIEW)[:, [0, 2, 3, 5]]
    orders = list(itertools.permutations(range(4)))
    index = {order: i for i, order in enumerate(orders)}
    counts = torch.bincount(torch.tensor([index[tuple(r)] for r in ranks.tolist()]), minlength=24)
    assert chi_square_p(counts, torch.full((24,), 400.0)) > 1e-3


def test_row_seeds_are_no_other_draws():
    """`Purpose.ROW`: a seed of a row is never what another purpose hashes from the same numbers."""
    rows = torch.arange(8)
    seeds = row_seeds(3, 0, 1, 2, rows)
    others = torch.cat([hash64(3, purpose, 0, 1, 2, rows) for purpose in Purpose if purpose != Purpose.ROW])
    assert torch.equal(seeds, hash64(3, Purpose.ROW, 0, 1, 2, rows)) and not torch.isin(seeds, others).any()


def test_random_ranks_do_not_depend_on_columns_or_batch():
    """Identity 7: neither more columns, nor another batch order, nor a part of the batch changes a row's ranks."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(12, 9, generator=generator) < 0.5
    seeds = torch.arange(100, 112)
    ranks = random_ranks(keep, seeds, 2, Purpose.VIEW, 1)
    wide = random_ranks(torch.cat([keep, torch.zeros(12, 4, dtype=torch.bool)], dim=1), seeds, 2, Purpose.VIEW, 1)
    assert torch.equal(wide[:, :9][keep], ranks[keep])
    order = torch.randperm(12, generator=generator)
    assert torch.equal(random_ranks(keep[order], seeds[order], 2, Purpose.VIEW, 1), ranks[order])
    assert torch.equal(random_ranks(keep[3:5], seeds[3:5], 2, Purpose.VIEW, 1), ranks[3:5])
    assert not torch.equal(random_ranks(keep, seeds, 3, Purpose.VIEW, 1)[keep], ranks[keep])
    for same in (torch.tensor(7), torch.full((12,), 7)):
        assert torch.equal(random_ranks(keep, seeds, same), random_ranks(keep, seeds, 7)), "a number, or one a row"
