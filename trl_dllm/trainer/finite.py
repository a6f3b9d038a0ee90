"""NaN and infinity end a run before they reach the weights.

Trainer logs such a loss as 0.0 (`logging_nan_inf_filter`) and steps on, and every weight is NaN from then on.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from accelerate.utils import gather_object
from torch import Tensor

from ..generation import LogitsNotFinite


_LARGEST = 1e30  # TRL makes a large number of the infinity that is left of an infinite reward
_MOST_ROWS = 8  # that a message names

_REMEDY = (
    "Go on from the last checkpoint with a lower learning_rate or max_grad_norm, and look at the rows; where float16 "
    "overflows, bfloat16 does not."
)


def check_loss(
    trainer, loss: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, parts: Mapping[str, Tensor | None]
) -> None:
    """Raise FloatingPointError if the loss of a micro-batch is not finite, on every process if it is so on one.

    Costs one small collective and a look at its result, beside those of the metrics, which every micro-step has
    gathered and read back at this point: the device is not kept waiting.

    Args:
        loss (`Tensor`): the micro-batch's scalar, before its backward pass.
        prompt_ids, prompt_mask (`Tensor` of shape (B, P)): what the message names rows by.
        parts (`Mapping`): what the loss is made of, name -> (B,) or (B, L), to tell which rows are to blame.
    """
    if trainer.model.training:
        trainer.rows_of_step.append((prompt_ids, prompt_mask))
    if trainer.accelerator.gather(loss.detach().isfinite().int()).all():
        return
    names = _name_rows(trainer, prompt_ids, prompt_mask)
    found: list[list[str]] = [[] for _ in names]
    for part, table in parts.items():
        if table is not None and table.is_floating_point() and table.dim() > 0:
            for row, values in zip(found, table.abs(), strict=True):
                if not (values < _LARGEST).all():
                    row.append(part)
    blamed = gather_object([f"{name}: {', '.join(row)}" for name, row in zip(names, found, strict=True) if row])
    remedy = _REMEDY
    if not blamed:
        blamed = gather_object(names)
        remedy = f"All that it is made of is finite, so a product or an exponential overflowed. {_REMEDY}"
    elif any("advantages" in row for row in blamed):
        remedy = "A reward model returned infinity: check what it makes of these rows."
    raise FloatingPointError(f"{_moment(trainer)}: the loss is not finite, in {_listed(blamed)}. {remedy}")


def check_gradient(trainer, grad_norm: Tensor | float | None) -> None:
    """Raise FloatingPointError if the gradient of an optimizer step is not finite; under DeepSpeed its step is done.

    The norm is that of all processes, and read back once an optimizer step.
    """
    rows, trainer.rows_of_step = trainer.rows_of_step, []
    if grad_norm is None or math.isfinite(grad_norm):
        return
    if trainer.accelerator.mixed_precision == "fp16":  # the loss scaler skips the step and takes a smaller scale
        scaler = trainer.accelerator.scaler  # None under DeepSpeed, which ends a run by itself at its smallest scale
        if scaler is None or scaler.get_scale() > 1:
            return
    blamed = gather_object([name for ids, mask in rows for name in _name_rows(trainer, ids, mask)])
    raise FloatingPointError(
        f"{_moment(trainer)}: the gradient is not finite (norm {float(grad_norm)}), though the loss is, in "
        f"{_listed(blamed)}. {_REMEDY}"
    )


@contextmanager
def rollout_of(trainer, prompt_ids: list[list[int]]) -> Iterator[None]:
    """Say at which step, and for which prompts, the sampler met logits that are not finite."""
    try:
        yield
    except LogitsNotFinite as error:
        rows = [f"row {row} ({_beginning(trainer, prompt_ids[row])!r})" for row in error.rows]
        raise FloatingPointError(
            f"{_moment(trainer)}: {LogitsNotFinite.what}, in {_listed(rows)}. {_REMEDY}"
        ) from error


def _moment(trainer) -> str:
    step = trainer.state.global_step
    return f"Step {step + 1}" if trainer.model.training else f"Evaluation after step {step}"


def _name_rows(trainer, ids: Tensor, mask: Tensor) -> list[str]:
    where = f"process {trainer.accelerator.process_index}, " if trainer.accelerator.num_processes > 1 else ""
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [f"{where}row {i} ({_beginning(trainer, row)!r})" for i, row in enumerate(rows)]


def _beginning(trainer, ids: list[int]) -> str:
    text = trainer._tokenizer.decode(ids[:40])
    return text if len(text) <= 40 else text[:40] + "…"


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_ROWS
    return "; ".join(names[:_MOST_ROWS]) + (f"; and {more} more" if more > 0 else "")
