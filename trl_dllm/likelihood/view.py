"""The value between the mathematics and the machinery: what to run the model on, and what to read off it.

An **estimator** turns a rollout into views and knows the paper, nothing else. The scorer (`score.py`) runs views
through a model and knows no paper.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.attention import NEVER, Attention, Layout
from ..models.spec import MaskedDiffusionSpec
from ..noise import Purpose, uniform
from ..rollout import Rollout


IGNORE = -100


@dataclass(frozen=True)
class View(Layout):
    """One model input (`input_ids`, `position_ids` and `attention`, as in `Layout`) and the tokens scored on it.

    Args:
        targets (`Tensor` of shape (B, S), int64): the token to score at that row, -100 for none.
        index (`Tensor` of shape (B, S), int64): the completion position that the target belongs to.
        weight (`Tensor` of shape (B, S), float): what its log-prob counts for; several views of a position are summed.
    """

    targets: Tensor
    index: Tensor
    weight: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "View":
        return View(
            self.input_ids[rows],
            self.position_ids[rows],
            self.attention[rows],
            self.targets[rows],
            self.index[rows],
            self.weight[rows],
        )

    @property
    def num_targets(self) -> int:
        """Tokens that are scored."""
        return int((self.targets != IGNORE).sum())

    def columns(self, choose: Callable[[Tensor], Tensor]) -> "View":
        """The view of the columns that `choose` takes from each (B, S) table."""
        return View(
            choose(self.input_ids),
            choose(self.position_ids),
            self.attention.map(choose),
            choose(self.targets),
            choose(self.index),
            choose(self.weight),
        )

    @staticmethod
    def cat(views: list["View"]) -> "View":
        """The rows of all views, which are of one layout, in one."""
        if len(views) == 1:
            return views[0]
        return View(
            torch.cat([view.input_ids for view in views]),
            torch.cat([view.position_ids for view in views]),
            Attention.cat([view.attention for view in views]),
            torch.cat([view.targets for view in views]),
            torch.cat([view.index for view in views]),
            torch.cat([view.weight for view in views]),
        )


class Estimator:
    """What a paper says: which views of a rollout a likelihood is read from.

    A subclass implements `num_views` and `view`, and says with attributes and the other methods what holds of them.
    One of your own needs no change of this package: `estimator: my_module.MyEstimator` (docs/extending.md). The
    contract:

    - **Views are functions** of (rollout, n, seeds, iteration): the old, the reference and the current policy are
      scored on equal ones. Random ones draw with `uniform` or `random_ranks`, keyed by (seeds, `Purpose.VIEW`,
      iteration), and set `stochastic`, so that each inner iteration has a draw of its own.
    - **Rows are by themselves**: a row's views depend neither on the other rows nor on padding.
    - `view(rollout, n, …)` also answers for n beyond a rollout's own number of views, by a view that scores nothing:
      with several processes each of them runs the largest number. Views have one width.
    - **Numbers of tokens** (`per_token`): a counted position's weights sum to 1 over all views, so that what the loss
      exponentiates is its token's log-prob. An estimator whose numbers are of the row (a bound) says
      `per_token = False`, weighs as it likes, and spreads them in `assemble`.
    - **More than a sum over views**: with `apart`, `assemble` is given each view's numbers, and may make anything
      differentiable of them; an update then runs the views once without gradients first, whatever `disjoint` says.
    - **Leaving positions out** (`sub_samples`): views have weight 1 all the same, and the trainer weighs, once, in the
      loss: by `sampling_weights`, or by n / k where that is None. `scored` says which positions those are.

    The weights are checked on every rollout. An estimator that weighs the views *and* says `sub_samples` would be
    weighted twice: that is an error.

    Attributes:
        stochastic (`bool`): views need a draw for each inner iteration.
        disjoint (`bool`): no position's number depends on two views, which saves a pass over them.
        per_token (`bool`): a position's number is its own token's, not a share of the row's.
        apart (`bool`): `assemble` is given the views one by one and not their sum.
        signed (`bool`): `assemble` asks for the sign of a row's advantage (`Rollout.advantages`). Such numbers are no
            log-probs of one distribution: a loss with a ratio or a KL is refused.
        replays (`tuple[str, ...]`): decoders whose canvases its views are, as they stood before a step.
        exact_for (`tuple[str, ...]`): decoders whose own log-probs it equals at every counted position.
    """

    stochastic = False
    disjoint = True
    per_token = True
    apart = False
    signed = False
    replays: tuple[str, ...] = ()
    exact_for: tuple[str, ...] = ()

    def num_views(self, rollout: Rollout) -> int:
        """Forwards that the rollout's rows need, at least 1."""
        raise NotImplementedError

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        """View number n; random views draw from (seeds (B,), iteration) alone."""
        raise NotImplementedError

    def sub_samples(self, canvas_length: int) -> bool:
        """Whether counted positions of a canvas of that length may be left out."""
        return False

    def scored(self, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        """Positions that the views of this iteration give a log-prob to, bool (B, L), without running any."""
        return rollout.revealed

    def sampling_weights(self, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor | None:
        """What each position counts for in the loss of this iteration, float (B, L), where some are left out.

        The inverse of the probability with which the draw scores the position: the expected gradient is then that of
        all positions. Read at scored positions alone, and at least 1 there; a row that is scored whole has ones. None
        where k of n counted positions are drawn, all sets alike: n / k.
        """
        return None

    def assemble(self, logps: Tensor, rollout: Rollout, seeds: Tensor, iteration: int) -> Tensor:
        """The log-probs (B, L) that the weighted ones of all views stand for: their sum (B, L), or with `apart` each
        view's (N, B, L), 0 where it scores nothing. The draw is that of the views."""
        return logps

    def check(self, spec: MaskedDiffusionSpec) -> None:
        """Raise ValueError where a model family has no row that predicts what the estimator scores."""


def prompt_positions(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Position ids of the prompt (B, P) and of the canvas (B, L), both counted without left padding."""
    length = rollout.prompt_mask.sum(dim=1, keepdim=True)
    prompt = (rollout.prompt_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    canvas = length + torch.arange(rollout.completion_ids.shape[1], device=length.device)
    return prompt, canvas


def canvas_view(rollout: Rollout, visible: Tensor, scored: Tensor, weight: Tensor | None = None) -> View:
    """The denoiser's view: prompt ⊕ canvas, in which `visible` (B, L) positions show their token, the others [MASK].

    `scored` (B, L) positions are targets, with `weight` (B, L) (1 by default). Every row attends to everything but
    padding. On a canvas that grew, blocks behind the last one that the view shows or scores are absent; for a
    block-causal model every block stands behind finished ones (`behind_clean`).
    """
    prompt, prompt_mask, tokens = rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids
    rows, canvas_length = tokens.shape
    width = prompt.shape[1]
    prompt_position, canvas_position = prompt_positions(rollout)
    weight = torch.ones_like(rollout.logps) if weight is None else weight
    blocks, block = rollout.blocks, None
    present = torch.ones_like(visible)
    if blocks is not None:
        block = blocks.number(prompt_mask, canvas_length)
        if not blocks.causal:
            last = block[:, width:].masked_fill(~(visible | scored), -1).amax(dim=1, keepdim=True)
            present = block[:, width:] <= last
    view = View(
        input_ids=torch.cat([prompt, tokens.masked_fill(~visible, rollout.mask_token_id)], dim=1),
        position_ids=torch.cat([prompt_position, canvas_position], dim=1),
        attention=Attention.padding(torch.cat([prompt_mask, present], dim=1)),
        targets=torch.cat([torch.full_like(prompt, IGNORE), tokens.masked_fill(~scored, IGNORE)], dim=1),
        index=torch.cat(
            [torch.zeros_like(prompt), torch.arange(canvas_length, device=tokens.device).expand(rows, -1)], dim=1
        ),
        weight=torch.cat([torch.zeros_like(prompt, dtype=weight.dtype), weight], dim=1),
    )
    if blocks is None or block is None or not blocks.causal:
        return view
    # The canvas's first block may hold the last tokens of the prompt.
    return behind_clean(view, torch.cat([prompt, tokens], dim=1), block, start=max(0, width - blocks.size + 1))


def behind_clean(view: View, clean: Tensor, block: Tensor, start: int = 0) -> View:
    """Two streams, for a model whose rows see their own block and those before it: clean ⊕ the view.

    A clean row of block k sees the clean blocks up to k; one of the view sees the clean blocks before k, and block k
    of the view. So every block is seen in its own state behind finished ones, as in decoding.

    Args:
        view (`View`): S columns, whose attention is that of padding.
        clean (`Tensor` of shape (B, S), int64): what it would show without masks.
        block (`Tensor` of shape (B, S), int64): the block of each column, from 0; -1 for padding.
        start (`int`): column from which the view is needed; before it nothing is masked or scored.

    Returns:
        `View` of 2S - start columns.
    """
    noisy = view.columns(lambda table: table[:, start:])
    # A clean block's level is odd, and that of the same block in the view the even one below it.
    level = torch.cat([2 * block + 1, 2 * block[:, start:]], dim=1)
    padding = torch.cat([block, block[:, start:]], dim=1) < 0

    def beside(table: Tensor, fill: float) -> Tensor:
        return torch.cat([table.new_full(clean.shape, fill), table], dim=1)

    return View(
        input_ids=torch.cat([clean, noisy.input_ids], dim=1),
        position_ids=torch.cat([view.position_ids, noisy.position_ids], dim=1),
        attention=Attention(
            level.masked_fill(padding, NEVER),
            level.masked_fill(padding, 0),
            # Each block of the view is a segment, so that no other block reads its masks.
            segment=beside(1 + block[:, start:].clamp(min=0), 0),
        ),
        targets=beside(noisy.targets, IGNORE),
        index=beside(noisy.index, 0),
        weight=beside(noisy.weight, 0),
    )


def perturb_prompt(rollout: Rollout, probability: float, seeds: Tensor, iteration: int) -> Rollout:
    """The rollout with each prompt token replaced by [MASK] with `probability` (d1; PADRE Algorithm 1 line 7).

    One draw for a row and inner iteration, shared by all of its views and by the old, reference and current policy;
    keyed by the token's index without padding, so left padding changes nothing.
    """
    if probability == 0:
        return rollout
    token, _ = prompt_positions(rollout)
    hit = (uniform(seeds[:, None], Purpose.PROMPT, iteration, token) < probability) & rollout.prompt_mask
    return replace(rollout, prompt_ids=rollout.prompt_ids.masked_fill(hit, rollout.mask_token_id))
