"""StepMerge for any-order models: the trajectory replayed in N cuts, each under any-order attention.

`StepMerge` replays canvases under the plain denoiser's full attention, in which masks see each other; an any-order
model was never trained so. `benchmarks/study.py` gives d2's baselines the attention of the model that they train.
"""

from dataclasses import replace

import torch
from torch import Tensor

from trl_dllm.likelihood import AnyOrder, StepMerge
from trl_dllm.likelihood.view import View
from trl_dllm.models.attention import EVERYTHING, NEVER, Attention, order_levels
from trl_dllm.rollout import Rollout


class AnyOrderSegments(StepMerge):
    """StepMerge whose canvases are seen as any-order decoding saw them: no row attends to another's mask.

    With N = 1 it is the mean field (d1) under that attention; with N >= T every token is scored on the canvas that it
    was drawn from, which is `AnyOrder`'s number for the price of T forwards of P + L tokens: d2's DDPO (§5.1.1).
    """

    replays = ("any_order",)
    check = AnyOrder.check

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        view = super().view(rollout, n, seeds, iteration)
        width = rollout.prompt_ids.shape[1]
        order, _ = order_levels(rollout.unmask_step)
        masked = view.input_ids[:, width:] == rollout.mask_token_id
        prompt = view.attention.level[:, :width]
        level = torch.cat([prompt, order.masked_fill(masked, NEVER)], dim=1)
        reach = torch.cat([torch.zeros_like(prompt), order.masked_fill(masked, EVERYTHING)], dim=1)
        return replace(view, attention=Attention(level, reach))
