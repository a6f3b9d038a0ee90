"""Log-probs of the policies that a loss compares with: the old one, the reference, and the one that drew.

They are computed when a generation batch has been split, on the very forwards that the update will make, so that the
ratio of a policy that has not moved is 1 to the last bit.
"""

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ..likelihood import TokenScores, assembled
from .buffer import from_batch
from .engine import correct, corrects
from .reference import as_reference


def add_logps(trainer, batches: list[dict[str, Tensor]]) -> None:
    """Put into the micro-batches of a new generation batch what their loss needs of other policies.

    Log-probs are (B, K, L): one for each of the K draws of what is random in the views.
    """
    args, current = trainer.args, _batches_of_the_first_update(trainer)
    for place, batch in enumerate(batches):
        if args.scores_old:
            first = int(place < current and not corrects(args, trainer.rollout_func))
            batch["old_per_token_logps"] = policy_logps(trainer, trainer.model, batch, first)
        elif args.needs_old:
            batch["old_per_token_logps"] = batch["rollout_logps"].masked_fill(
                ~batch["counted"] | batch["skipped"][:, None], 0
            )[:, None]
        if args.scores_reference:
            with as_reference(trainer) as model:
                batch["ref_per_token_logps"] = policy_logps(trainer, model, batch, part="reference")
            if args.ratio_denominator == "ref":
                batch["old_per_token_logps"] = batch["ref_per_token_logps"]
    correct(trainer, batches, policy_logps)
    for batch in batches:  # NaN where an outside engine has none, which nobody need know any more
        batch["rollout_logps"] = batch["rollout_logps"].nan_to_num()


def _batches_of_the_first_update(trainer) -> int:
    """How many micro-batches are first trained on before the policy moves: their updates score the old policy.

    Known where the buffer begins with an optimizer step's window, whose length Trainer says.
    """
    begins = trainer._window_step != trainer.state.global_step and trainer._step % trainer._cycle == 0
    return trainer.current_gradient_accumulation_steps if trainer.model.training and begins else 0


@torch.no_grad()
def policy_logps(trainer, model, batch: dict[str, Tensor], first: int = 0, part: str = "old") -> Tensor:
    """Log-probs (B, K, L) of a micro-batch for each draw of the views, 0 for the draws before `first`.

    Around the calls all is as TRL has it: no gradient, no checkpointing. The time is that `part`'s of a step.
    """
    kwargs, draws = trainer.args.gradient_checkpointing_kwargs, trainer._num_draws
    rollout = from_batch(batch, trainer.sampling.facts(trainer.spec))
    found = rollout.logps.new_zeros(len(rollout), draws, rollout.logps.shape[1])
    unchecked = disable_gradient_checkpointing(trainer.model, kwargs if isinstance(kwargs, dict) else None)
    with trainer.profile.part(part), unchecked:
        for draw in range(first, draws):
            plan, forwards = trainer._plan(rollout, draw, batch)
            scores = TokenScores.sum(trainer._score_view(model, plan, number) for number in range(forwards))
            found[:, draw] = assembled(plan, scores).logps
    return found
