"""How a completion's log-probs are computed: estimators, and the scorer that runs their views."""

from .any_order import AnyOrder
from .elbo import CoupledElbo, Elbo
from .plan import Plan, compact, counted_view
from .pseudo import BlockPseudoLikelihood, PseudoLikelihood, TrajectoryPseudoLikelihood
from .score import Reference, TokenScores, check_estimator, score_view, token_logps
from .trajectory import ExactTrajectory, MeanField, StepMerge
from .view import Estimator, View, perturb_prompt


# The trainer's `estimator` names. A new estimator is a new file and a line here.
ESTIMATORS: dict[str, type[Estimator]] = {
    "mean_field": MeanField,
    "step_merge": StepMerge,
    "exact_trajectory": ExactTrajectory,
    "any_order": AnyOrder,
    "pkl": PseudoLikelihood,
    "pkl_u": BlockPseudoLikelihood,
    "pkl_t": TrajectoryPseudoLikelihood,
    "elbo": Elbo,
    "coupled_elbo": CoupledElbo,
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
    "Reference",
    "StepMerge",
    "TokenScores",
    "TrajectoryPseudoLikelihood",
    "View",
    "check_estimator",
    "compact",
    "counted_view",
    "perturb_prompt",
    "score_view",
    "token_logps",
]
