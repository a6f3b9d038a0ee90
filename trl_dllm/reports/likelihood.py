"""How far each likelihood estimate is from the trajectory that was drawn.

For every counted token of a rollout the *exact conditional* is what the sampler drew it from: p(· | canvas before the
step that revealed it) for denoising, the mask row of `AnyOrder` for any-order decoding. An estimator gives another
distribution, that of its own view. The report compares the two:

- the mean log-prob a token (d2 Table 1), and its gap to the exact one, in nats;
- D: the mean over rows of Σ log π_exact − log π_estimate, d2's D_N for `StepMerge` (Fig. 5), and beside it L·ε of
  Theorem 4.1 (Eq. 68), with ε *estimated from below*: its maximum runs over the states that the rollouts visited;
- the mean KL(exact ‖ estimate) over the whole vocabulary (PADRE Fig. 2's comparison, with the trajectory's
  conditionals as the truth: π(y_i | y_-i) proper is not available for a model that is not enumerated);
- forwards and counted operations a row.

Logits exist for a tile of rows at a time; what is kept of the exact conditionals are hidden states, (B, L, H).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    CoupledElbo,
    Elbo,
    Estimator,
    ExactTrajectory,
    MeanField,
    PseudoLikelihood,
    StepMerge,
    TrajectoryPseudoLikelihood,
    check_estimator,
    counted_view,
)
from ..likelihood.view import IGNORE, View
from ..models import ForwardFlops, MaskedDiffusionSpec, apply_head, hidden_rows, log_probs, unwrap, view_inputs
from ..rollout import Rollout


@dataclass(frozen=True)
class LikelihoodLine:
    """What the report says of one estimator.

    Args:
        name (`str`): of the estimator.
        logp (`float`): mean log-prob a scored token, in nats.
        gap (`float`): mean of exact minus estimated log-prob a scored token, in nats.
        divergence (`float`): mean over rows of the gap summed over the canvas, scaled up where positions are left out.
        bound (`float`, *optional*): L·ε of d2's Theorem 4.1, ε estimated from below; for `StepMerge` alone.
        kl (`float`): mean KL(exact ‖ estimate) a scored token, over the vocabulary, in nats.
        kl_error (`float`): standard error of `kl`, from the rows' means.
        forwards (`int`): model calls a row.
        flops (`int`): operations counted for a row.
    """

    name: str
    logp: float
    gap: float
    divergence: float
    bound: float | None
    kl: float
    kl_error: float
    forwards: int
    flops: int


def default_estimators(rollout: Rollout, spec: MaskedDiffusionSpec, block_size: int = 4) -> dict[str, Estimator]:
    """The estimators of the report by name; those that do not apply to the model are left out."""
    steps = int(rollout.replayed_steps()[0].max()) + 1
    cuts = [n for n in (2, 4, 8, 16, 32, 64, 128) if n < steps]
    estimators = {
        "mean field (d1)": MeanField(),
        **{f"StepMerge N={n}": StepMerge(n) for n in cuts},
        "exact trajectory": ExactTrajectory(),
        "PKL": PseudoLikelihood(),
        f"PKL-U m={block_size}": BlockPseudoLikelihood(block_size, "partition"),
        f"PKL-U m={block_size} isolated": BlockPseudoLikelihood(block_size, "partition", "isolated"),
        "PKL-T = AnyOrder": TrajectoryPseudoLikelihood(),
        "PKL-T bidirectional": TrajectoryPseudoLikelihood("bidirectional"),
        "ELBO M=8": Elbo(8),
        "coupled ELBO M=8": CoupledElbo(8),
    }

    def applies(estimator: Estimator) -> bool:
        try:
            estimator.check(spec)
        except ValueError:
            return False
        return True

    return {name: estimator for name, estimator in estimators.items() if applies(estimator)}


@torch.no_grad()
def likelihood_report(
    model: nn.Module,
    rollout: Rollout,
    estimators: dict[str, Estimator] | None = None,
    exact: Estimator | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    spec: MaskedDiffusionSpec | None = None,
) -> list[LikelihoodLine]:
    """Compare estimators with the exact conditionals of the trajectories of `rollout`.

    Args:
        model (`nn.Module`): the model that drew the rollout.
        estimators (`dict[str, Estimator]`, *optional*): by name; None takes `default_estimators`.
        exact (`Estimator`, *optional*): the truth; None takes `ExactTrajectory()`, right for denoising. Pass
            `AnyOrder()` for a rollout of any-order decoding.
        temperature (`float`, *optional*): None takes the rollout's own (1 if that is 0).
        batch_size (`int`, *optional*): rows a forward; None runs all rows at once.

    Returns:
        One `LikelihoodLine` an estimator. Costs each estimator's forwards, and those of the exact one.
    """
    spec = spec or MaskedDiffusionSpec.from_model(model)
    exact = exact or ExactTrajectory()
    estimators = estimators or default_estimators(rollout, spec)
    temperature = rollout.temperature if temperature is None else temperature
    if rollout.support is not None:
        raise ValueError(
            "The rollout was drawn with top_k, top_p or min_p; the report compares distributions over the whole "
            "vocabulary. Draw without them."
        )
    for estimator in (exact, *estimators.values()):
        check_estimator(estimator, rollout, spec)
    run = _Run(model, rollout, spec, temperature, batch_size or len(rollout))
    truth = run.hidden(exact)
    return [run.line(name, estimator, truth) for name, estimator in estimators.items()]


class _Run:
    """One rollout under one model."""

    def __init__(self, model, rollout: Rollout, spec: MaskedDiffusionSpec, temperature: float, batch_size: int):
        self.model, self.rollout, self.spec = model, rollout, spec
        self.temperature, self.batch_size = temperature, batch_size
        self.count_flops = ForwardFlops(model)

    def parts(self, estimator: Estimator) -> Iterable[tuple[int, dict, Tensor, View]]:
        """(first row, model inputs, scored columns, view) of each forward; uncounted positions are not scored."""
        rollout = self.rollout
        for n in range(estimator.num_views(rollout)):
            view = counted_view(estimator, rollout, n, rollout.view_seed, 0)
            for start in range(0, len(rollout), self.batch_size):
                part = view[start : start + self.batch_size]
                chosen = (part.targets != IGNORE).flatten().nonzero().squeeze(1)
                yield start, view_inputs(self.model, part), chosen, part

    def place(self, start: int, chosen: Tensor, view: View) -> Tensor:
        """Number of each chosen column's position among the rollout's B·L."""
        canvas_length = self.rollout.completion_ids.shape[1]
        return (start + chosen // view.input_ids.shape[1]) * canvas_length + view.index.flatten()[chosen]

    def hidden(self, exact: Estimator) -> Tensor:
        """Hidden states (B·L, H) behind the exact conditional of each counted position."""
        out = torch.zeros(0)
        for start, inputs, chosen, view in self.parts(exact):
            hidden = hidden_rows(self.model, inputs, chosen - self.spec.logits_shift)
            out = hidden.new_zeros(self.rollout.counted.numel(), hidden.shape[-1]) if not len(out) else out
            out[self.place(start, chosen, view)] = hidden
        return out

    def line(self, name: str, estimator: Estimator, truth: Tensor) -> LikelihoodLine:
        project = unwrap(self.model).get_output_embeddings().forward  # apply_head redirects it during its call
        rollout, mask = self.rollout, self.spec.mask_token_id

        def reduce(logits: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
            log_p, log_q = (log_probs(x, mask, self.temperature) for x in (logits, project(hidden)))
            token, exact = (x.gather(1, target[:, None]).squeeze(1) for x in (log_p, log_q))
            kl = (log_q.exp() * (log_q - log_p)).sum(dim=1)
            return torch.stack([token, exact - token, kl, (log_q - log_p).amax(dim=1)], dim=1)

        zeros = torch.zeros(rollout.counted.numel(), dtype=torch.float64, device=rollout.counted.device)
        table, weights, worst, flops, forwards = zeros.repeat(3, 1), zeros, 0.0, 0, 0
        for start, inputs, chosen, view in self.parts(estimator):
            place = self.place(start, chosen, view)
            targets = view.targets.flatten()[chosen]
            scores = apply_head(
                self.model, inputs, chosen - self.spec.logits_shift, reduce, targets, truth[place]
            ).double()
            weight = view.weight.flatten()[chosen].double()
            worst = max(worst, scores[:, 3].max().item() if len(scores) else 0.0)
            table = table + torch.stack([zeros.index_add(0, place, c * weight) for c in scores[:, :3].unbind(1)])
            weights = weights + zeros.index_add(0, place, weight)
            rows, width = view.input_ids.shape
            flops += self.count_flops(rows, width, width, len(chosen))
            forwards += start == 0
        table, weights = table.view(3, *rollout.counted.shape), weights.view(rollout.counted.shape)
        total = weights.sum().clamp(min=1e-9)
        logp, gap, kl = (table.sum(dim=(1, 2)) / total).tolist()
        by_row = weights.sum(dim=1)
        kept = by_row > 0
        row_mean = table.sum(dim=2)[:, kept] / by_row[kept]
        divergence = (row_mean[1] * rollout.counted.sum(dim=1)[kept]).mean().item()
        # The rows' ratio estimator: the residuals of each row around the overall mean.
        residual = table[2].sum(dim=1)[kept] - kl * by_row[kept]
        rows = int(kept.sum())
        error = (residual.square().sum() * rows / max(1, rows - 1)).sqrt().item() / total.item()
        canvas_length = rollout.completion_ids.shape[1]
        return LikelihoodLine(
            name=name,
            logp=logp,
            gap=gap,
            divergence=divergence,
            bound=canvas_length * worst if isinstance(estimator, StepMerge | ExactTrajectory) else None,
            kl=kl,
            kl_error=error,
            forwards=forwards,
            flops=flops // len(rollout),
        )


def exact_estimator(decoding: str) -> Estimator:
    """The estimator that is exact for a way of decoding."""
    return AnyOrder() if decoding == "any_order" else ExactTrajectory()


def print_report(lines: list[LikelihoodLine], title: str, console=None) -> None:
    """The report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("estimator", no_wrap=True)
    for heading in ("log-prob", "gap", "D", "L·ε", "KL", "±", "forwards", "MFLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"

    for line in lines:
        table.add_row(
            line.name,
            number(line.logp),
            number(line.gap),
            number(line.divergence, 2),
            number(line.bound, 1),
            number(line.kl),
            number(line.kl_error),
            str(line.forwards),
            f"{line.flops / 1e6:.1f}",
        )
    (console or Console(width=100)).print(table)


def save_report(lines: list[LikelihoodLine], settings: dict, folder: str | Path) -> tuple[Path, Path]:
    """Write `likelihood.json` and `likelihood.png` to `folder`, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {**settings, "estimators": [asdict(line) for line in lines]}
    (folder / "likelihood.json").write_text(json.dumps(data, indent=2) + "\n")
    title = (
        f"Likelihood estimates of {settings['model']} on {settings.get('task') or settings.get('rollouts')}, "
        f"{settings['n']} completions\npoints: mean; bars: 95 % interval over completions"
    )
    return folder / "likelihood.json", plot_report(lines, folder / "likelihood.png", title)


def plot_report(lines: list[LikelihoodLine], path: str | Path, title: str = "") -> Path:
    """Draw the KL of each estimator, and what it costs, as a PNG; with 95 % intervals over the completions."""
    from .plots import COLORS, label_points, pyplot

    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullLocator

    size = (11, 0.35 * len(lines) + 2)
    figure, (left, right) = plt.subplots(1, 2, figsize=size, dpi=150, layout="constrained")
    names, cost, kl = zip(*((line.name, line.flops / 1e9, line.kl) for line in lines), strict=True)
    error = [1.96 * line.kl_error for line in lines]
    style = {"fmt": "o", "color": COLORS[0], "markersize": 4, "capsize": 2.5, "elinewidth": 1}
    left.errorbar(kl, range(len(lines)), xerr=error, **style)
    left.set(xlabel="KL(exact ‖ estimate), nats a token", xlim=(min(0, *kl) - 0.02 * max(kl), None))
    left.set_yticks(range(len(lines)), names)
    left.invert_yaxis()
    right.errorbar(cost, kl, yerr=error, **style)
    right.set(xscale="log", xlabel="GFLOPs a completion (counted)", ylabel="KL, nats a token")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(NullLocator())
    right.margins(x=0.25, y=0.08)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    bars = [
        (x, y + part * e) for x, y, e in zip(cost, kl, error, strict=True) for part in (-1, -0.75, -0.5, 0.5, 0.75, 1)
    ]
    label_points(right, list(zip(cost, kl, names, strict=True)), bars)
    figure.savefig(path)
    plt.close(figure)
    return Path(path)
