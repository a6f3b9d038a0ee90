"""Settings of `DiffusionSFTTrainer`: TRL's, and what a diffusion model adds."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from .settings import check_settings, name_checkpointing
from .stock import Refused, refuse, take_over


# TRL options that the diffusion loss would ignore or that contradict it: field -> (accepted values, reason).
_REFUSED: Refused = {
    "packing": ((False,), "packed rows would attend to each other, as attention has no direction; turn it off"),
    "eval_packing": ((None, False), "packed rows would attend to each other; leave it unset"),
    "padding_free": ((False,), "flattened rows would attend to each other; turn it off"),
    "assistant_only_loss": ((False,), "an answer is one stretch at the end of its row; give prompt/completion rows"),
    "loss_type": (("nll",), "the loss is the objective's cross-entropy; leave it at 'nll'"),
    "label_smoothing_factor": ((0, 0.0), "the loss reads log-probs of single tokens, not logits; leave it at 0"),
    "average_tokens_across_devices": ((True,), "the loss is the mean over all processes' rows; leave it at True"),
    "use_liger_kernel": ((False,), "it replaces the forward that the scorer runs its own head in; leave it off"),
    "router_aux_loss_coef": ((None, 0, 0.0), "the scorer returns no load-balancing loss; leave it unset"),
}

_CHOICES = {"objective": ("masked_diffusion", "any_order"), "loss_weight": ("1/t", "none")}


@dataclass
class DiffusionSFTConfig(SFTConfig):
    """
    Configuration of [`DiffusionSFTTrainer`].

    Includes every parameter of TRL's [`~trl.SFTConfig`] (`max_length` cuts prompt and answer together, before the
    answer is filled with EOS) and the following ones. Options of TRL that do not apply are refused unless they have
    their default.

    objective (`str`, *optional*, defaults to `"masked_diffusion"`):
        What is trained: `"masked_diffusion"` (LLaDA Algorithm 2, d1's SFT), or `"any_order"`, which makes an any-order
        model of a denoiser (d2 Eq. 73): random order within each block of `block_length` (32 if not set), blocks left
        to right, each token predicted from those before it.
    loss_weight (`str`, *optional*, defaults to `"1/t"`):
        What a masked token's cross-entropy counts for, before it is divided by the answer's length: `"1/t"`, a bound
        on the negative log-likelihood, or `"none"`, 1, which has less variance and suits small models.
    mask_eps (`float`, *optional*, defaults to `1e-3`):
        Smallest masking rate: t is uniform in [mask_eps, 1). At 1.0 every answer token is masked.
    canvas_length (`int`, *optional*):
        Tokens that each answer is filled up to with EOS, which are targets as well; set it to the canvas that will be
        generated. A longer answer is kept whole. `None` fills to a multiple of `block_length` if that is set, and else
        adds no more than the one EOS that ends an answer.
    block_length (`int`, *optional*):
        Answers are filled with EOS to a multiple of this many tokens.
    trainable_modules (`list[str]`, *optional*):
        Train only the modules whose name ends with one of these (`["q_proj", "k_proj", "v_proj"]`) and freeze the
        rest. `None` trains all of them, or with `objective="any_order"` d2's q, k and v projections; `["all"]` trains
        all of them in any case.
    """

    objective: str = field(
        default="masked_diffusion",
        metadata={
            "help": "What is trained: 'masked_diffusion' or 'any_order'.",
            "choices": list(_CHOICES["objective"]),
        },
    )
    loss_weight: str = field(
        default="1/t",
        metadata={
            "help": "What a masked token's cross-entropy counts for, before it is divided by the answer's length: "
            "'1/t', a bound on the negative log-likelihood, or 'none', 1, which has less variance.",
            "choices": list(_CHOICES["loss_weight"]),
        },
    )
    mask_eps: float = field(
        default=1e-3,
        metadata={
            "help": "Smallest masking rate: t is uniform in [mask_eps, 1). At 1.0 every answer token is masked."
        },
    )
    canvas_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that each answer is filled up to with EOS, which are targets as well. A longer answer is "
            "kept whole. None fills to a multiple of block_length if that is set, and else adds no more than one EOS."
        },
    )
    block_length: int | None = field(
        default=None, metadata={"help": "Answers are filled with EOS to a multiple of this many tokens."}
    )
    trainable_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Train only the modules whose name ends with one of these and freeze the rest. None trains all of "
            "them, or q, k and v with the any_order objective; ['all'] trains all of them in any case."
        },
    )

    def __post_init__(self):
        check_settings(self, _REFUSED, _CHOICES)
        name_checkpointing(self)
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """Check the diffusion settings and the TRL options that do not apply.

        Raises:
            ValueError: naming the field, its value and what would be right.
        """
        refuse(self, _REFUSED, "diffusion SFT")
        if not 0 < self.mask_eps <= 1:
            raise ValueError(f"mask_eps={self.mask_eps} must be in (0, 1]; LLaDA uses 1e-3.")
        for name in ("canvas_length", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token, or None.")
        if self.canvas_length and self.block_length and self.canvas_length % self.block_length:
            below = self.canvas_length // self.block_length * self.block_length
            raise ValueError(
                f"canvas_length={self.canvas_length} is not a multiple of block_length={self.block_length}; use "
                f"{below + self.block_length}{f' or {below}' if below else ''}."
            )
        if self.objective == "any_order" and self.block_length is None:
            self.block_length = math.gcd(32, self.canvas_length or 32)
        if isinstance(self.trainable_modules, str) or self.trainable_modules == []:
            raise ValueError(
                f"trainable_modules={self.trainable_modules!r} must be a list of at least one module name, such as "
                "['q_proj', 'k_proj', 'v_proj'], or None to train everything."
            )

    def known_decoding(self) -> dict[str, object]:
        """What is saved beside a trained model of how it is to be decoded: as far as the training says."""
        known: dict[str, object] = {"max_new_tokens": self.canvas_length, "block_length": self.block_length}
        if self.objective == "any_order":
            known |= {"decoding": "any_order", "cache": "exact"}
        return {name: value for name, value in known.items() if value is not None}

    @classmethod
    def from_stock(cls, args: SFTConfig) -> "DiffusionSFTConfig":
        """A stock SFTConfig with the diffusion fields at their defaults."""
        config = take_over(cls, SFTConfig, args)
        check_settings(config, _REFUSED, _CHOICES)
        config.validate()
        return config
