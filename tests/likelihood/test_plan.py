"""What nobody counts is not run (docs/methods.md §2.7, identity 13), against all views on all columns."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CANVAS,
    ELBO,
    MASK,
    PKL,
    PKL_UNSHIFTED,
    PROMPTS,
    SEEDS,
    SHIFT,
    TRAJECTORY,
    assert_same_scores,
    rollout_for_tests,
    sample,
)
from oracles import random_rollout

from trl_dllm.likelihood import (
    AnyOrder,
    ExactTrajectory,
    MeanField,
    Plan,
    PseudoLikelihood,
    StepMerge,
    TokenScores,
    TrajectoryPseudoLikelihood,
    compact,
    counted_view,
    score_view,
    token_logps,
)
from trl_dllm.likelihood.view import IGNORE
from trl_dllm.models import MaskedDiffusionSpec


UNSHIFTED = {"any_order", *PKL_UNSHIFTED}
ALL = {**TRAJECTORY, **PKL, **PKL_UNSHIFTED, **ELBO}


def cases():
    return [(family, name) for family in SHIFT for name in ALL if not (SHIFT[family] and name in UNSHIFTED)]


def everything(model, estimator, rollout, p_mask_prompt=0.0) -> TokenScores:
    """The slow, obvious version: each view of all rows in a forward of its own, with every column."""
    spec = MaskedDiffusionSpec.from_model(model)
    rollout = Plan(estimator, rollout, 2, len(rollout), p_mask_prompt).rollout
    views = [counted_view(estimator, rollout, n, rollout.view_seed, 2) for n in range(estimator.num_views(rollout))]
    parts = [score_view(model, view, CANVAS, spec, 0.7) for view in views]
    scores = TokenScores.sum(parts)
    logps = torch.stack([part.logps for part in parts]) if estimator.apart else scores.logps
    return replace(scores, logps=estimator.assemble(logps, rollout, rollout.view_seed, 2))


def gradients(model, scores) -> list[torch.Tensor]:
    weight = torch.randn(scores.logps.shape, generator=torch.Generator().manual_seed(0), dtype=scores.logps.dtype)
    return torch.autograd.grad((weight * scores.logps).sum(), list(model.parameters()))


@pytest.mark.parametrize(("family", "name"), cases())
def test_identity_13_scores_and_gradients_are_those_of_everything(models, family, name):
    model, estimator = models(family), ALL[name]
    rollout = replace(rollout_for_tests(width=9), advantages=torch.tensor([1.0, -1.0, -0.5, 0.0, -2.0]))
    want = everything(model, estimator, rollout, 0.3)
    for size in (1, 3, 5):
        got = token_logps(model, rollout, estimator, temperature=0.7, iteration=2, p_mask_prompt=0.3, batch_size=size)
        assert_same_scores(replace(got, scored=want.scored), want, atol=1e-9)
    for a, b in zip(gradients(model, got), gradients(model, want), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [2, 5])
def test_pairs_that_score_something_are_run_once(name, size):
    estimator, rollout = ALL[name], rollout_for_tests(seed=3)
    plan = Plan(estimator, rollout, 0, size)
    views = [counted_view(estimator, rollout, n, rollout.view_seed, 0) for n in range(estimator.num_views(rollout))]
    needed = [
        (ids.tolist(), targets.tolist())
        for view in views
        for ids, targets in zip(view.input_ids, view.targets, strict=True)
        if (targets != IGNORE).any()
    ]
    run = []
    for number in range(len(plan)):
        view, owner = plan[number]
        assert len(view.input_ids) == len(owner) == (size if number < len(plan) - 1 else len(owner)) <= size
        run += [(ids.tolist(), targets.tolist()) for ids, targets in zip(view.input_ids, view.targets, strict=True)]
        for ids, row in zip(view.input_ids, owner, strict=True):
            prompt = rollout.prompt_ids[row % len(rollout)]
            assert torch.equal(ids[: len(prompt)], prompt), "a row that is not its owner's"
    assert run == needed and plan.num_pairs == len(run)


def test_a_row_that_stopped_early_has_segments_that_are_not_run():
    rollout = rollout_for_tests(num_steps=(9, 9, 9, 9, 9))
    counted = rollout.counted & (rollout.unmask_step < torch.tensor([9, 3, 3, 1, 9])[:, None])
    rollout = replace(rollout, counted=counted, steps=9)
    assert Plan(StepMerge(9), rollout, 0, 1).num_pairs == sum(
        len(set(steps[keep].tolist())) for steps, keep in zip(rollout.unmask_step, counted, strict=True)
    )
    assert Plan(MeanField(), rollout, 0, 2).num_pairs == counted.any(dim=1).sum() < 5


def test_rows_can_be_skipped_and_a_forward_beyond_the_last_scores_nothing(models):
    model, rollout = models("llada"), rollout_for_tests()
    skipped = torch.tensor([True, False, True, False, True])
    plan = Plan(StepMerge(3), rollout, 0, 2, skipped=skipped)
    owners = {int(row) for number in range(len(plan)) for row in plan[number][1]}
    assert owners == {1, 3}
    spec = MaskedDiffusionSpec.from_model(model)
    view, owner = plan[len(plan) + 4]
    assert view.num_targets == 0 and owner.tolist() == [0]
    scores = score_view(model, compact(view), CANVAS, spec, owner=owner, rows=5)
    assert not scores.logps.any() and not scores.scored.any() and scores.logps.requires_grad
    nothing = Plan(StepMerge(3), rollout, 0, 2, skipped=torch.ones(5, dtype=torch.bool))
    assert len(nothing) == 0 and nothing[0][0].num_targets == 0


# --------------------------------------------------------------------------------------------------------- the columns


def reached(view) -> torch.Tensor:
    """Columns that a scored row sees, directly or through others, by walking; bool (B, S)."""
    allowed, out = view.attention.allowed(), view.targets != IGNORE
    for row in range(len(out)):
        found = set(out[row].nonzero().flatten().tolist())
        queue = list(found)
        while queue:
            for column in allowed[row, queue.pop()].nonzero().flatten().tolist():
                if column not in found:
                    found.add(column)
                    queue.append(column)
        out[row, list(found)] = True
    return out


@pytest.mark.parametrize("name", sorted(UNSHIFTED))
@pytest.mark.parametrize("seed", range(4))
def test_columns_are_those_that_are_reached(name, seed):
    estimator, rollout = ALL[name], rollout_for_tests(seed=seed, width=9)
    for n in range(estimator.num_views(rollout)):
        view = counted_view(estimator, rollout, n, rollout.view_seed, 0)
        keep = reached(view)
        small = compact(view)
        assert small.input_ids.shape[1] == max(1, int(keep.sum(dim=1).max()))
        for row in range(len(keep)):
            number = int(keep[row].sum())
            for field in ("input_ids", "position_ids", "targets", "index", "weight"):
                assert torch.equal(getattr(small, field)[row, :number], getattr(view, field)[row, keep[row]]), field
            assert (small.targets[row, number:] == IGNORE).all()
            # What is kept sees the same, and nothing sees what fills up.
            allowed, want = small.attention.allowed()[row], view.attention.allowed()[row]
            assert torch.equal(allowed[:number, :number], want[keep[row]][:, keep[row]])
            assert not allowed[:number, number:].any()


def test_any_order_runs_twice_the_counted_positions():
    """P + 2·counted where what is counted was revealed first, as up to an EOS in blocks."""
    rollout = random_rollout(MASK, 101, 0, canvas=12, prompt_lengths=(5, 5), num_steps=(12, 12))
    order = torch.arange(12).expand(2, -1)
    tokens = torch.where(rollout.revealed, rollout.completion_ids, 7)
    rollout = replace(rollout, unmask_step=order, completion_ids=tokens, counted=order < torch.tensor([[6], [4]]))
    view, _ = Plan(AnyOrder(), rollout, 0, 2)[0]
    assert compact(view).input_ids.shape[1] == 5 + 2 * 6 - 1  # the last counted token is seen by nobody
    view, _ = Plan(TrajectoryPseudoLikelihood("bidirectional"), rollout, 0, 2)[0]
    assert compact(view).input_ids.shape[1] == 5 + 12 + 6, "bidirectional rows see every token"


def test_left_padding_that_all_rows_have_is_cut():
    rollout = rollout_for_tests(width=12)
    view, owner = Plan(StepMerge(3), rollout, 0, 2)[0]
    longest = int(rollout.prompt_mask[owner].sum(dim=1).max())
    small = compact(view)
    assert small.input_ids.shape[1] == longest + CANVAS < 12 + CANVAS
    assert torch.equal(small.input_ids, view.input_ids[:, 12 - longest :])
    assert torch.equal(small.attention.level, view.attention.level[:, 12 - longest :])
    assert compact(small) is small


# -------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("segments", [1, 3, 4, 12])
def test_identity_15_stopping_at_the_eos_changes_no_counted_log_prob(models, family, segments):
    """Under a fixed schedule T is the schedule's: a row that stopped is cut where the whole canvas is."""
    settings = {"diffusion_steps": 12, "block_length": 3, "temperature": 1.0}
    eos = int(sample(models(family), **settings).completion_ids[1, 1])
    whole, stopped = (
        sample(models(family), PROMPTS, SEEDS, stop_at_eos=stop, eos_token_ids=(eos,), **settings)
        for stop in (False, True)
    )
    assert torch.equal(whole.counted, stopped.counted) and not stopped.revealed.all()
    assert stopped.num_steps.min() < 12 and stopped.steps == whole.steps == 12
    estimators = [StepMerge(segments), MeanField(), ExactTrajectory()]
    with torch.no_grad():
        for estimator in estimators:
            found, want = (token_logps(models(family), rollout, estimator).logps for rollout in (stopped, whole))
            torch.testing.assert_close(found, want, atol=1e-9, rtol=0)
    early = Plan(StepMerge(12), stopped, 0, 1).num_pairs
    assert early == Plan(StepMerge(12), whole, 0, 1).num_pairs == int(whole.counted.sum())
    assert Plan(PseudoLikelihood(), stopped, 0, 1).num_pairs == early


