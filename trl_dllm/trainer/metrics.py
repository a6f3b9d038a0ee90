"""What GRPO logs beside TRL's metrics. Each function adds its entries to the trainer's, gathered over processes."""

import torch
from torch import Tensor

from ..likelihood import TokenScores
from ..rollout import Rollout


def _of_mode(trainer) -> dict[str, list[float]]:
    """The entries of training or of evaluation; TRL averages each over a logging window."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def record_generation(trainer, rollout: Rollout) -> None:
    """The sampler's speed and, in training, the run's floating-point operations so far.

    Logs `sampling/tokens_per_forward`, `sampling/steps`, `flops` and `flops_paper`.
    """
    metrics, gather = _of_mode(trainer), trainer.accelerator.gather
    decoded = rollout.revealed.sum() / rollout.num_steps.sum()
    metrics["sampling/tokens_per_forward"].append(gather(decoded).mean().item())
    metrics["sampling/steps"].append(gather(rollout.num_steps.float().mean()).mean().item())
    if trainer.model.training:
        totals = torch.tensor([[trainer.flops.counted, trainer.flops.paper]], dtype=torch.float64)
        totals = gather(totals.to(trainer.accelerator.device)).sum(dim=0).tolist()
        # Set and not appended: these are totals, and no averages.
        metrics["flops"], metrics["flops_paper"] = [totals[0]], [totals[1]]


@torch.no_grad()
def record_kl(trainer, kls: Tensor, mask: Tensor) -> None:
    """The KL over the vocabulary, averaged over the counted tokens of all processes: `kl`, in place of TRL's 0."""
    sums = torch.stack([(kls * mask).sum(), mask.sum().to(kls.dtype)])
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    _of_mode(trainer)["kl"][-1] = total / max(count, 1)


@torch.no_grad()
def record_mismatch(trainer, scores: TokenScores, rollout: Rollout) -> None:
    """How far the sampler's own log-probs are from the policy's: `sampling/mismatch_kl`, `sampling/mismatch_max`.

    Before the first update of a cycle the two are the same policy, and what differs is rounding or a cache.
    """
    ratio = (scores.logps - rollout.logps)[rollout.counted]
    kl = (ratio.exp() - 1 - ratio).mean().nan_to_num()
    metrics, gather = _of_mode(trainer), trainer.accelerator.gather
    metrics["sampling/mismatch_kl"].append(gather(kl).mean().item())
    metrics["sampling/mismatch_max"].append(gather(ratio.abs().max()).max().item())
