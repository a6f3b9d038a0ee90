"""How a rollout travels in TRL's generation buffer: as tensors whose first dimension is the row.

TRL shuffles and splits the buffer by that dimension, so whatever has it stays beside its completion. And how the
buffer is saved, and found again by a run that is resumed inside a generation cycle.
"""

import json
import warnings
from collections import deque
from typing import Any

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


def from_batch(batch: dict[str, Tensor], facts: dict[str, Any]) -> Rollout:
    """The rollout of a micro-batch; `facts` are its sampler's, see `DiffusionGenerationConfig.facts`."""
    return Rollout(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        completion_ids=batch["completion_ids"],
        unmask_step=batch["unmask_step"],
        logps=batch["rollout_logps"],
        counted=batch["counted"],
        view_seed=batch["view_seed"],
        support=batch.get("support"),
        advantages=batch.get("advantages"),
        **facts,
    )


def cycle_state(trainer) -> dict[str, Any]:
    """Where the trainer stands in its generation cycle, for a checkpoint; the buffer too, unless it is used up."""
    return {
        "layout": _layout(trainer),
        "step": trainer._step,
        "rounds": trainer._generation_round,
        "buffer": trainer._buffered_inputs if trainer._step % trainer._cycle else None,
        # The table of completions that each log of the cycle shows; as text, for it holds what users put there.
        "table": json.dumps(trainer._logs, default=_as_json) if trainer.log_completions else "{}",
    }


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, deque) else str(value)


def load_cycle_state(trainer, saved: dict[str, Any] | None) -> None:
    """Go on inside the cycle. Where what was saved does not fit this run, draw anew for the rest of it, and warn."""
    layout = _layout(trainer)
    if saved is not None and saved["layout"] == layout:
        device = trainer.accelerator.device
        trainer._step, trainer._generation_round = saved["step"], saved["rounds"]
        trainer._buffered_inputs = saved["buffer"] and [
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            for batch in saved["buffer"]
        ]
        for column, values in json.loads(saved["table"]).items():
            parts = values if isinstance(values, dict) else {None: values}  # "rewards" and "extra" are by name
            for name, part in parts.items():
                (trainer._logs[column] if name is None else trainer._logs[column][name]).extend(part)
        return
    # TRL would count from 0 again, and its cycles no longer be those of the sampler that repeats the prompts.
    trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    trainer._buffered_inputs = None
    if trainer._step % trainer._cycle and trainer.accelerator.is_main_process:
        reason = "holds no generation buffer"
        if saved is not None:
            before = saved["layout"]
            changed = [f"{key}={before[key]}, now {layout[key]}" for key in layout if before[key] != layout[key]]
            reason = f"was saved with {'; '.join(changed)}"
        warnings.warn(
            f"The checkpoint lies inside a generation cycle and {reason}. Completions are drawn anew for the rest of "
            "the cycle, so that the run differs from one that was not interrupted."
        )


def _layout(trainer) -> dict[str, int | bool]:
    """What a saved buffer must agree in with the run that takes it up."""
    args = trainer.args
    return {
        "num_processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": trainer.num_iterations,
        "num_generations": trainer.num_generations,
        "scores_old": args.scores_old,
        "scores_reference": args.scores_reference,
        "num_draws": args.num_draws(trainer.estimator),
    }
