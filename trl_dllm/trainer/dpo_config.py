"""Settings of `DiffusionDPOTrainer`: TRL's, and what a diffusion model adds."""

from dataclasses import dataclass, field

from trl import DPOConfig

from ..fields import check_choice, check_kind, document_fields
from ..likelihood import ESTIMATORS, Elbo
from .settings import check_settings, name_checkpointing
from .stock import Refused, refuse, take_over


# TRL options that a bound of a sequence cannot follow, or that bypass the scorer: field -> (accepted values, why and
# what instead).
_REFUSED: Refused = {
    "use_weighting": (
        (False,),
        "it weighs a pair by the probabilities of its tokens, and the terms of a bound are none; leave it off",
    ),
    "disable_dropout": (
        (True,),
        "policy and reference, and the two passes of a step, are to be compared on the same draws, and dropout would "
        "add its own; leave it at True",
    ),
    "neftune_noise_alpha": ((None,), "noise of its own would come between them as dropout would; leave it unset"),
    "padding_free": ((False,), "flattened rows would attend to each other; turn it off"),
    "use_liger_kernel": (
        (False,),
        "it chooses its kernels by `model_type`, and has none for masked diffusion families; leave it off",
    ),
    "router_aux_loss_coef": ((None, 0, 0.0), "the scorer returns no load-balancing loss; leave it unset"),
}

# TRL's own, which it compares with these while it trains.
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Those that read the difference of the two answers' scores alone, or no score: the others have no f-divergence form.
_OF_THE_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")

_CHOICES = {
    "estimator": ("elbo", "coupled_elbo"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}
_ELSEWHERE = (*_REFUSED, "loss_type")


@document_fields(beyond=DPOConfig)
@dataclass
class DiffusionDPOConfig(DPOConfig):
    """
    Configuration of [`DiffusionDPOTrainer`].

    Includes every parameter of TRL's [`~trl.DPOConfig`] and the ones below. Options of TRL that do not apply are
    refused unless they have their default. Of TRL's own:

    - `loss_type` and `loss_weights` combine all of TRL's losses; with `loss_weights=[1.0, 0.05]` and
      `loss_type=["sigmoid", "sft"]` the second is minus the bound of the chosen answers, a token.
    - `ld_alpha` weighs the terms of tokens beyond the shorter answer, which in expectation are their share of the
      bound.
    - `precompute_ref_log_probs` fixes the draws: a row is masked alike in every epoch.
    """

    estimator: str = field(
        default="elbo",
        metadata={
            "help": "What stands for the log-probability of an answer: 'elbo', the evidence lower bound (VRPO), or "
            "'coupled_elbo', an average over complementary masks. An answer of a data set has no decoding trajectory, "
            "so the estimators that replay one do not apply.",
            "choices": list(_CHOICES["estimator"]),
        },
    )
    num_samples: int = field(
        default=8,
        metadata={
            "help": "Masks that are drawn for an answer, each of a masking level of its own (n_t of VRPO): forwards "
            "of the reference, and twice as many of the policy, whose memory does not grow with them."
        },
    )

    def __post_init__(self):
        self._check_trl()
        name_checkpointing(self)
        super().__post_init__()
        self.validate()

    def _check_trl(self) -> None:
        """Check types, ranges and choices of TRL's fields before TRL computes with them."""
        losses = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        check_kind("loss_type", losses, list[str])
        for loss in losses:
            check_choice("loss_type", loss, LOSSES)
        if not losses:
            raise ValueError("loss_type=[] names no loss; name at least one, such as ['sigmoid'].")
        if self.loss_weights is not None:
            check_kind("loss_weights", self.loss_weights, list[float])
            if len(self.loss_weights) != len(losses):
                raise ValueError(
                    f"loss_weights={self.loss_weights!r} must have one weight for each of loss_type={losses!r}."
                )
        check_settings(self, _ELSEWHERE, _CHOICES)

    def validate(self) -> None:
        """Check the diffusion settings and the TRL options that do not apply.

        Raises:
            ValueError: naming the field, its value and what would be right.
        """
        refuse(self, _REFUSED, "diffusion DPO")
        self.build_estimator()
        if self.beta == 0:
            raise ValueError(
                f"beta={self.beta!r} must be greater than 0: every loss of a pair would be constant or infinite. VRPO "
                "has 0.2."
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing!r} must be in [0, 0.5), a rate of wrong labels.")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} under loss_type='exo_pair', which takes its logarithm. Set "
                "1e-3."
            )
        other = [loss for loss in self.loss_type if loss not in _OF_THE_DIFFERENCE]
        if self.f_divergence_type != "reverse_kl" and other:
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} does not go with loss_type={other[0]!r}, which reads "
                f"more than the difference of a pair's rewards. Use {', '.join(_OF_THE_DIFFERENCE)}, or 'reverse_kl'."
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model=True and precompute_ref_log_probs=True contradict each other: what is computed once "
                "is of a reference that stays. Set one of them to False."
            )

    def build_estimator(self) -> Elbo:
        """The estimator that the settings name."""
        return ESTIMATORS[self.estimator](num_samples=self.num_samples)  # type: ignore[call-arg, return-value]

    def known_decoding(self) -> dict[str, object]:
        """What the training says of decoding: nothing. The trainer hands on what its model came with."""
        return {}

    @classmethod
    def from_stock(cls, args: DPOConfig) -> "DiffusionDPOConfig":
        """A stock DPOConfig with the diffusion fields at their defaults."""
        config = take_over(cls, DPOConfig, args)
        config._check_trl()
        config.validate()
        return config
