"""Completions that something else drew than the policy that is scored: an engine outside the trainer, or an
approximate cache. What a `rollout_func` returns, how it is read, and the weights that correct for the difference.

TRL's `rollout_func(prompts, trainer)` returns `prompt_ids`, `completion_ids` and `logprobs`. Of a diffusion model that
is not enough, for its likelihood is that of a trajectory. Beside them it returns, a list a row,

- `canvas_ids`: the whole canvas, `max_completion_length` tokens, also behind the EOS; the mask token where nothing was
  revealed;
- `unmask_step`: the decoding step that revealed each of them, counted from 0 over the whole canvas, -1 for never.

`logprobs` may be None, or a row of them may have a number for each token of the completion or of the canvas; NaN or
None where the engine has none. A trace that is incomplete or contradicts itself is refused and never repaired.

The importance weights are TRL's, of its `vllm_importance_sampling_*` options, at the canvas's width and multiplied
into the advantages. They compare the sampler's log-probs with those of an estimator that is exact for the decoder:
another estimator's bias is no mismatch.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import Blocks
from ..likelihood import AnyOrder, Estimator, ExactTrajectory
from ..models.spec import check_positions
from ..rollout import Rollout, count_until_eos, left_pad
from .metrics import record_correction, record_mismatch


# What `vllm_importance_sampling_mode` may be.
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

_TRLS = ("prompt_ids", "completion_ids", "logprobs")
_OURS = ("canvas_ids", "unmask_step")
_EXACT: dict[str, Estimator] = {"denoising": ExactTrajectory(), "any_order": AnyOrder()}


def check_engine(args: Any, rollout_func: Callable | None) -> None:
    """Refuse settings that do not go with completions of another sampler.

    Raises:
        ValueError: truncation, whose support an engine does not report; or sequence weights for a loss that multiplies
            tokens' itself.
    """
    if rollout_func is not None and args.truncates:
        raise ValueError(
            f"top_k={args.top_k}, top_p={args.top_p}, min_p={args.min_p} with rollout_func: which tokens its engine "
            "could have drawn is not known, and scores among all of them would be of another distribution. Draw "
            "without truncation."
        )
    sequences = args.vllm_importance_sampling_mode.startswith("sequence")
    if sequences and args.loss_type == "vespo" and corrects(args, rollout_func):
        raise ValueError(
            f"vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r} with loss_type='vespo', which "
            "multiplies the tokens' weights itself. Set 'token_truncate' or 'token_mask'."
        )


def corrects(args: Any, rollout_func: Callable | None) -> bool:
    """Whether completions are weighed: another sampler drew them, and its log-probs are not the ratio's own."""
    another = rollout_func is not None or args.approximate_cache
    return another and args.vllm_importance_sampling_correction and args.old_logps == "recompute"


