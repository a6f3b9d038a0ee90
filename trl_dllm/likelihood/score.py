"""Running views through a model: per-token log-probs and entropies of a rollout's completions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from ..models import MaskedDiffusionSpec, apply_head, entropy, log_probs, restrict, view_inputs
from ..rollout import Rollout
from .plan import Plan, compact
from .view import IGNORE, Estimator, View


# Runs a reference model: (model inputs, rows) -> its hidden states at those rows (n, H), and its head.
Reference = Callable[[dict, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class TokenScores:
    """What an estimator says of each completion token.

    Args:
        logps (`Tensor` of shape (B, L)): log-probs in nats, 0 where not scored.
        entropies (`Tensor` of shape (B, L)): entropies in nats of the distributions that were scored, weighted like
            the log-probs; 0 elsewhere.
        scored (`Tensor` of shape (B, L), bool): positions that the estimator gave a log-prob to.
        kls (`Tensor` of shape (B, L), *optional*): KL divergences in nats from a reference's distributions, over the
            whole vocabulary and weighted like the log-probs; None without a reference.
    """

    logps: Tensor
    entropies: Tensor
    scored: Tensor
    kls: Tensor | None = None

    def __add__(self, other: "TokenScores") -> "TokenScores":
        kls = None if self.kls is None or other.kls is None else self.kls + other.kls
        return TokenScores(self.logps + other.logps, self.entropies + other.entropies, self.scored | other.scored, kls)

    @staticmethod
    def sum(parts: Iterable["TokenScores"]) -> "TokenScores":
        """Scores of all views together; there is at least one."""
        return reduce(add, parts)

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenScores":
        """The same with `function` applied to each of the real-valued tables."""
        kls = None if self.kls is None else function(self.kls)
        return TokenScores(function(self.logps), function(self.entropies), self.scored, kls)

    @property
    def tables(self) -> list[Tensor]:
        """The real-valued tables: log-probs, entropies and, with a reference, KLs."""
        return [self.logps, self.entropies] + ([] if self.kls is None else [self.kls])


def score_view(
    model: nn.Module,
    view: View,
    canvas_length: int,
    spec: MaskedDiffusionSpec,
    temperature: float = 1.0,
    differentiable_entropy: bool = False,
    reference: Reference | None = None,
    support: Tensor | None = None,
    owner: Tensor | None = None,
    rows: int | None = None,
) -> TokenScores:
    """Score one view in one forward; what a position is given by several rows is summed.

    The log-probs and KLs carry gradients where they are enabled; the entropies only if `differentiable_entropy`.

    Args:
        model (`nn.Module`): the policy.
        view (`View`): M rows.
        canvas_length (`int`): L.
        spec (`MaskedDiffusionSpec`): of the model.
        temperature (`float`): logits are divided by it.
        differentiable_entropy (`bool`): let gradients flow through the entropies.
        reference (`Reference`, *optional*): run on the same view without gradients; its logits are made a tile at a
            time beside the model's.
        support (`Tensor` of shape (B, L, K), *optional*): tokens that all distributions are among.
        owner (`Tensor` of shape (M,), int64, *optional*): the row of the result that each row of the view is of; None
            where they are the same.
        rows (`int`, *optional*): B, rows of the result; None takes M.

    Returns:
        `TokenScores`, (B, L) each.
    """
    if spec.blocks is not None and view.attention.reach is None:
        raise ValueError(
            f"block_size={spec.block_size}, and the view lets every row see every column: masks of one block would be "
            "read by later ones, which such a model never does. Build views by canvas_view, or bring their attention."
        )
    width, rows = view.input_ids.shape[1], len(view.input_ids) if rows is None else rows
    chosen = (view.targets != IGNORE).flatten().nonzero().squeeze(1)
    inputs = view_inputs(model, view)
    rows_scored = chosen - spec.logits_shift
    hidden, project = (None, None) if reference is None else reference(inputs, rows_scored)

    def statistics(logits: Tensor, target: Tensor, *args: Tensor) -> Tensor:
        tokens = None if support is None else args[0]

        def distribution(logits: Tensor) -> Tensor:
            log_p = log_probs(logits, spec.mask_token_id, temperature)
            return log_p if tokens is None else restrict(log_p, tokens)

        log_p = distribution(logits)
        place = target if tokens is None else (tokens == target[:, None]).long().argmax(dim=1)
        token = log_p.gather(1, place[:, None]).squeeze(1)
        columns = [token, entropy(log_p if differentiable_entropy else log_p.detach())]
        if project is not None:
            with torch.no_grad():
                log_q = distribution(project(args[-1]))
            columns.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        return torch.stack(columns, dim=1)

    # In a shifted family the row before a position predicts it. Targets stand behind at least one prompt token
    # there (see `token_logps`), so the row before never belongs to the previous sequence.
    row = chosen // width if owner is None else owner[chosen // width]
    place = row * canvas_length + view.index.flatten()[chosen]
    row_args = [view.targets.flatten()[chosen]]
    if support is not None:
        row_args.append(support.flatten(0, 1)[place])
    if hidden is not None:
        row_args.append(hidden)
    scores = apply_head(model, inputs, rows_scored, statistics, *row_args, keep=reference is None)
    scores = scores * view.weight.flatten()[chosen, None].to(scores.dtype)
    # index_put with accumulation, so that a position scored at several rows of a view is summed.
    table = scores.new_zeros(rows * canvas_length, scores.shape[1])
    table = table.index_put((place,), scores, accumulate=True).view(rows, canvas_length, -1)
    scored = torch.zeros(rows * canvas_length, dtype=torch.bool, device=place.device).index_fill(0, place, True)
    kls = None if reference is None else table[..., 2]
    return TokenScores(table[..., 0], table[..., 1], scored.view(rows, canvas_length), kls)


def assembled(plan: Plan, scores: TokenScores) -> TokenScores:
    """What the scores of a plan's forwards, added up, stand for: (B, L) each."""
    estimator, rollout = plan.estimator, plan.rollout
    logps = scores.logps
    if estimator.apart:
        views = (-1, *rollout.counted.shape)
        logps, scored = logps.view(views), scores.scored.view(views).any(dim=0)
        scores = replace(scores.map(lambda table: table.view(views).sum(dim=0)), scored=scored)
    return replace(scores, logps=estimator.assemble(logps, rollout, plan.seeds, plan.iteration))


