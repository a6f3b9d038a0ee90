"""Settings of `DiffusionGRPOTrainer`: TRL's, and what a diffusion model adds."""

import inspect
import warnings
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from trl import GRPOConfig

from ..blocks import Blocks
from ..fields import check_choice, check_kind, document_fields, imported
from ..generation import DecodingArguments, DiffusionGenerationConfig, decoding_of
from ..likelihood import ESTIMATORS, Estimator
from ..models import PaperFlops, paper_flops
from ..rollout import Rollout
from .engine import CORRECTIONS
from .loss import LEVELS, LOSSES
from .settings import check_settings, name_checkpointing
from .stock import Refused, refuse, take_over


# TRL options that a diffusion sampler would silently ignore, or that bypass it: field -> (accepted values, why and
# what instead).
_REFUSED: Refused = {
    "use_vllm": ((False,), "vLLM samples autoregressively; completions are drawn by masked diffusion decoding"),
    # Before the option that TRL turns on for it: the message is to name what was set.
    "use_transformers_paged": ((False,), "it samples autoregressively; leave it off"),
    "use_transformers_continuous_batching": ((False,), "it samples autoregressively; leave it off"),
    "cache_implementation": ((None,), "it configures the autoregressive cache; use `cache`"),
    "repetition_penalty": ((1.0, None), "it changes the sampled distribution but not the scored one; leave it at 1.0"),
    "use_liger_kernel": (
        (False,),
        "it chooses its kernels by `model_type`, and has none for masked diffusion families; leave it off",
    ),
    "router_aux_loss_coef": ((None, 0.0), "the scorer does not return a load-balancing loss; leave it at 0"),
    "cfg_scale": ((0.0,), "the scorer does not follow guidance; use it for generation and evaluation only"),
}

# Fields that `refuse` and `check_decoding` check.
_ELSEWHERE = (*_REFUSED, "redraw_views", *(f.name for f in fields(DecodingArguments)))

