"""Settings of `DiffusionGRPOTrainer`: TRL's, and what a diffusion model adds."""

import inspect
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

from trl import GRPOConfig

from ..generation import DiffusionGenerationConfig, resolve_schedule
from ..likelihood import ESTIMATORS, Estimator
from ..models import PaperFlops, paper_flops
from ..rollout import Rollout
from .stock import Refused, refuse, take_over


# TRL options that a diffusion sampler would silently ignore, or that bypass it: field -> (accepted values, why and
# what instead).
_REFUSED: Refused = {
    "use_vllm": ((False,), "vLLM samples autoregressively; completions are drawn by masked diffusion decoding"),
    "use_transformers_continuous_batching": ((False,), "it samples autoregressively; leave it off"),
    "use_transformers_paged": ((False,), "it samples autoregressively; leave it off"),
    "generation_kwargs": (
        (None, {}),
        "they configure autoregressive `generate`; use block_length, diffusion_steps, remasking, …",
    ),
    "cache_implementation": ((None,), "it configures the autoregressive cache; use `cache`"),
    "top_p": (
        (1.0, None),
        "truncated sampling would draw from another distribution than the one that is scored; use temperature",
    ),
    "top_k": (
        (0, None),
        "truncated sampling would draw from another distribution than the one that is scored; use temperature",
    ),
    "min_p": (
        (None, 0.0),
        "truncated sampling would draw from another distribution than the one that is scored; use temperature",
    ),
    "repetition_penalty": ((1.0, None), "it changes the sampled distribution but not the scored one; leave it at 1.0"),
    "use_liger_kernel": (
        (False,),
        "it replaces the model's forward, which the scorer runs its own head in; leave it off",
    ),
    "router_aux_loss_coef": ((None, 0.0), "the scorer does not return a load-balancing loss; leave it at 0"),
    "cfg_scale": ((0.0,), "the scorer does not follow guidance; use it for generation and evaluation only"),
}


