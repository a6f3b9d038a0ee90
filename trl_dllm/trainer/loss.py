"""What a token counts for in TRL's losses, and how a part of a loss is back-propagated.

TRL's `_compute_loss` stays as it is. These functions say how it weighs a token, where something is computed beside it
or put into it: sub-sampled estimators, wd1, and the KL over the whole vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl.trainer.utils import nanstd

from ..likelihood import Estimator
from ..rollout import Rollout


# Losses whose gradient with respect to a token's log-prob depends on that log-prob alone.
SEPARABLE_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")

# All that `loss_type` may be: TRL's, and wd1.
LOSSES = (*SEPARABLE_LOSSES, "luspo", "vespo", "wd1")

# All that `importance_sampling_level` may be: TRL's, and GSPO-token's, under the name that TRL had for it.
LEVELS = ("token", "sequence", "sequence_token")


def carried(args) -> tuple[str, str]:
    """(loss type, importance level) of TRL's that carry out what `args` say."""
    loss_type = "dr_grpo" if args.loss_type == "wd1" else args.loss_type
    level = args.importance_sampling_level
    return loss_type, "token" if level == "sequence_token" else level


def is_separable(trainer) -> bool:
    """Whether dL/dlogp of a token is known from that token alone, so that one view can be back-propagated at a time.

    Reads what `GRPOTrainer._compute_loss` reads: loss type, importance level, filters and entropy bonus.
    """
    return (
        trainer.loss_type in SEPARABLE_LOSSES
        and trainer.importance_sampling_level == trainer.args.importance_sampling_level == "token"
        and trainer.off_policy_mask_threshold is None
        and trainer.top_entropy_quantile == 1.0
        and not trainer._entropy_bonus_enabled
    )


def token_weights(trainer, inputs: dict) -> Tensor:
    """Weights (B, L) with which TRL's loss sums what is added to every token's loss, as its k3 KL is.

    `(token_weights(trainer, inputs) * x).sum()` is x, masked and normalised as `trainer.loss_type` says and divided
    for gradient accumulation. A test holds it to TRL's own loss for every loss type of the installed TRL.

    Raises:
        ValueError: a loss type that this TRL has and we do not know.
    """
    mask, training = inputs["completion_mask"], trainer.model.training
    rows = len(mask)
    accumulation = trainer.current_gradient_accumulation_steps if training else 1.0
    match trainer.loss_type:
        case "grpo" | "sapo":
            return mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0) / rows / accumulation
        case "bnpo":
            return mask / mask.sum().clamp(min=1.0) / accumulation
        case "dr_grpo":
            return mask / (rows * trainer.max_completion_length) / accumulation
        case "luspo":
            return mask / rows / accumulation
        case "dapo" | "cispo" | "vespo":
            # The generation batch's tokens, a process's share of them, and of that one accumulation window's.
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
            return mask / (tokens * (accumulation / trainer.args.steps_per_generation if training else 1.0))
    raise ValueError(f"loss_type={trainer.loss_type!r}: it is not known how this loss averages over tokens.")


def with_sequence_ratio(trainer, logps: Tensor, inputs: dict) -> dict:
    """The inputs of TRL's token-level loss at which it is GSPO-token's, where `args` ask for that.

    The ratio of a token is s · π / sg(π), with s the ratio of its sequence, exp of the mean log-ratio (GSPO Eq. 13 and
    14): the old log-probs are moved so far that the token-level ratio is that.
    """
    old = inputs.get("old_per_token_logps")
    if trainer.args.importance_sampling_level != "sequence_token" or old is None:  # None: all ratios are 1
        return inputs
    mask, logps = inputs["completion_mask"], logps.detach()
    mean = ((logps - old) * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1.0)
    return {**inputs, "old_per_token_logps": logps - mean}


def sub_sampled_mask(mask: Tensor, estimator: Estimator, rollout: Rollout, iteration: int) -> Tensor:
    """Loss mask (B, L) of an estimator that leaves positions out, in this inner iteration."""
    drawn = (rollout, rollout.view_seed, iteration)
    return sub_sample_weights(mask, estimator.scored(*drawn), estimator.sampling_weights(*drawn))