def checked_rollouts(rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` as TRL calls it: the trainer keeps the trajectory, and TRL gets what it knows.

    `prompts` are this process's, each `num_generations` times.
    """

    def rollouts(prompts: list, trainer) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        trainer._rollout = read_rollout(trainer, output, len(prompts))
        # Without `logprobs`: the trainer has them, at the canvas's width.
        return {**{name: value for name, value in output.items() if name not in _OURS}, "logprobs": None}

    return rollouts


def read_rollout(trainer, output: dict[str, Any], rows: int) -> Rollout:
    """The rollout that a `rollout_func` describes.

    Raises:
        ValueError: a field that is missing or of another length, an id outside the vocabulary, and a trace that is
            incomplete or contradicts its canvas, its completion, or the blocks of the trainer's decoding.
    """
    missing = [name for name in (*_TRLS, *_OURS) if name not in output]
    if missing:
        raise ValueError(
            f"rollout_func returned no {', '.join(missing)}: a diffusion model is scored on the trajectory of its "
            "whole canvas. Return canvas_ids and unmask_step beside TRL's prompt_ids, completion_ids and logprobs."
        )
    for name in (*_TRLS, *_OURS):
        found = output[name]
        if not (name == "logprobs" and found is None) and len(found) != rows:
            raise ValueError(
                f"rollout_func returned {len(found)} rows of {name} for {rows} prompts; every prompt in the list is "
                "one row (they come repeated num_generations times)."
            )
    args, spec, device = trainer.args, trainer.spec, trainer.accelerator.device
    facts = trainer.sampling.facts(spec)
    steps = facts["steps"]
    blocks = facts["blocks"] or Blocks(trainer.sampling.block_length, "canvas")
    length, vocabulary = args.canvas_length, trainer.model.config.get_text_config().vocab_size
    for row, prompt in enumerate(output["prompt_ids"]):
        where = f"rollout_func: row {row}: "
        _check_numbers(f"{where}prompt_ids", prompt, None, 0, vocabulary)
        check_positions(trainer.model.config, len(prompt), length, "max_completion_length", where)
        if len(prompt) < spec.logits_shift:
            raise ValueError(f"{where}prompt_ids is empty; this model predicts a position at the row before it.")
        _check_numbers(f"{where}canvas_ids", output["canvas_ids"][row], length, 0, vocabulary)
        _check_numbers(f"{where}unmask_step", output["unmask_step"][row], length, -1, length)
        if steps is not None and max(output["unmask_step"][row]) >= steps:
            raise ValueError(
                f"{where}unmask_step goes up to {max(output['unmask_step'][row])}, and diffusion_steps={steps}. Set "
                "diffusion_steps to the engine's, or confidence_threshold where their number is not fixed."
            )
    canvas, taken = (torch.tensor(output[name], dtype=torch.int64).view(rows, length) for name in _OURS)
    counted = count_until_eos(canvas, taken, trainer.eos_token_ids)
    eos = torch.isin(canvas, torch.tensor(trainer.eos_token_ids, dtype=torch.int64)) & (taken >= 0)
    ends = torch.where(eos.any(dim=1), eos.long().argmax(dim=1), length)
    for row in range(rows):
        _check_trace(
            f"rollout_func: row {row}: ",
            canvas[row],
            taken[row],
            counted[row],
            int(ends[row]),
            list(output["completion_ids"][row]),
            spec.mask_token_id,
            blocks.number(torch.ones(1, len(output["prompt_ids"][row]), dtype=torch.bool), length)[0, -length:],
            blocks.size,
        )
    logps = _read_logps(output["logprobs"], counted, taken >= 0)
    if args.old_logps == "rollout" and not logps[counted].isfinite().all():
        raise ValueError(
            "rollout_func returned no logprobs for some tokens, and old_logps='rollout' takes them for the old "
            "policy's. Return all of them, or set old_logps='recompute'."
        )
    prompt_ids, prompt_mask = left_pad(output["prompt_ids"], trainer._tokenizer.pad_token_id)
    rollout = Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=canvas,
        unmask_step=taken,
        logps=logps,
        counted=counted,
        view_seed=trainer._row_seeds(rows, "cpu"),
        **facts,
    )
    return rollout.to(device)


def _check_numbers(name: str, numbers: Sequence, length: int | None, low: int, end: int) -> None:
    """Refuse a row that has not `length` whole numbers in [low, end)."""
    if length is not None and len(numbers) != length:
        raise ValueError(
            f"{name} has {len(numbers)} entries, and max_completion_length={length}: return the whole canvas, also "
            "behind the EOS."
        )
    for place, number in enumerate(numbers):
        if type(number) is not int or not low <= number < end:
            raise ValueError(f"{name}[{place}]={number!r} must be a whole number from {low} to {end - 1}.")


def _check_trace(
    where: str,
    canvas: Tensor,
    steps: Tensor,
    counted: Tensor,
    end: int,
    completion: list[int],
    mask_token_id: int,
    blocks: Tensor,
    block_length: int,
) -> None:
    """Refuse a row whose steps are not those of a canvas that was revealed once, block by block, up to its EOS."""
    masked, revealed = canvas == mask_token_id, steps >= 0
    wrong = (masked == revealed).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where}canvas_ids[{wrong[0]}]={int(canvas[wrong[0]])} and unmask_step[{wrong[0]}]="
            f"{int(steps[wrong[0]])} contradict each other: where nothing was revealed stand the mask token "
            f"({mask_token_id}) and -1."
        )
    lost = masked[:end].nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"{where}position {lost[0]} was never revealed, and no EOS stands before it: the trace is incomplete. "
            "Return every step that the engine took."
        )
    found = canvas[counted].tolist()
    if completion != found:
        raise ValueError(
            f"{where}completion_ids has {len(completion)} tokens that are not those of canvas_ids up to and with its "
            f"first EOS, of which there are {len(found)}. Cut the canvas there."
        )
    used = steps[revealed].unique().tolist()
    if used != list(range(len(used))):
        gap = next(step for step in range(len(used)) if used[step] != step)
        raise ValueError(
            f"{where}unmask_step says that nothing was revealed in step {gap}. Number the steps from 0 without gaps; "
            "an engine that revises tokens has no such trace."
        )
    last = -1
    for number, block in enumerate(steps[blocks == n] for n in blocks.unique()):
        taken = block[block >= 0]
        if len(taken) and int(taken.min()) <= last:
            raise ValueError(
                f"{where}step {int(taken.min())} revealed a position of block {number} (block_length={block_length}), "
                f"and the block before it was complete only in step {last}. Count the steps over the whole canvas and "
                "not anew in each block, or set block_length to the engine's."
            )
        last = max(last, int(block.max()))


def _read_logps(rows: Sequence | None, counted: Tensor, revealed: Tensor) -> Tensor:
    """The engine's log-probs at the canvas's width, float32 (B, L): NaN where it has none, 0 where nothing was drawn.

    Raises:
        ValueError: a row of another length than its completion and its canvas, or a number that is no log-prob.
    """
    logps = torch.zeros(revealed.shape).masked_fill(revealed, torch.nan)
    for row, given in enumerate(rows if rows is not None else ()):
        if given is None:
            continue
        values = torch.tensor([math.nan if value is None else float(value) for value in given], dtype=torch.float32)
        places = next((p for p in (counted[row], torch.ones_like(counted[row])) if len(values) == int(p.sum())), None)
        if places is None:
            raise ValueError(
                f"rollout_func: row {row}: logprobs has {len(values)} numbers; it needs one for each of the "
                f"{int(counted[row].sum())} tokens of the completion or {counted.shape[1]} of the canvas."
            )
        wrong = [value for value in values.tolist() if value == -math.inf or value > 1e-3]  # rounded up from 0
        if wrong:
            raise ValueError(
                f"rollout_func: row {row}: logprobs holds {wrong[0]}, which is no log-probability (nats) of a token "
                "that was drawn. Return None or NaN where the engine has none."
            )
        logps[row, places] = values
    return logps.masked_fill(~revealed, 0)


def correct(trainer, batches: list[dict[str, Tensor]], score: Callable[..., Tensor]) -> None:
    """Multiply the importance weights into the advantages of a generation batch, which is split into micro-batches.

    Logs TRL's `sampling/sampling_logp_difference/*` and `sampling/importance_sampling_ratio/*`, and
    `sampling/mismatch_kl` and `_max`. Costs the exact estimator's forwards (one a decoding step, or one any-order
    pass), or none where the old log-probs are that estimator's.

    Args:
        trainer (`DiffusionGRPOTrainer`): its settings, and the model that has just been sampled from.
        batches (`list[dict]`): `completion_mask` (B, L), `advantages` (B,), the rollout with the sampler's log-probs
            and, where it is used, `old_per_token_logps`.
        score (`Callable`): `policy_logps`.
    """
    args = trainer.args
    if not corrects(args, trainer.rollout_func):
        return
    masks = [batch["completion_mask"].bool() & ~batch["skipped"][:, None] for batch in batches]
    masks = [mask & batch["rollout_logps"].isfinite() for mask, batch in zip(masks, batches, strict=True)]
    if not trainer.accelerator.gather(torch.stack([mask.any() for mask in masks])).any():  # no log-probs at all
        return
    as_drawn = args.p_mask_prompt == 0 and args.score_temperature in (None, trainer.temperature or 1.0)
    exact = as_drawn and args.decoding in trainer.estimator.exact_for
    differences, ratios = [], []
    for batch, mask in zip(batches, masks, strict=True):
        if exact and args.scores_old and args.ratio_denominator == "old":
            scores = batch["old_per_token_logps"][:, 0]
        else:
            scores = score(_exact_scorer(trainer), trainer.model, batch)[:, 0]
        difference = (scores - batch["rollout_logps"]).masked_fill(~mask, 0)
        weights = importance_weights(
            difference,
            args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
        )
        if exact and trainer.off_policy_mask_threshold:  # TRL's off-policy mask compares with the sampler
            batch["sampling_per_token_logps"] = batch["rollout_logps"]
        if trainer.loss_type == "vespo":  # which takes them into its sequence weight
            batch["importance_sampling_ratio"] = weights
        else:
            batch["advantages"] = batch["advantages"][:, None] * weights.expand(mask.shape)
        differences.append(difference[mask])
        ratios.append(weights[mask] if weights.shape == mask.shape else weights.flatten())
    record_mismatch(trainer, torch.cat(differences))
    record_correction(trainer, torch.cat(differences), torch.cat(ratios))


def importance_weights(difference: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    """TRL's importance weights of log(policy / sampler) (B, L), 0 where it is not known: (B, L), or (B, 1) for
    sequences; outside [low, high] they are clipped (`…_truncate`) or 0 (`…_mask`)."""
    level, bound = mode.split("_")
    ratio = torch.exp(difference.sum(dim=1, keepdim=True) if level == "sequence" else difference)
    if bound == "truncate":
        return ratio if low is None and high is None else ratio.clamp(min=low, max=high)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return ratio.masked_fill((ratio < low) | (ratio > high), 0)


def _exact_scorer(trainer):
    """A copy of the trainer that scores each token under the distribution that it was drawn from."""
    scorer, settings = copy.copy(trainer), copy.copy(trainer.args)
    settings.p_mask_prompt, settings.score_temperature = 0.0, None
    scorer.args, scorer.estimator = settings, _EXACT[settings.decoding]
    return scorer