def test_a_threshold_has_no_schedule(models):
    rollout = sample(models("llada"), confidence_threshold=0.3, temperature=1.0)
    assert rollout.steps is None and torch.equal(rollout.scheduled_steps, rollout.num_steps)


# ------------------------------------------------------------------------------------------ weights that do not add up


class Weighing(PseudoLikelihood):
    """Weighs itself what its superclass has the trainer weigh."""

    def view(self, rollout, n, seeds, iteration):
        view = super().view(rollout, n, seeds, iteration)
        return replace(view, weight=view.weight * 4)


class Silent(PseudoLikelihood):
    """Leaves positions out and does not say so."""

    def sub_samples(self, canvas_length):
        return False


class OtherDraw(PseudoLikelihood):
    """Says that it scores what another iteration would."""

    def scored(self, rollout, seeds, iteration):
        return super().scored(rollout, seeds, iteration + 1)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            OtherDraw(2),
            r"OtherDraw: (view|scored) has position \d of row \d among those that are scored, and .* has not",
        ),
        (Weighing(2), r"Weighing: the weights of .* sum to 4 .* it says sub_samples: .* return .* sampling_weights"),
        (Silent(2), r"Silent: the weights of position \d of row \d sum to 0 .* sub_samples return True"),
        (Weighing(), r"Weighing: the weights of position 0 of row 0 sum to 4 .* per_token = False"),
    ],
)
def test_positions_are_weighted_once(models, estimator, message):
    with pytest.raises(ValueError, match=message):
        token_logps(models("llada"), rollout_for_tests(), estimator)


def test_numbers_of_the_row_may_be_weighted_at_will(models):
    estimator = Weighing(2)
    estimator.per_token = False
    with torch.no_grad():
        scores = token_logps(models("llada"), rollout_for_tests(), estimator)
        plain = token_logps(models("llada"), rollout_for_tests(), PseudoLikelihood(2))
    torch.testing.assert_close(scores.logps, 4 * plain.logps)