def sub_sample_weights(mask: Tensor, scored: Tensor, weights: Tensor | None = None) -> Tensor:
    """Loss mask of sub-sampled rows, float (B, L): `weights` on the k scored of n counted positions, None for n / k.

    A row's weights still sum to n, so every normaliser of TRL's losses is what it is with all positions scored, and
    the expected gradient is the full estimator's for every token-separable loss. What `weights` leave of n, or take
    beyond it, is spread over the positions that are not scored: their ratio is 1, and they have no gradient.
    """
    mask = mask.bool()
    scored = scored & mask
    number = mask.sum(dim=1, keepdim=True)
    if weights is None:
        return scored.float() * number / scored.sum(dim=1, keepdim=True).clamp(min=1)
    weights = weights.float() * scored
    rest, others = number - weights.sum(dim=1, keepdim=True), mask & ~scored
    return weights + others * rest / others.sum(dim=1, keepdim=True).clamp(min=1)


def wd1_weights(advantages: Tensor) -> Tensor:
    """wd1's weights of completions, softmax(A) - softmax(-A) over each group times its size; (groups, G) both.

    As advantages under `dr_grpo` at ratio 1 they give wd1's loss, -Σ w⁺ log π + Σ w⁻ log π, averaged over groups and
    divided by the canvas length.
    """
    weights = torch.softmax(advantages, dim=1) - torch.softmax(-advantages, dim=1)
    return advantages.shape[1] * weights


def wd1_advantages(trainer, advantages: Tensor) -> Tensor:
    """wd1's weights (B,) of this process's completions; a group may be spread over processes."""
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    weights = wd1_weights(trainer.accelerator.gather(advantages).view(-1, size)).flatten()
    start = trainer.accelerator.process_index * len(advantages)
    return weights[start : start + len(advantages)]


def skips_rows(trainer) -> bool:
    """Whether rows without a gradient are left out: where nothing but the advantage moves a row, or reads its entropy.

    Under `normalize_then_sum` the advantage of a group of equal rewards is whatever the others leave.
    """
    return (
        trainer.beta == 0
        and not trainer._entropy_bonus_enabled
        and trainer.top_entropy_quantile == 1.0
        and trainer.multi_objective_aggregation == "sum_then_normalize"
    )


def rows_without_gradient(trainer, rewards: Tensor, mask: Tensor) -> Tensor:
    """This process's rows that add nothing but their share of the normaliser, bool (B,).

    Rows of a group whose rewards are all equal by TRL's own measure, and rows that the loss leaves out whole. (Their
    advantages are not always 0: eight rewards of 0.1 leave 7e-9.)

    Args:
        rewards (`Tensor` of shape (all rows, functions)): of all processes, NaN where a function gave none.
        mask (`Tensor` of shape (B, L)): tokens of this process that the loss counts.
    """
    left_out = ~mask.any(dim=1)
    if not skips_rows(trainer):
        return left_out
    total = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    spread = nanstd(total.view(-1, size), dim=1) if size > 1 else torch.zeros_like(total)
    equal = torch.isclose(spread, torch.zeros_like(spread)).repeat_interleave(size)
    start = trainer.accelerator.process_index * len(mask)
    return left_out | equal[start : start + len(mask)]


def _is_deepspeed(trainer) -> bool:
    return trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


@contextmanager
def deferred_sync(trainer, model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without synchronising them between processes, and without an optimizer step.

    Otherwise DDP would reduce gradients, and DeepSpeed's wrapper step the optimizer, once a view.
    """
    state = trainer.accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        # FSDP's no_sync would keep whole gradients in memory; reducing them once a view costs traffic only.
        with (
            nullcontext() if _is_deepspeed(trainer) or trainer.is_fsdp_enabled else trainer.accelerator.no_sync(model)
        ):
            yield
    finally:
        state._set_sync_gradients(before)


def backward(trainer, loss: Tensor) -> None:
    """Back-propagate a part of a loss that is scaled for gradient accumulation already."""
    trainer.accelerator.backward(loss, **({"scale_wrt_gas": False} if _is_deepspeed(trainer) else {}))
