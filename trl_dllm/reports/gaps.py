"""What every estimator makes of the tokens of a few completions, for the page of `trl-dllm trace`."""

import torch
from torch import nn

from ..likelihood import Estimator, check_estimator, token_logps
from ..models import MaskedDiffusionSpec
from ..rollout import Rollout
from ..trace import Estimate
from .likelihood import default_estimators


@torch.no_grad()
def estimate_all(
    model: nn.Module,
    rollout: Rollout,
    exact: Estimator,
    estimators: dict[str, Estimator] | None = None,
    batch_size: int | None = None,
) -> list[Estimate]:
    """Per-token log-probs of a rollout under `model`: the exact ones, then those of each estimator that applies.

    Args:
        model (`nn.Module`): which scores; it need not have drawn the rollout.
        rollout (`Rollout`): B rows.
        exact (`Estimator`): the one that is exact for the rollout's decoding.
        estimators (`dict[str, Estimator]`, *optional*): by name; None takes the likelihood report's.
        batch_size (`int`, *optional*): rows a forward; None runs all rows at once.

    Raises:
        ValueError: a rollout that the model cannot score.
    """
    spec = MaskedDiffusionSpec.from_model(model)
    check_estimator(exact, rollout, spec)
    chosen = default_estimators(rollout, spec) if estimators is None else estimators
    found = {"exact": exact} | {name: one for name, one in chosen.items() if type(one) is not type(exact)}
    lines = []
    for name, estimator in found.items():
        try:  # where the draw was truncated, not every estimator says among which tokens
            check_estimator(estimator, rollout, spec)
        except ValueError:
            continue
        scores = token_logps(model, rollout, estimator, batch_size=batch_size, spec=spec)
        views = estimator.num_views(rollout)
        lines.append(Estimate(name, views, scores.logps, scores.scored, estimator.per_token))
    return lines
