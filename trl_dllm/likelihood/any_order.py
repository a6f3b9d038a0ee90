"""d2-AnyOrder (d2 §3.2.1, App. B.2-B.3, Fig. 9, Algorithm 4): the exact trajectory likelihood in one pass.

One row of P + 2L tokens: prompt ⊕ y ⊕ L masks, where mask i has the position id of token i. The attention replays the
order in which the tokens were revealed (s_i is the step of token i):

    prompt  -> the prompt
    token j -> the prompt, itself, tokens of earlier steps, and of its own step those to its left
    mask i  -> the prompt, itself, and tokens of strictly earlier steps

so the output at mask i is what the any-order decoder saw when it sampled token i, for every i at once. No row ever
attends to a mask other than itself, which is why the decoder has an exact key/value cache (`generation/any_order.py`).
"""

import torch
from torch import Tensor

from ..models.attention import EVERYTHING, NEVER, Attention, order_levels
from ..models.spec import MaskedDiffusionSpec, check_full_attention, check_unshifted
from ..rollout import Rollout
from .view import IGNORE, Estimator, View, prompt_positions


def two_stream_view(rollout: Rollout, bidirectional: bool = False) -> View:
    """prompt ⊕ tokens ⊕ masks, scoring every revealed position at its mask row.

    With `bidirectional`, prompt and token rows attend to the whole prompt and to all revealed tokens.
    """
    prompt, tokens = rollout.prompt_ids, rollout.completion_ids
    rows, canvas_length = tokens.shape
    level, below = order_levels(rollout.unmask_step)
    prompt_level = torch.zeros_like(prompt)
    never = torch.full_like(tokens, NEVER)
    token_sees = torch.full_like(level, EVERYTHING) if bidirectional else level.masked_fill(~rollout.revealed, 0)
    prompt_sees = torch.full_like(prompt, EVERYTHING) if bidirectional else prompt_level
    prompt_position, canvas_position = prompt_positions(rollout)
    unscored = torch.full((rows, prompt.shape[1] + canvas_length), IGNORE, dtype=tokens.dtype, device=tokens.device)
    index = torch.arange(canvas_length, device=tokens.device).expand(rows, -1)
    return View(
        input_ids=torch.cat([prompt, tokens, torch.full_like(tokens, rollout.mask_token_id)], dim=1),
        position_ids=torch.cat([prompt_position, canvas_position, canvas_position], dim=1),
        attention=Attention(
            level=torch.cat([prompt_level.masked_fill(~rollout.prompt_mask, NEVER), level, never], dim=1),
            reach=torch.cat([prompt_sees, token_sees, below], dim=1),
        ),
        targets=torch.cat([unscored, tokens.masked_fill(~rollout.revealed, IGNORE)], dim=1),
        index=torch.cat([torch.zeros_like(unscored), index], dim=1),
        weight=torch.cat(
            [torch.zeros_like(unscored, dtype=rollout.logps.dtype), torch.ones_like(rollout.logps)], dim=1
        ),
    )


class AnyOrder(Estimator):
    """d2-AnyOrder: the exact likelihood of an any-order trajectory (d2 Eq. 8).

    Exact for rollouts of any-order decoding (`decoding="any_order"`), for any number of tokens a step. Costs one
    forward of P + 2L tokens a row. For a model that was not trained with this attention, LLaDA as published, it is a
    poor estimate of the denoising sampler's trajectory likelihood (d2 Table 1: -3.051 against -0.128 nats a token).
    Refused for families with shifted logits.
    """

    replays = exact_for = ("any_order",)

    def check(self, spec: MaskedDiffusionSpec) -> None:
        check_unshifted("AnyOrder", spec.logits_shift)
        check_full_attention("AnyOrder", spec.block_size, "Use exact_trajectory or step_merge")

    def num_views(self, rollout: Rollout) -> int:
        return 1

    def view(self, rollout: Rollout, n: int, seeds: Tensor, iteration: int) -> View:
        return two_stream_view(rollout)
