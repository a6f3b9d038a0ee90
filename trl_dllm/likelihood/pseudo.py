"""PADRE's pseudo-likelihoods (PADRE §4.3-4.4, App. 9.2): each token given all others, or given those before it.

- **PKL** masks one position of the final canvas and scores it: Σ_i log p(y_i | y_-i) (Eq. 16; Eq. 14 as the loss).
- **PKL-U** masks a set U at once: Π_{j in U} p(y_j | y_-U) (Eq. 31). One position a set is PKL, all of them d1's mean
  field.
- **PKL-T** conditions each token on those revealed before it, in one pass (Eq. 32-33).

PKL⁺ is PKL with a perturbed prompt (`p_mask_prompt`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..models.attention import NEVER, Attention
from ..models.spec import MaskedDiffusionSpec, check_full_attention, check_unshifted
from ..noise import Purpose, random_ranks
from ..rollout import Rollout
from .any_order import two_stream_view
from .view import Estimator, View, canvas_view


def _draw_order(rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
    """Rank of each counted position in the row's random order, int64 (B, L); the others come after them."""
    return random_ranks(rollout.counted, seeds, Purpose.VIEW, iteration)


def _largest_row(rollout: Rollout) -> int:
    return max(1, int(rollout.counted.sum(dim=1).max()))


class BlockPseudoLikelihood(Estimator):
    """PKL-U: block mean-field pseudo-likelihood (PADRE §4.4, App. 9.2, Eq. 31).

    Draws `num_views · block_size` counted positions without replacement and splits them into disjoint sets U; each is
    a view of the final canvas in which all of U is masked, and scored. Costs one forward of P + L tokens a view. Exact
    for the one-token conditionals with `block_size=1`; with `block_size` >= L it is d1's mean field (`MeanField`), and
    masks all that was revealed.

    Args:
        block_size (`int`): m, positions masked in a view; more than there are means all.
        num_views (`int` or `"partition"`): M, views; "partition" takes enough to score every counted position once.
        mask_attention (`str`): "full", the plain denoiser, or "isolated", §4.4's wording: no row attends to a masked
            position other than itself, never-revealed ones included. The latter is refused for shifted families.
    """

    def __init__(self, block_size: int = 32, num_views: int | str = 1, mask_attention: str = "full"):
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1 (1 masks a single position).")
        if num_views != "partition" and (not isinstance(num_views, int) or num_views < 1):
            raise ValueError(
                f"num_views={num_views!r} must be at least 1, or 'partition' to score every position once."
            )
        if mask_attention not in ("full", "isolated"):
            raise ValueError(f"mask_attention={mask_attention!r} is unknown; choose 'full' or 'isolated'.")
        self.block_size, self.mask_attention = block_size, mask_attention
        self.views = None if isinstance(num_views, str) else num_views  # None: as many as the positions need

    # Which set a position falls into is random, even where every position is scored. Only with one position a set, or
    # all of them in one, does the draw not change the numbers.
    stochastic = True

    def sub_samples(self, canvas_length: int) -> bool:
        return self.views is not None and self.views * self.block_size < canvas_length

    def check(self, spec: MaskedDiffusionSpec) -> None:
        if self.mask_attention == "isolated":
            check_unshifted("mask_attention='isolated'", spec.logits_shift)
            check_full_attention("mask_attention='isolated'", spec.block_size, "Set mask_attention='full'")

    def num_views(self, rollout: Rollout) -> int:
        return -(-_largest_row(rollout) // self.block_size) if self.views is None else self.views

    def _members(self, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        """Number of the set that each position belongs to, int64 (B, L); -1 for positions in no set."""
        if self.block_size >= rollout.counted.shape[1]:
            # All means all: tokens behind the EOS are masked with the rest, or this would not be d1's mean field.
            return rollout.revealed.long() - 1
        order = _draw_order(rollout, seeds, iteration)
        return (order // self.block_size).masked_fill(~rollout.counted, -1)

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        chosen = self._members(rollout, seeds, iteration) == n
        if n >= self.num_views(rollout):  # asked for by a process that needs more views than this one
            chosen = torch.zeros_like(chosen)
        view = canvas_view(rollout, visible=rollout.revealed & ~chosen, scored=chosen)
        if self.mask_attention == "full":
            return view
        masked = view.input_ids == rollout.mask_token_id
        level = view.attention.level.masked_fill(masked, NEVER)
        return replace(view, attention=Attention(level, reach=level.new_zeros(level.shape)))

    def scored(self, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        members = self._members(rollout, seeds, iteration)
        return (members >= 0) & (members < self.num_views(rollout))


class PseudoLikelihood(BlockPseudoLikelihood):
    """PKL: the pseudo-likelihood Σ_i log p(y_i | y_-i) of the final canvas (PADRE §4.3, Eq. 16; Eq. 14 as the loss).

    Draws K of the counted positions without replacement; view k masks one of them and scores it. Costs K forwards of P
    + L tokens a row, one at a time in the trainer. With all positions it is the full sum, and nothing is random.

    Args:
        num_positions (`int`, *optional*): K; None takes all counted positions.
    """

    def __init__(self, num_positions: int | None = None):
        if num_positions is not None and num_positions < 1:
            raise ValueError(f"num_positions={num_positions} must be at least 1, or None for all.")
        super().__init__(block_size=1, num_views="partition" if num_positions is None else num_positions)
        self.stochastic = num_positions is not None

    def num_views(self, rollout: Rollout) -> int:
        return min(super().num_views(rollout), rollout.counted.shape[1])


class TrajectoryPseudoLikelihood(Estimator):
    """PKL-T: each token given those revealed before it, in one pass (PADRE §4.4, Eq. 32-33).

    The layout of `AnyOrder`; mask i attends to the prompt, itself and the clean tokens U_i that were revealed strictly
    earlier. The paper leaves open what the clean rows attend to. Refused for shifted families. One forward of P + 2L.

    Args:
        clean_rows (`str`): "causal", clean rows see only what was revealed before them ("the attention on any non-mask
            token could only have been on U_i"): the numbers of `AnyOrder`, into which no token's own value can leak;
            or "bidirectional", prompt and clean rows see the whole prompt and all clean tokens, the first constraint
            of the paper taken literally: with two or more layers y_i reaches its own mask row through them.
    """

    def __init__(self, clean_rows: str = "causal"):
        if clean_rows not in ("causal", "bidirectional"):
            raise ValueError(f"clean_rows={clean_rows!r} is unknown; choose 'causal' or 'bidirectional'.")
        self.clean_rows = clean_rows
        self.replays = self.exact_for = ("any_order",) if clean_rows == "causal" else ()

    def check(self, spec: MaskedDiffusionSpec) -> None:
        check_unshifted("TrajectoryPseudoLikelihood", spec.logits_shift)
        check_full_attention("TrajectoryPseudoLikelihood", spec.block_size, "Use exact_trajectory or pkl_u")

    def num_views(self, rollout: Rollout) -> int:
        return 1

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        return two_stream_view(rollout, bidirectional=self.clean_rows == "bidirectional")
