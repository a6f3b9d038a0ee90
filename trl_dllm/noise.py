"""Counter-based randomness: every draw is a hash of a row's seed and of what the draw is for.

A draw depends on (row seed, inner iteration, purpose, view or step, token index) and on nothing else: not on the batch
it is made in, the device, the number of processes or the padding. No generator has a state, so there is nothing to
save, and no global generator is read or re-seeded.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a stream."""

    ROW = 1  # a row's view_seed
    TOKEN = 2  # the sampler's value at (step, position)
    ORDER = 3  # the sampler's random unmasking order
    PROMPT = 4  # prompt perturbation
    VIEW = 5  # which positions a stochastic estimator scores
    SFT = 6  # the forward process of supervised training
    EVALUATION = 7  # a row of an evaluation


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # int64 forms of splitmix64's constants: torch has no wrapping uint64 product
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of the 64-bit integers."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def hash64(*keys: int | Tensor) -> Tensor:
    """Hash of a sequence of integer keys, int64; tensors broadcast against each other."""
    device = next((key.device for key in keys if isinstance(key, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        if not isinstance(key, Tensor):  # filled in on the device, which nothing has to be copied to
            key = torch.full((), int(key), dtype=torch.int64, device=device)
        # The state is mixed between keys, so the order of the keys counts: hash64(1, 2) != hash64(2, 1).
        state = _mix((state ^ _mix(key.to(torch.int64) + _GOLDEN)) + _GOLDEN)
    return state


def uniform(*keys: int | Tensor) -> Tensor:
    """A uniform draw from [0, 1) for each key, float64 with 53 random bits."""
    return _shift(hash64(*keys), 11).to(torch.float64) * 2.0**-53


def row_seeds(seed: int, split: int, step: int, generation_round: int, rows: Tensor) -> Tensor:
    """The view seeds of a generation batch, int64 of `rows`' shape.

    `split` is 0 in training and 1 in evaluation, `step` is `state.global_step` (it survives a resume),
    `generation_round` counts the generation batches within that step, and `rows` are row numbers in the global batch.
    """
    return hash64(seed, Purpose.ROW, split, step, generation_round, rows)


def random_ranks(keep: Tensor, *keys: int | Tensor) -> Tensor:
    """Rank of each position in a random order of each row's kept positions, int64 (B, L).

    Ranks of kept positions are a uniformly random permutation of 0..n-1; the other positions come after them. A prefix
    of the order is a draw without replacement. The draw of a position depends on its index, not on the number of
    columns.
    """
    positions = torch.arange(keep.shape[-1], device=keep.device)
    draws = uniform(*[key[:, None] if isinstance(key, Tensor) and key.dim() == 1 else key for key in keys], positions)
    draws = draws.expand(keep.shape).masked_fill(~keep, 2.0)
    return draws.argsort(dim=-1, stable=True).argsort(dim=-1)
