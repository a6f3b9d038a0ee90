"""What GRPO logs beside TRL's metrics. Each function adds its entries to the trainer's, gathered over processes."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..rollout import Rollout


def _of_mode(trainer) -> dict[str, list[float]]:
    """The entries of training or of evaluation; TRL averages each over a logging window."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def record_generation(trainer, rollout: Rollout, skipped: Tensor) -> None:
    """The sampler's speed and the rows that are not trained on.

    Logs `sampling/tokens_per_forward`, `sampling/steps` and `frac_rows_skipped`.
    """
    metrics, gather = _of_mode(trainer), trainer.accelerator.gather
    decoded = rollout.revealed.sum() / rollout.num_steps.sum()
    metrics["sampling/tokens_per_forward"].append(gather(decoded).mean().item())
    metrics["sampling/steps"].append(gather(rollout.num_steps.float().mean()).mean().item())
    metrics["frac_rows_skipped"].append(gather(skipped.float()).mean().item())


def record_order(trainer, rollout: Rollout) -> None:
    """How each completion was decoded, for TRL's table of them: `decoding_steps` and `unmask_order` (`order_bars`)."""
    if not trainer.log_completions:
        return
    bars = [
        order_bars(steps[counted].tolist())
        for steps, counted in zip(rollout.unmask_step.cpu(), rollout.counted.cpu(), strict=True)
    ]
    trainer._log_completion_extra("decoding_steps", rollout.num_steps.tolist())
    trainer._log_completion_extra("unmask_order", bars)


def order_bars(steps: list[int], width: int = 32) -> str:
    """The step at which each token of a completion was revealed, as bars: ▁ first, █ last; left to right is ▁▂▃▄▅▆▇█.

    Of a completion with more than `width` tokens each bar is the mean of some neighbours.
    """
    bars, last, taken = "▁▂▃▄▅▆▇█", max([1, *steps]), min(len(steps), width)
    cuts = [len(steps) * i // taken for i in range(taken + 1)] if taken else []
    means = [sum(steps[low:high]) / (high - low) for low, high in pairwise(cuts)]
    return "".join(bars[int(mean / last * (len(bars) - 1) + 0.5)] for mean in means)


def record_flops(trainer) -> None:
    """The run's floating-point operations so far, over all processes: `flops` and `flops_paper`."""
    metrics, gather = _of_mode(trainer), trainer.accelerator.gather
    totals = torch.tensor([[trainer.flops.counted, trainer.flops.paper]], dtype=torch.float64)
    totals = gather(totals.to(trainer.accelerator.device)).sum(dim=0).tolist()
    # Set and not appended: these are totals, and no averages.
    metrics["flops"], metrics["flops_paper"] = [totals[0]], [totals[1]]


@torch.no_grad()
def record_entropy(trainer, entropies: Tensor, inputs: dict[str, Tensor]) -> None:
    """TRL's `entropy` over the tokens that were run: rows without a gradient are left out of the mean."""
    mask = inputs["completion_mask"]
    if "skipped" in inputs:
        mask = mask * ~inputs["skipped"][:, None]
    sums = torch.stack([(entropies * mask).sum(), mask.sum().to(entropies.dtype)])
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    _of_mode(trainer)["entropy"][-1] = total / max(count, 1)


@torch.no_grad()
def record_kl(trainer, kls: Tensor, mask: Tensor) -> None:
    """The KL over the vocabulary, averaged over the counted tokens of all processes: `kl`, in place of TRL's 0."""
    sums = torch.stack([(kls * mask).sum(), mask.sum().to(kls.dtype)])
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    _of_mode(trainer)["kl"][-1] = total / max(count, 1)


@torch.no_grad()
def record_mismatch(trainer, difference: Tensor) -> None:
    """How far the sampler's own log-probs are from the policy's: `sampling/mismatch_kl`, `sampling/mismatch_max`.

    Before the first update of a cycle the two are the same policy, and what differs is rounding, an approximate cache
    or an outside engine.

    Args:
        difference (`Tensor` of shape (n,)): log(policy / sampler) of this process's counted tokens, in nats.
    """
    k3 = (difference.exp() - 1 - difference).sum()
    total, count = trainer.accelerator.reduce(torch.stack([k3, k3.new_tensor(len(difference))]), "sum").tolist()
    metrics = _of_mode(trainer)
    metrics["sampling/mismatch_kl"].append(total / max(count, 1))
    metrics["sampling/mismatch_max"].append(_extreme(trainer, difference.abs(), 0.0, torch.max))


@torch.no_grad()
def record_correction(trainer, difference: Tensor, weights: Tensor) -> None:
    """The importance weights between sampler and policy, under TRL's names (which are means of processes).

    Args:
        difference (`Tensor` of shape (n,)): as in `record_mismatch`.
        weights (`Tensor` of shape (m,)): of the same tokens, or of the rows.
    """
    metrics, gather = _of_mode(trainer), trainer.accelerator.gather
    name = "sampling/sampling_logp_difference"
    metrics[f"{name}/mean"].append(gather(_mean(difference.abs())).mean().item())
    metrics[f"{name}/max"].append(_extreme(trainer, difference.abs(), 0.0, torch.max))
    name = "sampling/importance_sampling_ratio"
    metrics[f"{name}/min"].append(_extreme(trainer, weights, torch.inf, torch.min))
    metrics[f"{name}/mean"].append(gather(_mean(weights)).mean().item())
    metrics[f"{name}/max"].append(_extreme(trainer, weights, 0.0, torch.max))


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.new_zeros(())


def _extreme(trainer, values: Tensor, empty: float, of: Callable[[Tensor], Tensor]) -> float:
    """The largest or the smallest of all processes' numbers; `empty` stands for a process that has none."""
    return of(trainer.accelerator.gather(of(values) if values.numel() else values.new_tensor(empty))).item()