# What TRL declares as any string, and compares with these while it trains.
_CHOICES = {
    "loss_type": LOSSES,
    "importance_sampling_level": LEVELS,
    "vllm_importance_sampling_mode": CORRECTIONS,
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


@document_fields(beyond=GRPOConfig)
@dataclass
class DiffusionGRPOConfig(DecodingArguments, GRPOConfig):
    """
    Configuration of [`DiffusionGRPOTrainer`].

    Includes every parameter of TRL's [`~trl.GRPOConfig`] and the ones below, which decide how completions are decoded,
    which likelihood the loss is computed from, and what the loss makes of it. Of TRL's own:

    - `max_completion_length` is the canvas length L.
    - `loss_type` may also be `"wd1"`: -Σ_i w⁺_i log π(y_i) + Σ_i w⁻_i log π(y_i) over each group, w± = softmax(±A),
      averaged over groups and divided by the canvas length; no ratio, no reference and no old log-probs.
    - `importance_sampling_level` may also be `"sequence_token"` (GSPO-token): the ratio of a sequence, at which each
      token has a gradient of its own, so that advantages may differ between its tokens.
    - `use_bias_correction_kl` does not apply to `kl_estimator="full"`.
    - Options that a diffusion sampler would ignore, or that bypass it, are refused.
    """

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout. On by default: dropout makes the first ratio differ from 1."},
    )

    # The likelihood.
    estimator: str = field(
        default="step_merge",
        metadata={
            "help": "Which likelihood the loss is computed from: 'mean_field' (d1), 'step_merge' (d2), "
            "'exact_trajectory', 'agrpo', 'any_order' (d2, for any-order decoding), 'pkl', 'pkl_u' or 'pkl_t' "
            "(PADRE), 'elbo' or 'coupled_elbo', 'spg' (SPG, with ratio_denominator='current'); or the path of an "
            "Estimator of your own, 'my_module.MyEstimator'."
        },
    )
    num_segments: int | None = field(
        default=None,
        metadata={
            "help": "N of 'step_merge', the canvases that the trajectory is replayed on: a short form of "
            "estimator_kwargs={'num_segments': N}. None takes 8, or the number of decoding steps if that is smaller. "
            "An estimator that has no such argument ignores it, with a warning."
        },
    )
    estimator_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the estimator's constructor, by name."}
    )
    p_mask_prompt: float = field(
        default=0.0,
        metadata={
            "help": "Probability with which a prompt token is masked when log-probs are computed (d1, d2 and PADRE: "
            "0.15)."
        },
    )
    redraw_views: str = field(
        default="true",
        metadata={
            "help": "Whether whatever is random in a likelihood is drawn anew in each inner iteration, or how many "
            "draws there are, from 1 to num_iterations, which the iterations take in turn: each but the first costs a "
            "pass of the old policy, and all of them one of the reference."
        },
    )
    score_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature that log-probs are computed at. None takes the sampling temperature, so that a token "
            "is scored under the distribution that it was drawn from; the published d1 and d2 runs score at 1.0."
        },
    )
    loss_tokens: str = field(
        default="eos",
        metadata={
            "help": "Tokens that the loss counts: 'eos', those up to and including the first EOS, or 'canvas', all "
            "that were revealed.",
            "choices": ["eos", "canvas"],
        },
    )

    # The loss.
    ratio_denominator: str = field(
        default="old",
        metadata={
            "help": "Policy in the denominator of the importance ratio: 'old', the policy that drew the rollouts, or "
            "'ref', the reference (PADRE Eq. 14 and Algorithm 1 line 8 as printed), which is then loaded at beta=0 "
            "too, or 'current', the policy itself: the ratio is 1 in all inner iterations, the gradient is that of "
            "-A log π, and nothing is clipped (SPG).",
            "choices": ["old", "ref", "current"],
        },
    )
    kl_estimator: str = field(
        default="k3",
        metadata={
            "help": "The KL term of each token: 'k3' (TRL's; d2 Eq. 70), from the sampled token, or 'full', "
            "D_KL(π_θ(·|view) ‖ π_ref(·|view)) summed over the vocabulary (PADRE), with the reference run on the same "
            "views.",
            "choices": ["k3", "full"],
        },
    )
    old_logps: str = field(
        default="recompute",
        metadata={
            "help": "Where the old policy's log-probs come from: 'recompute' scores the rollouts again, 'rollout' "
            "takes the sampler's own, which saves a forward a view. Only where the estimator is exact for the "
            "decoder, at the sampling temperature and with an unmasked prompt.",
            "choices": ["recompute", "rollout"],
        },
    )

    # Decoding: beside the fields of DecodingArguments.
    sampler_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows decoded at a time on a device; as rows finish, the next take their places. None takes the "
            "whole generation batch."
        },
    )

    save_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Whether the completions of training are written to output_dir/_rollouts as JSON lines: text, "
            "tokens, the step that revealed each, and log-probs (docs/engines.md)."
        },
    )
    trace_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps from one page to the next that shows how some completions of training were "
            "filled in: output_dir/traces/step-N.html, which the model card links and the Hub gets, too "
            "(docs/trace.md). None writes none."
        },
    )

    # Fields that TrainingArguments parses from a JSON string on the command line.
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "estimator_kwargs"]  # noqa: RUF012  declared as TRL does

    def __post_init__(self):
        check_settings(self, _ELSEWHERE, _CHOICES)
        name_checkpointing(self)
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible" not in str(error):
                raise
            names = ("train_batch_size", "eval_batch_size")
            sizes = [f"per_device_{name}={getattr(self, f'per_device_{name}')}" for name in names]
            sizes += [f"{name}={getattr(self, name)}" for name in ("gradient_accumulation_steps", "num_generations")]
            raise ValueError(f"{error} The batches are made of {', '.join(sizes)} and the processes.") from error
        self.validate()

    def validate(self) -> None:
        """Check the diffusion settings and the TRL options that do not apply; fill in `num_segments`.

        Raises:
            ValueError: naming the field, its value and what would be right.
        """
        self._take_generation_kwargs()
        refuse(self, _REFUSED, "a diffusion model")
        if not 0 <= self.p_mask_prompt < 1:
            raise ValueError(f"p_mask_prompt={self.p_mask_prompt} must be in [0, 1); the papers use 0.15.")
        self._read_redraw_views()
        if self.score_temperature is not None and self.score_temperature <= 0:
            raise ValueError(
                f"score_temperature={self.score_temperature} must be positive; 1.0 is the un-tempered model."
            )
        if self.sampler_batch_size is not None and self.sampler_batch_size < 1:
            raise ValueError(f"sampler_batch_size={self.sampler_batch_size} must be at least 1, or None for all rows.")
        if self.trace_steps is not None and self.trace_steps < 1:
            raise ValueError(f"trace_steps={self.trace_steps} must be at least 1, or None for no pages.")
        self.check_decoding(self.canvas_length, "max_completion_length")
        self.generation_config()  # checks the temperature
        if self.temperature == 0:
            warnings.warn(
                "temperature=0: the completions of a group are all the same, every advantage is 0, and nothing is "
                "learned. Set a temperature (0.9 in d1 and d2)."
            )
        self._check_loss()
        self.check_estimator(self.build_estimator())

    def _read_redraw_views(self) -> None:
        """A bool or a number, whatever a recipe or the command line made of it."""
        given: Any = self.redraw_views
        text = str(given).lower()
        value: Any = text == "true" if text in ("true", "false") else int(text) if text.isdecimal() else None
        if value is None or (not isinstance(value, bool) and not 1 <= value <= self.num_iterations):
            raise ValueError(
                f"redraw_views={given!r} must be true, false or a number of draws from 1 to "
                f"num_iterations={self.num_iterations}."
            )
        self.redraw_views = value

    def _take_generation_kwargs(self) -> None:
        """Decoding settings may also stand in TRL's `generation_kwargs`, which go before the fields there too."""
        known = {f.name for f in fields(DecodingArguments)}
        given = self.generation_kwargs
        for name, value in given.items() if isinstance(given, dict) else ():
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"It takes {', '.join(sorted(known))}."
                raise ValueError(
                    f"generation_kwargs: {name}={value!r} configures autoregressive sampling; {hint} Others are "
                    "fields of their own (temperature, max_completion_length)."
                )
            setattr(self, name, value)

    def _check_loss(self) -> None:
        if self.kl_estimator == "full" and self.beta == 0:
            raise ValueError(
                "kl_estimator='full' with beta=0: there is no KL term to estimate. Set beta (0.04 in d2)."
            )
        level, threshold = self.importance_sampling_level, self.off_policy_mask_threshold
        if level == "sequence_token" and (threshold is not None or self.loss_type in ("luspo", "vespo")):
            name = "loss_type" if threshold is None else "off_policy_mask_threshold"
            raise ValueError(
                f"{name}={getattr(self, name)!r} with importance_sampling_level={level!r}: it needs the old policy's "
                "own log-probs of tokens. Set importance_sampling_level='sequence'."
            )
        if threshold is not None and self.ratio_denominator == "current":
            raise ValueError(
                f"off_policy_mask_threshold={threshold} with ratio_denominator='current': it compares with the old "
                "policy, whose log-probs are not computed. Set it to None."
            )
        if self.sync_ref_model and self.beta == 0 and self.ratio_denominator != "ref":
            raise ValueError("sync_ref_model=True with beta=0: there is no reference to synchronise. Set beta.")
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
            ValueError: a ratio or a KL of numbers that the advantage's sign chooses, a loss that is not a sum over
                tokens for an estimator that leaves positions out, or the sampler's log-probs as the old policy's where
                they are not what the estimator computes.
        """
        given = f"estimator={self.estimator!r}" if isinstance(self.estimator, str) else type(estimator).__name__
        for name, right, what in (("ratio_denominator", "current", "ratio"), ("beta", 0.0, "KL")):
            if estimator.signed and getattr(self, name) != right:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with {given}, which scores a row by one bound or another, as its "
                    "advantage is: their differences are no log-ratios of two policies, and there is no "
                    f"{what} to take of them. Set {name}={right!r}."
                )
        if estimator.sub_samples(self.canvas_length):
            for name, value, wrong in (
                *(("importance_sampling_level", self.importance_sampling_level, level) for level in LEVELS[1:]),
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
        if not estimator.per_token and self.top_entropy_quantile < 1:
            raise ValueError(
                f"top_entropy_quantile={self.top_entropy_quantile} chooses tokens, and {type(estimator).__name__} "
                "gives one number of the whole sequence. Set it to 1.0, or take an estimator of tokens: step_merge."
            )
        if self.truncates and self.decoding not in estimator.replays:
            name = next(name for name in ("top_k", "top_p", "min_p") if getattr(self, name) not in (0, 1.0, None))
            raise ValueError(
                f"{name}={getattr(self, name)} with {type(estimator).__name__} and decoding={self.decoding!r}: it "
                "scores other distributions than the sampler draws from, and which of their tokens would be left is "
                "not known. Draw without truncation, or take step_merge (any_order for any-order decoding)."
            )
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

    def _estimator_class(self) -> type[Estimator]:
        """The class that `estimator` names."""
        if "." not in self.estimator:
            check_choice("estimator", self.estimator, ESTIMATORS)
            return ESTIMATORS[self.estimator]
        found = imported("estimator", self.estimator)
        if not isinstance(found, type) or not issubclass(found, Estimator):
            what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
            raise ValueError(
                f"estimator: {self.estimator!r} is {what}, and must be a subclass of trl_dllm.likelihood.Estimator."
            )
        return found

    def build_estimator(self) -> Estimator:
        """The estimator that the fields describe; sets `num_segments` to what it takes, None if it takes none.

        Whether a recipe or the command line gave `num_segments` cannot be told here, so that an estimator without
        that argument ignores it: `--estimator mean_field` works over a recipe that sets it.

        Raises:
            ValueError: a name or a path of no estimator, an argument that it does not have or that is missing, two
                numbers of segments, or more segments than decoding steps.
        """
        estimator, kwargs = self._estimator_class(), self.estimator_kwargs or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"estimator_kwargs={kwargs!r} must be a mapping, such as {{'num_samples': 2}}.")
        parameters, hints = inspect.signature(estimator).parameters, get_type_hints(estimator.__init__)
        known = list(parameters)
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in kwargs and name != "num_segments":
                raise ValueError(f"estimator_kwargs={kwargs!r}: {self.estimator!r} needs the argument {name!r}.")
        for name in kwargs:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {known or 'no arguments'}."
                raise ValueError(f"estimator_kwargs: {self.estimator!r} has no argument {name!r}; {hint}")
            if name != "num_segments":  # which is checked below, wherever it stands
                check_kind(f"estimator_kwargs: {name}", kwargs[name], hints.get(name, Any))
        if "num_segments" in known:
            _, steps = self.check_decoding(self.canvas_length, "max_completion_length")
            if self.confidence_threshold is not None:
                steps = self.canvas_length  # one token a step at worst
            given = [number for number in (self.num_segments, kwargs.get("num_segments")) if number is not None]
            if given and given[0] != given[-1]:
                raise ValueError(
                    f"num_segments={self.num_segments} and estimator_kwargs={kwargs!r} name two numbers of segments; "
                    "set one."
                )
            segments = given[0] if given else min(8, steps)
            check_kind("num_segments", segments, int)
            if not 1 <= segments <= steps:
                raise ValueError(
                    f"num_segments={segments} must be between 1 and the number of decoding steps, {steps}: further "
                    "segments would be empty forwards."
                )
            self.num_segments = segments
            return estimator(**{**kwargs, "num_segments": segments})
        if self.num_segments is not None:
            warnings.warn(
                f"num_segments={self.num_segments} is ignored: estimator={self.estimator!r} has no segments."
            )
            self.num_segments = None
        return estimator(**kwargs)

    @property
    def canvas_length(self) -> int:
        """L, in tokens: TRL's `max_completion_length`, which must be set."""
        if self.max_completion_length is None:
            raise ValueError(
                "max_completion_length=None: a diffusion model needs the length of its canvas; set a number."
            )
        return self.max_completion_length

    def generation_config(self, eos_token_ids: tuple[int, ...] | None = None) -> DiffusionGenerationConfig:
        """The sampler's settings."""
        return DiffusionGenerationConfig(
            max_new_tokens=self.canvas_length,
            temperature=self.temperature,
            eos_token_ids=eos_token_ids,
            **{f.name: getattr(self, f.name) for f in fields(DecodingArguments)},
        )

    def known_decoding(self) -> dict[str, Any]:
        """What is saved beside a trained model of how it was decoded."""
        return decoding_of(self.generation_config())

    # What is computed on a generation batch, by the settings alone.

    @property
    def needs_old(self) -> bool:
        """Whether the old policy's log-probs are in the loss: its ratio has them, and they are not the current ones.

        TRL's rule: where generation batches end with optimizer steps, they are the current policy's.
        """
        assert self.steps_per_generation is not None  # filled in by TRL
        moved = self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0
        return moved and self.ratio_denominator == "old" and self.loss_type != "wd1"

    @property
    def scores_old(self) -> bool:
        """Whether they take forwards of their own."""
        return self.needs_old and self.old_logps == "recompute"

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's log-probs of the tokens are computed; the full KL runs it beside the policy."""
        return self.ratio_denominator == "ref" or (self.beta != 0 and self.kl_estimator == "k3")

    def num_draws(self, estimator: Estimator) -> int:
        """Draws for which they are computed, of what is random in the views."""
        if not (estimator.stochastic or self.p_mask_prompt > 0):
            return 1
        return self.num_iterations if self.redraw_views is True else max(1, int(self.redraw_views))

    def paper_flops(
        self,
        completions: int,
        parameters: int,
        frozen_backbone: bool,
        estimator: Estimator | None = None,
        blocks: Blocks | None = None,
    ) -> PaperFlops:
        """Operations of a generation batch of `completions` and all updates on it, by d2 App. C.2.

        T and the views are the schedule's, also where rows stop early or reveal by a threshold.

        Args:
            parameters (`int`): of the model without adapters, see `backbone_parameters`.
            frozen_backbone (`bool`): whether they are not trained, or not all of them.
            estimator (`Estimator`, *optional*): instead of the one that the fields describe.
            blocks (`Blocks`, *optional*): of a block-causal model, whose views replay all blocks at once.
        """
        estimator = estimator or self.build_estimator()
        canvas_length, steps = self.max_completion_length, self.generation_config().diffusion_steps
        assert canvas_length is not None and steps is not None  # `validate` refuses the one and fills in the other
        return paper_flops(
            parameters=parameters,
            canvas_length=canvas_length,
            completions=completions,
            steps=steps,
            views=estimator.num_views(Rollout.scheduled(canvas_length, steps, blocks)),
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
        check_settings(config, _ELSEWHERE, _CHOICES)
        config.validate()
        return config
