"""d2-StepMerge (d2 §3.2.2, Eq. 9, Algorithm 3): the trajectory replayed in N cuts.

A row was decoded in T steps, and position i was revealed at step s_i. (Where the schedule fixes T, a row that stopped
at its EOS has the same T.) Cut the T steps evenly at

    b_n = floor(n T / N),  n = 0..N.

View n is the canvas as it stood before step b_n: positions with 0 <= s < b_n show their token, all others show [MASK].
It scores the positions revealed in its segment, b_n <= s < b_{n+1}, so that

    log π_N(y) = Σ_n Σ_{i: b_n <= s_i < b_{n+1}} log p(y_i | canvas before step b_n).

With N = 1 everything is predicted from an empty canvas (d1's mean field, Remark 3.4); with N >= T every token is
scored on the canvas that it was drawn from, which is exact.

In a block-causal model the T steps are those of each block, and s_i counts from the block's first: all blocks are cut
at once, and the error stays inside a block (docs/methods.md §2.8).
"""

import torch
from torch import Tensor

from ..rollout import Rollout
from .view import Estimator, View, canvas_view


def segment_view(rollout: Rollout, start: Tensor, end: Tensor) -> View:
    """The canvas before step `start` of those it replays, scoring what steps [start, end) revealed; both (B, L)."""
    step, _ = rollout.replayed_steps()
    before = (step >= 0) & (step < start)
    segment = (step >= start) & (step < end)
    return canvas_view(rollout, visible=before, scored=segment)


class StepMerge(Estimator):
    """d2-StepMerge: the trajectory likelihood from `num_segments` canvases (d2 Eq. 9).

    Exact for N >= T, d1's one-step mean field for N = 1, TraceRL with shrink k for N = T / k, JustGRPO for a
    left-to-right sampler at one token a step and N = L. Under a threshold each row is cut by its own T. Segments that
    score nothing are not run.

    Args:
        num_segments (`int`): N, the number of cuts. Costs N forwards of P + L tokens a row, at most.
    """

    replays = ("denoising",)

    def __init__(self, num_segments: int = 8):
        if num_segments < 1:
            raise ValueError(f"num_segments={num_segments} must be at least 1 (1 is the one-step mean field).")
        self.num_segments = num_segments

    def num_views(self, rollout: Rollout) -> int:
        return self.num_segments

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        (_, steps), segments = rollout.replayed_steps(), self.num_segments
        # Beyond the last view the segment begins behind the last step, and scores nothing.
        return segment_view(rollout, start=n * steps // segments, end=(n + 1) * steps // segments)


class MeanField(StepMerge):
    """d1's one-step mean field (diffu-GRPO; d2 Remark 3.4): every token predicted from a fully masked canvas.

    StepMerge with N = 1. One forward of P + L tokens a row. Exact only if the row was decoded in one step.
    """

    def __init__(self):
        super().__init__(num_segments=1)


class ExactTrajectory(Estimator):
    """The exact trajectory likelihood of any model (d2 Eq. 7; CJ-GRPO; DDPO): StepMerge with one cut a step.

    Equals the sampler's own log-probs when scored at the sampling temperature with an unperturbed prompt. Costs as
    many forwards of P + L tokens as the slowest row took steps; for a block-causal model, of P + 2L tokens and as
    many as the slowest block took.
    """

    replays = exact_for = ("denoising",)

    def num_views(self, rollout: Rollout) -> int:
        return max(1, int(rollout.replayed_steps()[0].max()) + 1)

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        start = torch.full_like(rollout.unmask_step, n)
        return segment_view(rollout, start, end=start + 1)  # scores nothing in a row that took fewer steps
