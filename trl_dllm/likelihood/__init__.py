"""How a completion's log-probs are computed: estimators, and the scorer that runs their views."""

from ..noise import Purpose, random_ranks, uniform
from .any_order import AnyOrder
from .elbo import CoupledElbo, Elbo
from .plan import Plan, compact, counted_view
from .pseudo import BlockPseudoLikelihood, PseudoLikelihood, TrajectoryPseudoLikelihood
from .score import Reference, TokenScores, assembled, check_estimator, score_view, token_logps
from .spg import SandwichedBounds
from .trajectory import ExactTrajectory, MeanField, SampledTrajectory, StepMerge, segment_view
from .view import Estimator, View, canvas_view, perturb_prompt


# The trainer's `estimator` names, beside which it takes the path of any other `Estimator` (docs/extending.md).
ESTIMATORS: dict[str, type[Estimator]] = {
    "mean_field": MeanField,
    "step_merge": StepMerge,
    "exact_trajectory": ExactTrajectory,
    "agrpo": SampledTrajectory,
    "any_order": AnyOrder,
    "pkl": PseudoLikelihood,
    "pkl_u": BlockPseudoLikelihood,
    "pkl_t": TrajectoryPseudoLikelihood,
    "elbo": Elbo,
    "coupled_elbo": CoupledElbo,
    "spg": SandwichedBounds,
}

__all__ = [
    "ESTIMATORS",
    "AnyOrder",
    "BlockPseudoLikelihood",
    "CoupledElbo",
    "Elbo",
    "Estimator",
    "ExactTrajectory",
    "MeanField",
    "Plan",
    "PseudoLikelihood",
    "Purpose",
    "Reference",
    "SampledTrajectory",
    "SandwichedBounds",
    "StepMerge",
    "TokenScores",
    "TrajectoryPseudoLikelihood",
    "View",
    "assembled",
    "canvas_view",
    "check_estimator",
    "compact",
    "counted_view",
    "perturb_prompt",
    "random_ranks",
    "score_view",
    "segment_view",
    "token_logps",
    "uniform",
]