@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """
    Configuration of [`DiffusionGRPOTrainer`].

    Includes every parameter of TRL's [`~trl.GRPOConfig`] (`max_completion_length` is the canvas length L;
    `disable_dropout` defaults to `True`, because dropout makes the first ratio differ from 1) and the following ones.

    > Parameters that control the likelihood

    estimator (`str`, *optional*, defaults to `"step_merge"`):
        Which likelihood the loss is computed from: `"mean_field"` (d1), `"step_merge"` (d2), `"exact_trajectory"`,
        `"any_order"` (d2, for any-order decoding), `"pkl"`, `"pkl_u"` or `"pkl_t"` (PADRE), `"elbo"` or
        `"coupled_elbo"`.
    num_segments (`int`, *optional*):
        N of `"step_merge"`: canvases the trajectory is replayed on. `None` takes 8, or the number of decoding steps if
        that is smaller.
    estimator_kwargs (`dict[str, Any]`, *optional*):
        Further arguments of the estimator's constructor.
    p_mask_prompt (`float`, *optional*, defaults to `0.0`):
        Probability with which a prompt token is masked when log-probs are computed (d1, d2 and PADRE: 0.15).
    redraw_views (`bool`, *optional*, defaults to `True`):
        Whether whatever is random in a likelihood is drawn anew in each inner iteration.
    score_temperature (`float`, *optional*):
        Temperature that log-probs are computed at. `None` takes the sampling temperature, so that a token is scored
        under the distribution that it was drawn from; the published d1 and d2 runs score at 1.0.
    loss_tokens (`str`, *optional*, defaults to `"eos"`):
        Tokens that the loss counts: `"eos"`, those up to and including the first EOS, or `"canvas"`, all that were
        revealed.

    > Parameters that control the loss

    loss_type (`str`, *optional*):
        TRL's, or `"wd1"`: -Σ_i w⁺_i log π(y_i) + Σ_i w⁻_i log π(y_i) over each group, w± = softmax(±A), averaged over
        groups and divided by the canvas length; no ratio, no reference and no old log-probs.
    ratio_denominator (`str`, *optional*, defaults to `"old"`):
        Policy in the denominator of the importance ratio: `"old"`, the policy that drew the rollouts, or `"ref"`, the
        reference (PADRE Eq. 14 and Algorithm 1 line 8 as printed); the reference is then loaded at `beta=0` too.
    kl_estimator (`str`, *optional*, defaults to `"k3"`):
        The KL term of each token: `"k3"` (TRL's; d2 Eq. 70), from the sampled token, or `"full"`,
        D_KL(π_θ(·|view) ‖ π_ref(·|view)) summed over the vocabulary (PADRE), with the reference run on the same views.
        `use_bias_correction_kl` does not apply to `"full"`.
    old_logps (`str`, *optional*, defaults to `"recompute"`):
        Where the old policy's log-probs come from: `"recompute"` scores the rollouts again, `"rollout"` takes the
        sampler's own, which saves a forward a view. Only where the estimator is exact for the decoder, at the sampling
        temperature and with an unmasked prompt.

    > Parameters that control decoding

    decoding (`str`, *optional*, defaults to `"denoising"`):
        How completions are drawn: `"denoising"`, or `"any_order"` for a model trained with any-order attention.
    block_length (`int`, *optional*):
        Positions in a block; blocks are decoded left to right. `None` takes the largest divisor of the canvas up to
        32.
    diffusion_steps (`int`, *optional*):
        Decoding steps for the whole canvas. `None` takes half the canvas (two tokens a step).
    tokens_per_step (`int`, *optional*):
        Tokens revealed a step; another way to give `diffusion_steps`.
    remasking (`str`, *optional*, defaults to `"low_confidence"`):
        Which drawn tokens are kept: `"low_confidence"`, `"margin"`, `"entropy"`, `"random"` or `"left_to_right"`.
    confidence_threshold (`float`, *optional*):
        Keep every position whose measure is above it, and at least one, instead of an even schedule.
    stop_at_eos (`bool`, *optional*, defaults to `True`):
        Whether a row that has revealed an EOS at the end of a block is finished. The papers decode the whole canvas.
    cache (`str`, *optional*):
        Key/value cache of the sampler: `"exact"` for any-order decoding. `None` recomputes everything.
    cfg_scale (`float`, *optional*, defaults to `0.0`):
        Refused unless 0: the scorer would have to follow the guidance.
    sampler_batch_size (`int`, *optional*):
        Rows decoded at a time on a device. `None` takes the whole generation batch.
    """

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout. On by default: dropout makes the first ratio differ from 1."},
    )
    estimator: str = field(
        default="step_merge",
        metadata={"help": f"Which likelihood the loss is computed from: {', '.join(ESTIMATORS)}."},
    )
    num_segments: int | None = field(
        default=None,
        metadata={
            "help": "N of step_merge: canvases the trajectory is replayed on. None takes 8, or the number of decoding "
            "steps if that is smaller."
        },
    )
    estimator_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the estimator's constructor."}
    )
    p_mask_prompt: float = field(
        default=0.0,
        metadata={"help": "Probability with which a prompt token is masked when log-probs are computed."},
    )
    redraw_views: bool = field(
        default=True,
        metadata={"help": "Whether whatever is random in a likelihood is drawn anew in each inner iteration."},
    )
    score_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature that log-probs are computed at. None takes the sampling temperature."},
    )
    loss_tokens: str = field(
        default="eos",
        metadata={
            "help": "Tokens that the loss counts: 'eos', those up to and including the first EOS, or 'canvas', all "
            "revealed.",
            "choices": ["eos", "canvas"],
        },
    )
    decoding: str = field(
        default="denoising",
        metadata={
            "help": "How completions are drawn: 'denoising', or 'any_order' for models trained with any-order "
            "attention."
        },
    )
    ratio_denominator: str = field(
        default="old",
        metadata={
            "help": "Policy in the denominator of the ratio: 'old', or 'ref', the reference (PADRE Eq. 14 as "
            "printed).",
            "choices": ["old", "ref"],
        },
    )
    kl_estimator: str = field(
        default="k3",
        metadata={
            "help": "The KL term: 'k3', TRL's estimate from the sampled tokens, or 'full', a sum over the vocabulary.",
            "choices": ["k3", "full"],
        },
    )
    old_logps: str = field(
        default="recompute",
        metadata={
            "help": "Where the old policy's log-probs come from: 'recompute', or 'rollout', the sampler's own, where "
            "they are exact for the estimator.",
            "choices": ["recompute", "rollout"],
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Positions in a block. None takes the largest divisor of the canvas up to 32."},
    )
    diffusion_steps: int | None = field(
        default=None, metadata={"help": "Decoding steps for the whole canvas. None takes half the canvas."}
    )
    tokens_per_step: int | None = field(
        default=None, metadata={"help": "Tokens revealed a step; another way to give diffusion_steps."}
    )
    remasking: str = field(
        default="low_confidence",
        metadata={
            "help": "Which drawn tokens are kept: 'low_confidence', 'margin', 'entropy', 'random' or 'left_to_right'."
        },
    )
    confidence_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Keep every position whose measure is above it, and at least one, instead of an even schedule."
        },
    )
    stop_at_eos: bool = field(
        default=True, metadata={"help": "Whether a row that has revealed an EOS at the end of a block is finished."}
    )
    cache: str | None = field(
        default=None, metadata={"help": "Key/value cache of the sampler. None recomputes everything."}
    )
    cfg_scale: float = field(
        default=0.0, metadata={"help": "Refused unless 0: the scorer would have to follow the guidance."}
    )
    sampler_batch_size: int | None = field(
        default=None, metadata={"help": "Rows decoded at a time on a device. None takes the whole generation batch."}
    )

    # Fields that TrainingArguments parses from a JSON string on the command line.
    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "estimator_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """Check the diffusion settings and the TRL options that do not apply; fill in what was left to None.

        Raises:
            ValueError: naming the field, its value and what would be right.
        """
        refuse(self, _REFUSED, "a diffusion model")
        if not 0 <= self.p_mask_prompt < 1:
            raise ValueError(f"p_mask_prompt={self.p_mask_prompt} must be in [0, 1); the papers use 0.15.")
        if self.loss_tokens not in ("eos", "canvas"):
            raise ValueError(f"loss_tokens={self.loss_tokens!r} is unknown; choose 'eos' or 'canvas'.")
        if self.score_temperature is not None and self.score_temperature <= 0:
            raise ValueError(
                f"score_temperature={self.score_temperature} must be positive; 1.0 is the un-tempered model."
            )
        if self.sampler_batch_size is not None and self.sampler_batch_size < 1:
            raise ValueError(f"sampler_batch_size={self.sampler_batch_size} must be at least 1, or None for all rows.")
        if self.max_completion_length is None:
            raise ValueError(
                "max_completion_length=None: a diffusion model needs the length of its canvas; set a number."
            )
        resolve_schedule(
            self.max_completion_length,
            self.block_length,
            self.diffusion_steps,
            self.tokens_per_step,
            self.confidence_threshold is None,
            canvas_name="max_completion_length",
        )
        steps = self.generation_config().diffusion_steps  # checks the remaining decoding fields
        self._resolve_estimator(steps if self.confidence_threshold is None else self.max_completion_length)
        self._check_loss()
        self.check_estimator(self.build_estimator())

    def _check_loss(self) -> None:
        if self.ratio_denominator not in ("old", "ref"):
            raise ValueError(f"ratio_denominator={self.ratio_denominator!r} is unknown; choose 'old' or 'ref'.")
        if self.kl_estimator not in ("k3", "full"):
            raise ValueError(f"kl_estimator={self.kl_estimator!r} is unknown; choose 'k3' or 'full'.")
        if self.kl_estimator == "full" and self.beta == 0:
            raise ValueError(
                "kl_estimator='full' with beta=0: there is no KL term to estimate. Set beta (0.04 in d2)."
            )
        if self.loss_type != "wd1":
            return
        for name, right in (("beta", 0.0), ("ratio_denominator", "old"), ("importance_sampling_level", "token")):
            if getattr(self, name) != right:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with loss_type='wd1': wd1 has no ratio and no reference. Set "
                    f"{name}={right!r}."
                )

    def check_estimator(self, estimator: Estimator) -> None:
        """Refuse what does not go with the estimator.

        Raises:
            ValueError: a loss that is not a sum over tokens for an estimator that leaves positions out, or the
                sampler's log-probs as the old policy's where they are not what the estimator computes.
        """
        if estimator.sub_samples(self.max_completion_length):
            for name, value, wrong in (
                ("importance_sampling_level", self.importance_sampling_level, "sequence"),
                ("loss_type", self.loss_type, "luspo"),
                ("loss_type", self.loss_type, "vespo"),
            ):
                if value == wrong:
                    raise ValueError(
                        f"{name}={value!r} weighs whole sequences, and {type(estimator).__name__} scores only some of "
                        "their positions, so the expected gradient would be another one. Score all of them, or take a "
                        "token-level loss."
                    )
            for name, neutral in (("off_policy_mask_threshold", None), ("top_entropy_quantile", 1.0)):
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name}={getattr(self, name)} needs every token's number, and {type(estimator).__name__} "
                        f"scores only some. Set it to {neutral}, or score all positions."
                    )
        if self.old_logps not in ("recompute", "rollout"):
            raise ValueError(f"old_logps={self.old_logps!r} is unknown; choose 'recompute' or 'rollout'.")
        if self.old_logps == "recompute":
            return
        reason = None
        if self.decoding not in estimator.exact_for:
            reason = f"{type(estimator).__name__} is not exact for decoding={self.decoding!r}"
        elif self.p_mask_prompt:
            reason = f"the sampler saw the whole prompt, and p_mask_prompt={self.p_mask_prompt}"
        elif self.score_temperature not in (None, self.temperature or 1.0):
            reason = (
                f"the sampler scored at temperature={self.temperature}, not score_temperature={self.score_temperature}"
            )
        if reason:
            raise ValueError(
                f"old_logps='rollout': the sampler's log-probs are not the old policy's here, because {reason}. Set "
                "old_logps='recompute'."
            )

    def _resolve_estimator(self, steps: int) -> None:
        if self.estimator not in ESTIMATORS:
            near = get_close_matches(str(self.estimator), ESTIMATORS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"estimator={self.estimator!r} is unknown; {hint}Known ones: {', '.join(ESTIMATORS)}.")
        if self.estimator != "step_merge":
            if self.num_segments is not None:
                raise ValueError(
                    f"num_segments={self.num_segments} belongs to estimator='step_merge', not to {self.estimator!r}; "
                    "remove it."
                )
        elif self.num_segments is None:
            self.num_segments = (self.estimator_kwargs or {}).get("num_segments") or min(8, steps)
        if self.num_segments is not None and not 1 <= self.num_segments <= steps:
            raise ValueError(
                f"num_segments={self.num_segments} must be between 1 and the number of decoding steps, {steps}: "
                "further segments would be empty forwards."
            )

    def build_estimator(self) -> Estimator:
        """The estimator that the fields describe."""
        estimator = ESTIMATORS[self.estimator]
        kwargs = dict(self.estimator_kwargs or {})
        known = [name for name in inspect.signature(estimator.__init__).parameters if name != "self"]
        for name in kwargs:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {known or 'no arguments'}."
                raise ValueError(f"estimator_kwargs: {self.estimator!r} has no argument {name!r}; {hint}")
        if self.num_segments is not None:
            kwargs["num_segments"] = self.num_segments
        return estimator(**kwargs)

    def generation_config(self, eos_token_ids=None, pad_token_id=None) -> DiffusionGenerationConfig:
        """The sampler's settings."""
        return DiffusionGenerationConfig(
            max_new_tokens=self.max_completion_length,
            block_length=self.block_length,
            diffusion_steps=self.diffusion_steps,
            tokens_per_step=self.tokens_per_step,
            temperature=self.temperature,
            remasking=self.remasking,
            confidence_threshold=self.confidence_threshold,
            stop_at_eos=self.stop_at_eos,
            decoding=self.decoding,
            cache=self.cache,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
        )

    # What is computed on a generation batch, by the settings alone.

    @property
    def scores_old(self) -> bool:
        """Whether the old policy's log-probs take forwards of their own."""
        assert self.steps_per_generation is not None  # filled in by TRL
        # TRL's rule: where generation batches end with optimizer steps, they are the current policy's.
        asked = self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0
        given = self.old_logps == "rollout" or self.ratio_denominator == "ref" or self.loss_type == "wd1"
        return asked and not given

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's log-probs of the tokens are computed; the full KL runs it beside the policy."""
        return self.ratio_denominator == "ref" or (self.beta != 0 and self.kl_estimator == "k3")

    def num_draws(self, estimator: Estimator) -> int:
        """Inner iterations for which they are computed, because something random is drawn anew in each."""
        random = estimator.stochastic or self.p_mask_prompt > 0
        return self.num_iterations if random and self.redraw_views else 1

    def paper_flops(
        self, completions: int, parameters: int, frozen_backbone: bool, estimator: Estimator | None = None
    ) -> PaperFlops:
        """Operations of a generation batch of `completions` and all updates on it, by d2 App. C.2.

        T and the views are the schedule's, also where rows stop early or reveal by a threshold.

        Args:
            parameters (`int`): of the model without adapters, see `backbone_parameters`.
            frozen_backbone (`bool`): whether they are not trained, or not all of them.
            estimator (`Estimator`, *optional*): instead of the one that the fields describe.
        """
        estimator = estimator or self.build_estimator()
        canvas_length, steps = self.max_completion_length, self.generation_config().diffusion_steps
        assert canvas_length is not None and steps is not None  # `validate` refuses the one and fills in the other
        return paper_flops(
            parameters=parameters,
            canvas_length=canvas_length,
            completions=completions,
            steps=steps,
            views=estimator.num_views(Rollout.scheduled(canvas_length, steps)),
            draws=self.num_draws(estimator),
            inner_iterations=self.num_iterations,
            frozen_backbone=frozen_backbone,
            scores_old=self.scores_old,
            scores_reference=self.scores_reference,
            full_kl=self.kl_estimator == "full",
        )

    @classmethod
    def from_stock(cls, args: GRPOConfig) -> "DiffusionGRPOConfig":
        """A stock GRPOConfig with the diffusion fields at their defaults."""
        config = take_over(cls, GRPOConfig, args)
        config.disable_dropout = True
        config.validate()
        return config