def check_estimator(estimator: Estimator, rollout: Rollout, spec: MaskedDiffusionSpec) -> None:
    """Raise ValueError where the model family cannot answer for the estimator or the rollout."""
    estimator.check(spec)
    if spec.blocks != (rollout.blocks if rollout.blocks is None or rollout.blocks.causal else None):
        raise ValueError(
            f"blocks={rollout.blocks} in the rollout, {spec.blocks} in the model: they do not belong together. Draw "
            "the rollout with this model, or say how it was drawn: dataclasses.replace(rollout, blocks=spec.blocks)."
        )
    if rollout.support is not None and not estimator.replays:
        raise ValueError(
            f"{type(estimator).__name__} scores other distributions than the sampler drew from, and which of their "
            "tokens top_k, top_p and min_p would leave is not known. Draw without them, or score with step_merge."
        )
    if spec.mask_token_id != rollout.mask_token_id:
        raise ValueError(
            f"mask_token_id={rollout.mask_token_id} in the rollout, {spec.mask_token_id} in the model: they do not "
            "belong together. Draw the rollout with this model, or pass the spec that it was drawn with."
        )
    if spec.logits_shift and not rollout.prompt_mask.any(dim=1).all():
        raise ValueError(
            f"logits_shift={spec.logits_shift}: this family predicts a position at the row before it, so every row "
            "needs a prompt of at least one token (a BOS token will do)."
        )


def token_logps(
    model: nn.Module,
    rollout: Rollout,
    estimator: Estimator,
    temperature: float | None = None,
    seeds: Tensor | None = None,
    iteration: int = 0,
    p_mask_prompt: float = 0.0,
    batch_size: int | None = None,
    spec: MaskedDiffusionSpec | None = None,
    differentiable_entropy: bool = False,
) -> TokenScores:
    """Per-token log-probs of a rollout's completions under `model`, as `estimator` defines them.

    Works on a plain model outside any trainer and on a wrapped one. Gradients flow if they are enabled, through all
    views at once; the trainer takes one view at a time instead.

    Args:
        model (`nn.Module`): a masked diffusion model.
        rollout (`Rollout`): B rows of L canvas positions.
        estimator (`Estimator`): which likelihood.
        temperature (`float`, *optional*): logits are divided by it; None takes the rollout's own (1 if that is 0).
        seeds (`Tensor` of shape (B,), int64, *optional*): row seeds of random views; None takes the rollout's
            `view_seed`.
        iteration (`int`): inner iteration; random views are drawn anew in each.
        p_mask_prompt (`float`): probability with which a prompt token is masked (for likelihoods only).
        batch_size (`int`, *optional*): rows a forward; None runs all rows at once.
        spec (`MaskedDiffusionSpec`, *optional*): read from the model's config if not given.
        differentiable_entropy (`bool`): let gradients flow through the entropies.

    Returns:
        `TokenScores`, (B, L) each. Costs `estimator.num_views(rollout)` forwards a row, less those that score nothing.

    Raises:
        ValueError: the estimator does not apply to the model family, or rollout and model disagree on the mask token.
    """
    spec = spec or MaskedDiffusionSpec.from_model(model)
    check_estimator(estimator, rollout, spec)
    temperature = rollout.temperature if temperature is None else temperature
    canvas_length = rollout.completion_ids.shape[1]
    plan = Plan(estimator, rollout, iteration, batch_size or len(rollout), p_mask_prompt, seeds)
    parts = []
    for number in range(max(1, len(plan))):
        view, owner = plan[number]
        part = score_view(
            model,
            compact(view),
            canvas_length,
            spec,
            temperature,
            differentiable_entropy,
            support=rollout.support,
            owner=owner,
            rows=plan.num_rows,
        )
        parts.append(part)
    scores = assembled(plan, TokenScores.sum(parts))
    return replace(scores, scored=estimator.scored(rollout, plan.seeds, iteration) & rollout.counted)
