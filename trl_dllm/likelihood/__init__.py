"""How a completion's log-probs are computed: estimators, and the scorer that runs their views."""

from .score import TokenScores, check_estimator, score_view, token_logps
from .trajectory import ExactTrajectory, MeanField, StepMerge
from .view import Estimator, View, perturb_prompt


# The trainer's `estimator` names. A new estimator is a new file and a line here.
ESTIMATORS: dict[str, type[Estimator]] = {
    "mean_field": MeanField,
    "step_merge": StepMerge,
    "exact_trajectory": ExactTrajectory,
}

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "ExactTrajectory",
    "MeanField",
    "StepMerge",
    "TokenScores",
    "View",
    "check_estimator",
    "perturb_prompt",
    "score_view",
    "token_logps",
]
