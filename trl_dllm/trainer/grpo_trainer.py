"""TRL's GRPOTrainer for masked diffusion language models.

Rewards, advantages, losses, the generation buffer, PEFT, quantisation and the distributed back-ends stay TRL's.
Overridden are:

- `_generate_single_turn`: completions are drawn by masked diffusion decoding; the whole canvas is kept.
- `_generate_and_score_completions`: the canvas and its trajectory are put beside each completion, and travel with it.
- `_get_per_token_logps_and_entropies`: the one place where TRL asks for log-probs, for the old, the reference and the
  current policy alike. An estimator answers.
- `_compute_loss`: TRL's loss, back-propagated one view at a time.
"""

import inspect
import math
import tempfile
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from ..generation import generate
from ..likelihood import Estimator, Reference, TokenScores, check_estimator, perturb_prompt, score_view
from ..likelihood.view import IGNORE
from ..models import FlopsCounter, MaskedDiffusionSpec, TrainingFlops, backbone_parameters, hidden_rows, unwrap
from ..models.spec import check_unshifted
from ..noise import row_seeds
from ..rollout import Rollout
from .grpo_config import DiffusionGRPOConfig
from .model_card import rewrite_quick_start
from .segmented_backward import segmented_backward


# The methods of TRL that are overridden, and the parameters that the overrides rely on.
_TRL_INTERFACE = {
    "_generate": ("prompts",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_compute_loss": ("model", "inputs"),
}

# Losses whose gradient with respect to a token's log-prob depends on that log-prob alone.
SEPARABLE_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")

_NOT_APPLICABLE = ("tools", "rollout_func", "environment_factory")


def _hub_kwargs(args) -> dict:
    """Which revision of a checkpoint's config and tokenizer to read, as TRL does for its weights."""
    init_kwargs = args.model_init_kwargs or {}
    trust = init_kwargs.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    return {"revision": init_kwargs.get("revision"), "trust_remote_code": trust}


def _scratch_metrics() -> dict:
    return {"train": defaultdict(list), "eval": defaultdict(list)}


def sub_sample_weights(mask: Tensor, scored: Tensor) -> Tensor:
    """Loss mask of sub-sampled rows, float (B, L): n / k on each of the k scored of n counted positions, else 0.

    A row's weights still sum to n, so every normaliser of TRL's losses is what it is with all positions scored, and
    the expected gradient is the full estimator's for every token-separable loss.
    """
    mask = mask.bool()
    scored = scored & mask
    number = scored.sum(dim=1, keepdim=True).clamp(min=1)
    return scored.float() * mask.sum(dim=1, keepdim=True) / number


def check_trl(trainer_class: type = GRPOTrainer) -> None:
    """Raise RuntimeError unless the installed TRL has the methods that this trainer overrides."""
    for name, parameters in _TRL_INTERFACE.items():
        method = getattr(trainer_class, name, None)
        found = list(inspect.signature(method).parameters) if method else []
        missing = [parameter for parameter in parameters if parameter not in found]
        if method is None or missing:
            import trl

            raise RuntimeError(
                f"trl {trl.__version__}: {trainer_class.__name__}.{name} "
                + (f"has no parameter {missing[0]!r}" if method else "does not exist")
                + "; trl_dllm overrides it and would silently train something else. Install trl>=1.15,<2."
            )


class DiffusionGRPOTrainer(GRPOTrainer):
    """
    GRPO for masked diffusion language models (LLaDA, Dream, …), with d2's and d1's likelihoods.

    Takes the arguments of TRL's [`~trl.GRPOTrainer`] (except tools, environments and custom rollouts, which assume an
    autoregressive sampler) and, besides:

    Args:
        args ([`DiffusionGRPOConfig`]): a stock `GRPOConfig` works too and gets the diffusion defaults.
        estimator ([`~trl_dllm.likelihood.Estimator`], *optional*): the likelihood, instead of the one that `args`
        names.

    Raises:
        ValueError: before any weight is loaded, a model that is no masked diffusion model, or an option that does not
            apply.
        RuntimeError: an installed TRL whose methods are not the ones overridden here.

    Example:

    ```python
    from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer

    trainer = DiffusionGRPOTrainer(
        model="GSAI-ML/LLaDA-8B-Instruct",
        reward_funcs=reward,
        args=DiffusionGRPOConfig(estimator="step_merge", num_segments=8, max_completion_length=256),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar = ["trl", "grpo", "trl-dllm", "masked-diffusion"]
    _name = "Diffusion GRPO"

    def __init__(self, model, reward_funcs=None, args=None, *positional, estimator: Estimator | None = None, **kwargs):
        check_trl()
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DiffusionGRPOConfig(f"{(name or 'model').split('/')[-1]}-GRPO")
        elif not isinstance(args, DiffusionGRPOConfig):
            if not isinstance(args, GRPOConfig):
                raise TypeError(f"args must be a DiffusionGRPOConfig, got {type(args).__name__}.")
            args = DiffusionGRPOConfig.from_stock(args)
        bound = inspect.signature(GRPOTrainer.__init__).bind_partial(
            None, model, reward_funcs, args, *positional, **kwargs
        )
        for name in _NOT_APPLICABLE:
            if bound.arguments.get(name):
                raise ValueError(
                    f"{name}={bound.arguments[name]!r} does not apply to a diffusion model: it joins several "
                    "generations or samples by itself, and the trajectory of the completion would be lost. Remove it."
                )
        tokenizer = bound.arguments.get("processing_class")
        if isinstance(tokenizer, ProcessorMixin):
            raise ValueError(
                f"processing_class={type(tokenizer).__name__} is a multimodal processor; only text models are "
                "supported. Pass the model's tokenizer."
            )
        adapter = bound.arguments.get("peft_config") or getattr(model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ValueError(
                f"peft_config={type(adapter).__name__} puts virtual tokens before the prompt, which moves every row "
                "that the scorer reads. Use LoRA."
            )
        if estimator is not None and not isinstance(estimator, Estimator):
            raise TypeError(
                f"estimator={estimator!r} must be an Estimator instance, like StepMerge(num_segments=8); a name goes "
                "into DiffusionGRPOConfig(estimator=…)."
            )
        args.router_aux_loss_coef = 0.0  # mixture-of-experts configs may bring one of their own
        config = self._read_config(model, args)
        self.spec = MaskedDiffusionSpec.from_config(config, tokenizer or self._read_tokenizer(model, args))
        self.estimator = estimator if estimator is not None else args.build_estimator()
        self.estimator.check(self.spec.logits_shift)
        if args.decoding == "any_order":
            check_unshifted("decoding='any_order'", self.spec.logits_shift)
        self._rollout: Rollout | None = None  # the generation batch while it is drawn and scored
        self._scored: list[
            Tensor
        ] = []  # (B, K, L) log-probs of the generation batch, in the order TRL asks: old, reference
        self._loss_scores: TokenScores | None = None  # what TRL's loss is to be evaluated on
        # (global step, generation batches drawn in it), of training and of evaluation: a run with evaluation, or
        # resumed after one, draws the same completions in training.
        self._generation_round = [(-1, 0), (-1, 0)]
        self.flops = FlopsCounter()

        # TRL makes a reference model where beta is not 0; as a denominator of the ratio it is needed at 0 as well.
        needs_reference = args.beta != 0 or args.ratio_denominator == "ref"
        with self._reference_source(model, needs_reference, bound.arguments.get("peft_config")):
            beta, args.beta = args.beta, args.beta or float(needs_reference)
            try:
                super().__init__(model, reward_funcs, args, *positional, **kwargs)
            finally:
                args.beta = beta
            self.beta = beta
        args.check_estimator(self.estimator)
        # TRL refuses LoRA on the output head, but not a copy of it that is trained in full.
        if args.kl_estimator == "full" and hasattr(unwrap(self.model).get_output_embeddings(), "modules_to_save"):
            raise ValueError(
                "kl_estimator='full' applies the model's own output head to the reference's hidden states, and "
                "peft_config trains a copy of that head. Leave it out of modules_to_save, or set kl_estimator='k3'."
            )
        if self.loss_type == "wd1":  # carried as advantages
            self.loss_type = "dr_grpo"

        # Again, now with the checkpoint's own tokenizer.
        self.spec = MaskedDiffusionSpec.from_config(unwrap(self.model).config, self._tokenizer)
        self.sampling = args.generation_config(self.eos_token_ids, self._tokenizer.pad_token_id)
        self._count_flops = TrainingFlops(self.model)
        self._parameters = backbone_parameters(self.model)
        self._frozen_backbone = any(not p.requires_grad for p in self.model.parameters())
        self._warn_about_save_steps()

    @staticmethod
    def _read_config(model, args):
        if not isinstance(model, str):
            if isinstance(model, torch.nn.Module):
                config = unwrap(model).config
                # TRL builds the reference model, and PEFT and the Hub reload this one, through AutoModelForCausalLM.
                if not isinstance(config, tuple(AutoModelForCausalLM._model_mapping.keys())):
                    AutoModelForCausalLM.register(type(config), type(unwrap(model)), exist_ok=True)
                return config
            raise TypeError(f"model must be a name or a transformers model, got {type(model).__name__}.")
        return AutoConfig.from_pretrained(model, **_hub_kwargs(args))

    @staticmethod
    def _read_tokenizer(model, args):
        """The checkpoint's own tokenizer, which TRL loads only behind the weights; None for a model made in memory."""
        name = model if isinstance(model, str) else unwrap(model).config._name_or_path
        if not name:
            return None
        revision = _hub_kwargs(args) if isinstance(model, str) else {"trust_remote_code": args.trust_remote_code}
        return AutoTokenizer.from_pretrained(name, **revision)

    @staticmethod
    @contextmanager
    def _reference_source(model, needed: bool, peft_config):
        """Give TRL a folder to load the reference model from, where the policy was made in memory and has no name."""
        needed = needed and peft_config is None and isinstance(model, torch.nn.Module)
        if not needed or hasattr(model, "peft_config") or model.config._name_or_path:
            yield
            return
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model.config._name_or_path = folder
            try:
                yield
            finally:
                model.config._name_or_path = ""

    def _warn_about_save_steps(self) -> None:
        cycle = self.args.steps_per_generation * self.num_iterations
        if self.args.save_strategy == "steps" and self.args.save_steps * self.args.gradient_accumulation_steps % cycle:
            import warnings

            warnings.warn(
                f"save_steps={self.args.save_steps}: a checkpoint would fall inside a generation cycle, and a run "
                "resumed from it draws its completions anew. Multiples of "
                f"{cycle // math.gcd(cycle, self.args.gradient_accumulation_steps)} resume exactly.",
                stacklevel=3,
            )

    # -------------------------------------------------------------------------------------------------------
    # generation

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        """Draw the generation batch; TRL gets the completions cut behind their first EOS, the canvas is kept."""
        device = self.accelerator.device
        width = max(len(ids) for ids in prompt_ids)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompt_ids], device=device).long()
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids], device=device).bool()
        with (
            profiling_context(self, "diffusion.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            rollout = generate(
                model,
                ids.view(len(prompt_ids), width),
                mask.view(len(prompt_ids), width),
                self.sampling,
                seeds=self._row_seeds(len(prompt_ids), device),
                spec=self.spec,
                batch_size=self.args.sampler_batch_size,
                still_running=self._any_process,
            )
        completions = [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.counted, strict=True)]
        if self.args.loss_tokens == "canvas":
            rollout = replace(rollout, counted=rollout.revealed)
        self._rollout = rollout
        return completions, None

    def _row_seeds(self, rows: int, device) -> Tensor:
        """Seeds of this process's rows: hashes of the run's seed, the optimizer step and the row's global number."""
        split = 0 if self.model.training else 1
        step, rounds = self._generation_round[split]
        rounds = rounds + 1 if step == self.state.global_step else 0
        self._generation_round[split] = (self.state.global_step, rounds)
        row = torch.arange(rows, device=device) + self.accelerator.process_index * rows
        return row_seeds(self.args.seed, split, self.state.global_step, rounds, row)

    def _any_process(self, running: bool) -> bool:
        """Whether any process is still decoding; sharded weights need a forward from every process."""
        sharded = self.is_fsdp_enabled or (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED
            and self.accelerator.state.deepspeed_plugin.zero_stage == 3
            and not self.args.ds3_gather_for_generation
        )
        if not sharded:
            return running
        flag = torch.tensor([running], dtype=torch.int64, device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _generate(self, prompts, *args, **kwargs):
        outputs = super()._generate(prompts, *args, **kwargs)
        # The index of the extra fields moved between versions of TRL. Reward functions get them like dataset columns.
        extra = next(value for value in outputs if isinstance(value, dict))
        extra["unmask_step"] = self._rollout.unmask_step.tolist()
        return outputs

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        self._scored = []
        denominator_is_reference = self.args.ratio_denominator == "ref"
        with self._set(beta=self.beta or float(denominator_is_reference)):
            outputs = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None

        # TRL zeroes the mask of truncated completions (mask_truncated_completions); everything else is ours.
        kept = outputs["completion_mask"].any(dim=1, keepdim=True)
        mask = rollout.counted & kept
        # The prompts too: TRL's are of the wrong dtype if one is empty, and padded to a multiple if it is told so.
        outputs["prompt_ids"] = rollout.prompt_ids
        outputs["prompt_mask"] = rollout.prompt_mask.long()
        outputs["completion_ids"] = rollout.completion_ids
        outputs["completion_mask"] = mask.long()
        outputs["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        outputs["unmask_step"] = rollout.unmask_step
        outputs["counted"] = rollout.counted
        outputs["rollout_logps"] = rollout.logps
        outputs["view_seed"] = rollout.view_seed
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if name in outputs:
                outputs[name] = self._scored.pop(0).masked_fill(~rollout.counted[:, None], 0)
        if denominator_is_reference:
            outputs["old_per_token_logps"] = outputs["ref_per_token_logps"]
        if not self.args.scores_reference:
            outputs.pop("ref_per_token_logps", None)
        if self.args.loss_type == "wd1":
            outputs["advantages"] = self._wd1_weights(outputs["advantages"])
            outputs.pop("old_per_token_logps", None)
        self._record_generation(rollout, training)
        return outputs

    # ----------------------------------------------------------------------------------------------------------
    # scoring

    @property
    def _needs_old(self) -> bool:
        """Whether TRL asks for the old policy's log-probs: generation batches do not end with optimizer steps."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0

    @property
    def _num_draws(self) -> int:
        """Inner iterations for which old and reference log-probs differ because something random is drawn in each."""
        return self.args.num_draws(self.estimator) if self.model.training else 1

    def _num_views(self, rollout: Rollout) -> int:
        """The largest number of views over all processes: each of them makes as many forwards as the others."""
        views = torch.tensor([self.estimator.num_views(rollout)], device=self.accelerator.device)
        return int(self.accelerator.gather(views).max()) if self.accelerator.num_processes > 1 else int(views)

    def _score_view(
        self,
        model,
        rollout: Rollout,
        n: int,
        iteration: int,
        batch_size: int | None = None,
        reference: Reference | None = None,
    ) -> TokenScores:
        """Scores of view n of a rollout whose prompt is already perturbed."""
        view = self.estimator.view(rollout, n, rollout.view_seed, iteration)
        # What the loss does not count is not scored: it would cost head rows, and an improbable token behind the EOS
        # would overflow exp(reference - policy), whose product with TRL's mask is NaN and not 0.
        counted = rollout.counted.gather(1, view.index)
        view = replace(view, targets=view.targets.masked_fill(~counted, IGNORE))
        temperature = self.args.score_temperature or rollout.temperature
        canvas_length = rollout.completion_ids.shape[1]
        with self.accelerator.autocast():
            scores = score_view(
                model,
                view,
                canvas_length,
                self.spec,
                temperature,
                batch_size,
                differentiable_entropy=self._entropy_bonus_enabled,
                reference=reference,
            )
        if self.model.training:  # the run's cost is that of training
            width, training = view.input_ids.shape[1], torch.is_grad_enabled()
            for scored in scores.scored.split(batch_size or len(scores.scored)):  # one forward each
                self.flops.counted += self._count_flops.view(
                    len(scored), width, int(scored.sum()), training, reference=reference is not None
                )
        return scores

    def _score_views(self, model, rollout: Rollout, iteration: int, views: int, *args) -> TokenScores:
        """Scores of all views of a rollout whose prompt is already perturbed; `args` as in `_score_view`."""
        total = None
        for n in range(views):
            scores = self._score_view(model, rollout, n, iteration, *args)
            total = scores if total is None else total + scores
        return total

    @property
    def _reference(self) -> Reference | None:
        """How to run the reference model beside the policy, for the full-vocabulary KL."""
        if self.args.kl_estimator != "full" or self.beta == 0:
            return None

        def run(inputs: dict, rows: Tensor):
            if self.ref_model is not None:
                with torch.no_grad():
                    # Called as a module: where the head is sharded, its hooks gather it.
                    return hidden_rows(self.ref_model, inputs, rows), unwrap(self.ref_model).get_output_embeddings()
            adapted = self.accelerator.unwrap_model(self.model)
            with torch.no_grad(), use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
                hidden = hidden_rows(adapted, inputs, rows)
            # The policy's own head: adapters are not put on it.
            return hidden, unwrap(adapted).get_output_embeddings().forward

        return run

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """Log-probs of the batch that is scored or trained on; TRL's own tensors only say how wide it wants them."""
        if self._loss_scores is not None:  # TRL's loss, evaluated on log-probs that are already there
            return self._loss_scores.logps, self._loss_scores.entropies, None
        # The generation batch under the old or the reference policy: on the full canvas, for every inner iteration.
        # TRL gets a placeholder of the width that it cut its completions to; `_generate_and_score_completions` puts
        # the real ones in.
        check_estimator(self.estimator, self._rollout, self.spec)
        asked_for_old = self._needs_old and not self._scored
        if not (self.args.scores_old if asked_for_old else self.args.scores_reference):
            self._scored.append(self._rollout.logps[:, None])
            return input_ids.new_zeros(input_ids.shape[0], logits_to_keep, dtype=torch.float32), None, None
        views = self._num_views(self._rollout)
        draws = []
        for k in range(self._num_draws):
            rollout = perturb_prompt(self._rollout, self.args.p_mask_prompt, self._rollout.view_seed, k)
            draws.append(self._score_views(model, rollout, k, views, batch_size).logps)
        self._scored.append(torch.stack(draws, dim=1))
        return input_ids.new_zeros(input_ids.shape[0], logits_to_keep, dtype=torch.float32), None, None

    # -------------------------------------------------------------------------------------------------------------
    # loss

    def _wd1_weights(self, advantages: Tensor) -> Tensor:
        """wd1's weights of completions: softmax(A) - softmax(-A) over each group, times its size.

        With `dr_grpo` at ratio 1 they give wd1's loss, -Σ w⁺ log π + Σ w⁻ log π, averaged over groups and divided by
        L.
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = self.accelerator.gather(advantages).view(-1, size)
        weights = size * (groups.softmax(dim=1) - (-groups).softmax(dim=1)).flatten()
        start = self.accelerator.process_index * len(advantages)
        return weights[start : start + len(advantages)]

    @property
    def _inner_iteration(self) -> int:
        """Which pass over the generation buffer this is; it advances once every `steps_per_generation` micro-steps."""
        return (self._step // self.args.steps_per_generation) % self.num_iterations if self.model.training else 0

    @property
    def _separable(self) -> bool:
        """Whether dL/dlogp of a token is known from that token alone."""
        return (
            self.estimator.disjoint
            and self.loss_type in SEPARABLE_LOSSES
            and self.importance_sampling_level == "token"
            and self.off_policy_mask_threshold is None
            and self.top_entropy_quantile == 1.0
            and not self._entropy_bonus_enabled
        )

    def _compute_loss(self, model, inputs):
        draw = min(self._inner_iteration, self._num_draws - 1)
        inputs = dict(inputs)
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if name in inputs:
                inputs[name] = inputs[name][:, draw]
        rollout = Rollout(
            prompt_ids=inputs["prompt_ids"],
            prompt_mask=inputs["prompt_mask"],
            completion_ids=inputs["completion_ids"],
            unmask_step=inputs["unmask_step"],
            logps=inputs["rollout_logps"],
            counted=inputs["counted"],
            view_seed=inputs["view_seed"],
            mask_token_id=self.spec.mask_token_id,
            temperature=self.temperature,
        )
        check_estimator(self.estimator, rollout, self.spec)
        if self.estimator.sub_samples(self.max_completion_length):
            scored = self.estimator.scored(rollout, rollout.view_seed, draw)
            inputs["completion_mask"] = sub_sample_weights(inputs["completion_mask"], scored)
        views = self._num_views(rollout)
        perturbed = perturb_prompt(rollout, self.args.p_mask_prompt, rollout.view_seed, draw)

        def loss(scores: TokenScores, record: bool = True) -> Tensor:
            return self._loss_of(model, inputs, rollout, scores, record)

        if views == 1 or not torch.is_grad_enabled():
            return loss(self._score_views(model, perturbed, draw, views, None, self._reference))
        return self._segmented_loss(model, inputs, perturbed, draw, views, loss)

    def _loss_of(self, model, inputs, rollout: Rollout, scores: TokenScores, record: bool) -> Tensor:
        """TRL's loss of log-probs that are already there; metrics are kept only if `record`."""
        with self._set(_loss_scores=scores, **({} if record else {"_metrics": _scratch_metrics()})):
            if record:
                self._record_mismatch(scores, rollout)
            if scores.kls is None:
                return super()._compute_loss(model, inputs)
            with self._set(beta=0.0):
                policy = super()._compute_loss(model, inputs)
            mode, mask = "train" if self.model.training else "eval", inputs["completion_mask"]
            sums = torch.stack([(scores.kls.detach() * mask).sum(), mask.sum().to(scores.kls.dtype)])
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._metrics[mode]["kl"].append(total / max(count, 1))
            return policy + self.beta * self._averaged(model, inputs, scores.kls)

    def _averaged(self, model, inputs, values: Tensor) -> Tensor:
        """`values` (B, L) summed and normalised as TRL's loss does it with a token's loss.

        TRL's loss itself says how: at ratio 1, without KL, entropy bonus or filters, a token's loss is minus its
        advantage.
        """
        zeros = torch.zeros_like(values)
        inputs = {**inputs, "advantages": -values, "old_per_token_logps": zeros.detach()}
        with self._set(
            _loss_scores=TokenScores(zeros.detach(), zeros.detach(), zeros.bool()),
            _metrics=_scratch_metrics(),
            _entropy_bonus_enabled=False,
            beta=0.0,
            importance_sampling_level="token",
            loss_type={"cispo": "dapo", "vespo": "dapo", "sapo": "grpo"}.get(self.loss_type, self.loss_type),
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
        ):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _set(self, **attributes):
        """Attributes of the trainer, set for the duration of a call into TRL."""
        before = {name: getattr(self, name) for name in attributes}
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(before)

    def _segmented_loss(self, model, inputs, perturbed: Rollout, draw: int, views: int, loss) -> Tensor:
        """TRL's loss, one forward and one backward at a time; see `segmented_backward`."""
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED

        @contextmanager
        def defer_sync():
            # Otherwise DDP would reduce gradients, and DeepSpeed's wrapper step the optimizer, once a view.
            state = self.accelerator.gradient_state
            before = state.sync_gradients
            state._set_sync_gradients(False)
            try:
                # FSDP's no_sync would keep whole gradients in memory; reducing them once a view costs traffic only.
                with nullcontext() if deepspeed or self.is_fsdp_enabled else self.accelerator.no_sync(model):
                    yield
            finally:
                state._set_sync_gradients(before)

        def backward(surrogate: Tensor) -> None:
            self.accelerator.backward(surrogate, **({"scale_wrt_gas": False} if deepspeed else {}))

        filler = None
        if self._separable:
            filler = inputs.get("old_per_token_logps", torch.zeros_like(perturbed.logps))
        return segmented_backward(
            views,
            lambda n: self._score_view(model, perturbed, n, draw, reference=self._reference),
            loss,
            backward,
            defer_sync,
            filler,
        )

    # ----------------------------------------------------------------------------------------------------------
    # metrics

    def _record_generation(self, rollout: Rollout, training: bool) -> None:
        """Log the sampler's speed and the run's floating-point operations so far, over all processes."""
        metrics = self._metrics["train" if training else "eval"]
        decoded = rollout.revealed.sum() / rollout.num_steps.sum()
        metrics["sampling/tokens_per_forward"].append(self.accelerator.gather(decoded).mean().item())
        metrics["sampling/steps"].append(self.accelerator.gather(rollout.num_steps.float().mean()).mean().item())
        if not training:
            return
        self.flops.counted += rollout.flops
        self.flops.paper += self.args.paper_flops(
            len(rollout), self._parameters, self._frozen_backbone, self.estimator
        ).total
        totals = torch.tensor([[self.flops.counted, self.flops.paper]], dtype=torch.float64)
        totals = self.accelerator.gather(totals.to(self.accelerator.device)).sum(dim=0).tolist()
        metrics["flops"] = [totals[0]]
        metrics["flops_paper"] = [totals[1]]

    @torch.no_grad()
    def _record_mismatch(self, scores: TokenScores, rollout: Rollout) -> None:
        """Log how far the sampler's own log-probs are from the policy's, where the sampler's serve as the old
        policy's.

        Before the first update of a cycle the two are the same policy, and what differs is rounding or a cache.
        """
        cycle = self.args.steps_per_generation * self.num_iterations
        before_update = self._step % cycle < self.args.gradient_accumulation_steps
        if self.args.old_logps != "rollout" or not self.model.training or not before_update:
            return
        ratio = (scores.logps - rollout.logps)[rollout.counted]
        kl = (ratio.exp() - 1 - ratio).mean().nan_to_num()
        metrics = self._metrics["train"]
        metrics["sampling/mismatch_kl"].append(self.accelerator.gather(kl).mean().item())
        metrics["sampling/mismatch_max"].append(self.accelerator.gather(ratio.abs().max()).max().item())

    # -------------------------------------------------------------------------------------------------------- model
    # card

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's model card, with this library's way to generate instead of an autoregressive pipeline."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if not self.is_world_process_zero():
            return
        rewrite_quick_start(self.args.output_dir, self.hub_model_id or model_name, self.sampling.max_new_tokens)
