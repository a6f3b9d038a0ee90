"""How a rollout travels in TRL's generation buffer: as tensors whose first dimension is the row.

TRL shuffles and splits the buffer by that dimension, so whatever has it stays beside its completion.
"""

from torch import Tensor

from ..rollout import Rollout


def to_batch(rollout: Rollout, kept: Tensor) -> dict[str, Tensor]:
    """The entries of a generation batch that describe its completions, TRL's own ones among them.

    `kept` (B, 1) is False for completions that the loss leaves out whole (`mask_truncated_completions`).
    """
    support = {} if rollout.support is None else {"support": rollout.support}
    return support | {
        # The prompts too: TRL's are of the wrong dtype if one is empty, and padded to a multiple if it is told so.
        "prompt_ids": rollout.prompt_ids,
        "prompt_mask": rollout.prompt_mask.long(),
        "completion_ids": rollout.completion_ids,
        "completion_mask": (rollout.counted & kept).long(),
        "unmask_step": rollout.unmask_step,
        "counted": rollout.counted,
        "rollout_logps": rollout.logps,
        "view_seed": rollout.view_seed,
    }


def from_batch(batch: dict[str, Tensor], mask_token_id: int, temperature: float) -> Rollout:
    """The rollout of a micro-batch."""
    return Rollout(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        completion_ids=batch["completion_ids"],
        unmask_step=batch["unmask_step"],
        logps=batch["rollout_logps"],
        counted=batch["counted"],
        view_seed=batch["view_seed"],
        mask_token_id=mask_token_id,
        temperature=temperature,
        support=batch.get("support"),
    )
