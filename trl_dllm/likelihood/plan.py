"""Which forwards a likelihood takes (docs/methods.md §2.7): what nobody counts is not run.

An estimator has views, and a rollout has rows. Of their pairs those are run that score a counted token, packed into
forwards of a fixed number of rows; and of a forward's columns those that a scored row sees, directly or through
others. All of it is exact: an estimator knows nothing of it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..models.attention import NEVER, Attention
from ..rollout import Rollout
from .view import IGNORE, Estimator, View, perturb_prompt


class Plan:
    """The forwards of an estimator's views of a rollout, for one draw of what is random.

    The same rollout, draw and size make the same forwards, row for row, whichever policy is run on them.

    Args:
        estimator (`Estimator`): which likelihood.
        rollout (`Rollout`): B rows.
        iteration (`int`): number of the draw.
        size (`int`): rows of a forward, at most.
        p_mask_prompt (`float`): probability with which a prompt token is masked.
        seeds (`Tensor` of shape (B,), int64, *optional*): row seeds of random views; None takes `view_seed`.
        skipped (`Tensor` of shape (B,), bool, *optional*): rows that are not run at all.
    """

    def __init__(
        self,
        estimator: Estimator,
        rollout: Rollout,
        iteration: int,
        size: int,
        p_mask_prompt: float = 0.0,
        seeds: Tensor | None = None,
        skipped: Tensor | None = None,
    ):
        self.estimator, self.iteration, self.size = estimator, iteration, size
        self.seeds = rollout.view_seed if seeds is None else seeds
        self.rollout = perturb_prompt(rollout, p_mask_prompt, self.seeds, iteration)
        weights, targets = torch.zeros_like(rollout.counted, dtype=torch.float64), []
        for n in range(estimator.num_views(rollout)):  # of which one at a time is in memory
            view = self._view(n)
            targets.append((view.targets != IGNORE).any(dim=1))
            weights.scatter_add_(1, view.index, view.weight.double().masked_fill(view.targets == IGNORE, 0))
        _check_weights(estimator, rollout, weights, estimator.scored(self.rollout, self.seeds, iteration))
        needed = torch.stack(targets)  # (views, B)
        if skipped is not None:
            needed &= ~skipped
        # Read back once: what follows is known without asking the device.
        self._pairs: list[tuple[int, int]] = [(n, row) for n, row in needed.nonzero().tolist()]

    def __len__(self) -> int:
        """Forwards that score something; 0 if nothing is counted."""
        return -(-len(self._pairs) // self.size)

    @property
    def num_rows(self) -> int:
        """Rows of the scores."""
        return len(self.rollout) * (self.estimator.num_views(self.rollout) if self.estimator.apart else 1)

    @property
    def num_pairs(self) -> int:
        """Rows of all forwards together."""
        return len(self._pairs)

    def __getitem__(self, number: int) -> tuple[View, Tensor]:
        """A forward: its view (at most `size` rows), and the row of the scores that each of its rows is of, (M,).

        That is a row of the rollout, or with `Estimator.apart` row b of view n at n · B + b: `num_rows` in all.

        Beyond the last one it is a row without targets: other processes have more forwards, and wait for this one.
        """
        if number >= len(self):
            spare = self._view(0)[:1]
            return replace(spare, targets=torch.full_like(spare.targets, IGNORE)), self.seeds.new_zeros(1)
        pairs = self._pairs[number * self.size : (number + 1) * self.size]
        parts = []
        for n in dict.fromkeys(n for n, _ in pairs):
            parts.append(self._view(n)[self.seeds.new_tensor([row for m, row in pairs if m == n])])
        apart = len(self.rollout) if self.estimator.apart else 0
        return View.cat(parts), self.seeds.new_tensor([n * apart + row for n, row in pairs])

    def _view(self, n: int) -> View:
        return counted_view(self.estimator, self.rollout, n, self.seeds, self.iteration)


def _check_weights(estimator: Estimator, rollout: Rollout, weights: Tensor, scored: Tensor) -> None:
    """Raise ValueError where a position's weights (B, L), over all views, are not as `Estimator` promises."""
    left_out = estimator.sub_samples(rollout.counted.shape[1])
    wrong = rollout.counted & ((weights - 1).abs() > 1e-3) & ~((weights == 0) & left_out)
    disagree = rollout.counted & ((weights != 0) != scored)
    if not estimator.per_token or not (wrong | disagree).any():
        return
    if not wrong.any():
        row, position = disagree.nonzero()[0].tolist()
        yes, no = ("view", "scored") if weights[row, position] else ("scored", "view")
        raise ValueError(
            f"{type(estimator).__name__}: {yes} has position {position} of row {row} among those that are scored, and "
            f"{no} has not. Let both draw from the seeds and the iteration that they are given."
        )
    row, position = wrong.nonzero()[0].tolist()
    found = f"sum to {float(weights[row, position]):.4g} over all views"
    says = f"{type(estimator).__name__}: the weights of position {position} of row {row} {found}"
    if left_out:
        raise ValueError(
            f"{says}, and it says sub_samples: the trainer weighs what is drawn, so that it would be weighted twice. "
            "Give the views weight 1, and return what a position counts for from sampling_weights (None: n / k)."
        )
    raise ValueError(
        f"{says}, and its numbers are to be log-probs of tokens. Score each counted position with weights that sum to "
        "1; have sub_samples return True where positions are left out; or set per_token = False where the numbers are "
        "of the row."
    )


def counted_view(estimator: Estimator, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
    """View n of a rollout, without targets at positions that the loss does not count.

    They would cost head rows, and an improbable token behind the EOS would overflow exp(reference - policy), whose
    product with TRL's mask is NaN and not 0.
    """
    view = estimator.view(rollout, n, seeds, iteration)
    return replace(view, targets=view.targets.masked_fill(~rollout.counted.gather(1, view.index), IGNORE))


def compact(view: View) -> View:
    """The view without columns that no scored row sees.

    Where all that is hidden is padding, every row sees every column, and what goes is the padding at either end that
    all rows have. Other layouts (any-order, block-causal) keep, in each row, the scored columns, what they see and
    what that sees, in their order; rows that keep fewer are padded on the right.
    """
    level, reach, segment = view.attention.level, view.attention.reach, view.attention.segment
    scored = view.targets != IGNORE
    if reach is None:
        needed = ((level != NEVER) | scored).any(dim=0).nonzero()
        if len(needed) == 0:
            return view
        start, end = int(needed[0]), int(needed[-1]) + 1
        return view if end - start == level.shape[1] else view.columns(lambda table: table[:, start:end])
    segment = torch.zeros_like(level) if segment is None else segment
    # A column is seen from a level on, so that the highest reach, of its segment or of any, says what is seen.
    kept = scored
    while True:
        reached = reach.masked_fill(~kept, -1)
        highest = torch.full_like(reached, -1).scatter_reduce(1, segment, reached, "amax").gather(1, segment)
        highest = torch.where(segment == 0, reached.amax(dim=1, keepdim=True), highest)
        further = kept | (level <= highest)
        if torch.equal(further, kept):
            break
        kept = further
    number = kept.sum(dim=1, keepdim=True)
    width = max(1, int(number.max()))
    if width == level.shape[1]:
        return view
    place = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    fill = torch.arange(width, device=level.device) >= number
    left = view.columns(lambda table: table.gather(1, place))
    level, reach = left.attention.level.masked_fill(fill, NEVER), reach.gather(1, place).masked_fill(fill, 0)
    return replace(
        left,
        attention=Attention(level, reach, segment=left.attention.segment),
        targets=left.targets.masked_fill(fill, IGNORE),
    )
