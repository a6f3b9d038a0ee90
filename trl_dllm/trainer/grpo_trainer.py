"""TRL's GRPOTrainer for masked diffusion language models.

Rewards, advantages, losses, the generation buffer, PEFT, quantisation and the distributed back-ends stay TRL's. Of
its step five methods are overridden, here in the order in which they are met:

- `_prepare_inputs`: the micro-batches of a new generation batch get the old and the reference policy's log-probs,
  which an estimator computes.
- `_generate_and_score_completions`: the canvas and its trajectory are put beside each completion and travel with it.
- `_generate_single_turn`: completions are drawn by masked diffusion decoding.
- `_compute_loss`: an estimator scores the micro-batch, one view at a time, and TRL's loss is evaluated on the scores.
- `_get_per_token_logps_and_entropies`: where TRL's loss asks for log-probs, it is given those scores.

TRL's loss does nothing with its `model` but hand it on to the last of them. So the scores are passed as the `model`,
and nothing is remembered between the two calls.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models.utils import unwrap_model_for_generation

from ..generation import generate
from ..likelihood import Estimator, Plan, TokenScores, assembled, check_estimator, compact, score_view
from ..models import FlopsCounter, MaskedDiffusionSpec, TrainingFlops, backbone_parameters, unwrap
from ..models.lora import register_lora_targets
from ..noise import row_seeds
from ..rollout import Rollout, left_pad
from ..trace import Layout
from .architecture import check_architecture
from .base import HOOKS, DiffusionTrainer
from .buffer import cycle_state, from_batch, load_cycle_state, to_batch
from .completions import save_completions
from .data import check_grpo_data, check_text
from .engine import check_engine, checked_rollouts
from .finite import check_loss, rollout_of
from .grpo_config import DiffusionGRPOConfig
from .loss import (
    backward,
    carried,
    deferred_sync,
    is_separable,
    rows_without_gradient,
    sub_sampled_mask,
    token_weights,
    wd1_advantages,
    with_sequence_ratio,
)
from .metrics import record_entropy, record_flops, record_generation, record_kl, record_mismatch, record_order
from .model_card import complete_card
from .old_and_reference import add_logps
from .profile import Profile
from .reference import load_reference, reference_beside, reference_source, save_reference
from .reward_checks import checked_rewards
from .rewards import give_trajectory
from .segmented_backward import segmented_backward
from .stock import (
    Interface,
    check_trl,
    known_arguments,
    leave_out_router_loss,
    own_config,
    read_config,
    read_tokenizer,
    refuse_processor,
    refuse_prompt_learning,
    refuse_sharded_integers,
    without_dropout,
)


_OVERRIDDEN: Interface = {
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_prepare_inputs": ("generation_batch",),
    "_compute_loss": ("model", "inputs"),
    "create_model_card": ("model_name", "dataset_name", "tags"),
    "log": ("logs",),
    **HOOKS,
}

_NOT_APPLICABLE = ("tools", "environment_factory")

register_lora_targets()


class DiffusionGRPOTrainer(DiffusionTrainer, GRPOTrainer):
    """
    GRPO for masked diffusion language models (LLaDA, Dream, …), with any likelihood of `trl_dllm.likelihood`.
    docs/metrics.md explains what it logs.

    Takes the arguments of TRL's [`~trl.GRPOTrainer`] (except tools and environments, which assume an autoregressive
    sampler; a `rollout_func` also returns its trajectories, see `engine.py`) and, besides:

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

    args: DiffusionGRPOConfig
    model: PreTrainedModel
    _tag_names = ["trl", "grpo", "trl-dllm", "masked-diffusion"]  # noqa: RUF012  TRL declares it so
    _name = "Diffusion GRPO"
    layout: Layout | None = None  # set by the script, which knows the task

    def __init__(self, model, reward_funcs=None, args=None, *positional, estimator: Estimator | None = None, **kwargs):
        check_trl(GRPOTrainer, _OVERRIDDEN)
        args = own_config(args, DiffusionGRPOConfig, GRPOConfig, model, "GRPO")
        signature = inspect.signature(GRPOTrainer.__init__)
        given = signature.bind_partial(None, model, reward_funcs, args, *positional, **kwargs).arguments
        for name in _NOT_APPLICABLE:
            if given.get(name):
                raise ValueError(
                    f"{name}={given[name]!r} does not apply to a diffusion model: it joins several generations or "
                    "samples by itself, and the trajectory of the completion would be lost. Remove it."
                )
        refuse_processor(given.get("processing_class"))
        refuse_prompt_learning(model, given.get("peft_config"))
        if estimator is not None and not isinstance(estimator, Estimator):
            raise TypeError(
                f"estimator={estimator!r} must be an Estimator instance, like StepMerge(num_segments=8); a name goes "
                "into DiffusionGRPOConfig(estimator=…)."
            )
        config = read_config(model, args)
        leave_out_router_loss(config, args)
        tokenizer = given.get("processing_class") or read_tokenizer(model, args)
        self.spec = MaskedDiffusionSpec.from_config(config, tokenizer)
        refuse_sharded_integers(config, args, given.get("quantization_config"))
        self.estimator = estimator if estimator is not None else args.build_estimator()
        self.estimator.check(self.spec)
        args.check_estimator(self.estimator)
        if args.sync_ref_model and (given.get("peft_config") or hasattr(model, "peft_config")):
            raise ValueError(
                "sync_ref_model=True with an adapter: the reference is the model without it, which never changes. Set "
                "sync_ref_model=False, or train the whole model."
            )
        check_engine(args, given.get("rollout_func"))
        check_architecture(model, config, args, given.get("peft_config"))
        check_grpo_data(given, args, config, tokenizer)
        args.generation_config().check_model(self.spec)
        self._rollout: Rollout | None = None  # the generation batch, while TRL scores it
        self._rewards: Tensor | None = None  # and its rewards
        # (global step, generation batches drawn in it), of training and of evaluation: a run with evaluation, or
        # resumed after one, draws the same completions in training.
        self._generation_round = [(-1, 0), (-1, 0)]
        self._window_step = -1  # the optimizer step that the last micro-step belonged to
        self.flops = FlopsCounter()

        # TRL loads a reference where beta is not 0; as the ratio's denominator it is needed at 0 as well.
        beta, needs_reference = args.beta, args.beta != 0 or args.ratio_denominator == "ref"
        rewards = give_trajectory(checked_rewards(reward_funcs, args.reward_weights), self._trajectory)
        with reference_source(model, needs_reference and given.get("peft_config") is None):
            args.beta = beta or float(needs_reference)
            try:
                super().__init__(model, rewards, args, *positional, **kwargs)
            finally:
                args.beta = beta
        self.beta, self.profile = beta, Profile(self)
        if self.rollout_func is not None:
            self.rollout_func = checked_rollouts(self.rollout_func)
        # TRL refuses LoRA on the output head, but not a copy of it that is trained in full.
        if args.kl_estimator == "full" and hasattr(unwrap(self.model).get_output_embeddings(), "modules_to_save"):
            raise ValueError(
                "kl_estimator='full' applies the model's own output head to the reference's hidden states, and "
                "peft_config trains a copy of that head. Leave it out of modules_to_save, or set kl_estimator='k3'."
            )
        self.loss_type, self.importance_sampling_level = carried(args)

        # Again, now with the checkpoint's own tokenizer.
        self.spec = MaskedDiffusionSpec.from_model(self.model, self._tokenizer)
        self.spec.write_to(self.model)
        self.sampling = args.generation_config(self.eos_token_ids)
        self._count_flops = TrainingFlops(self.model)
        self._parameters = backbone_parameters(self.model)
        self._frozen_backbone = any(not p.requires_grad for p in self.model.parameters())

    @property
    def _steps_per_generation(self) -> int:
        """Micro-batches that a generation batch is split into; TRL's config has filled the number in."""
        return self.args.steps_per_generation or 1

    @property
    def _cycle(self) -> int:
        """Micro-steps from one generation batch to the next."""
        return self._steps_per_generation * self.num_iterations

    def process_state(self, folder: str) -> dict[str, Any]:
        save_reference(self, folder)
        return {"flops": self.flops.state_dict(), "cycle": cycle_state(self)}

    def load_process_states(self, states: list[dict[str, Any]], folder: str) -> None:
        load_reference(self, folder)
        counters = [state["flops"] for state in states]
        self.flops.load_state_dict({name: sum(c[name] for c in counters) for name in ("counted", "paper")})
        load_cycle_state(self, states[0]["cycle"] if states else None)

    def train(self, *args, **kwargs):
        self.args.validate()  # again: options may have been set since
        self.args.check_estimator(self.estimator)
        check_engine(self.args, self.rollout_func)
        self.sampling = self.args.generation_config(self.eos_token_ids)
        # TRL keeps them from one call to the next, whose steps count from 0 again; a checkpoint brings its own.
        self._step, self._buffered_inputs, self._window_step = 0, None, -1
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        for _ in range(self.finished_epochs):  # each takes an order of the prompts from one generator
            next(iter(sampler), None)
        return sampler

    def evaluation_loop(self, *args, **kwargs):
        self._generation_round[1] = (-1, 0)  # every evaluation at a step draws the same completions
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        self.profile.record()
        return super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------------------ the generation batch

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        (rollout, self._rollout), (rewards, self._rewards) = (self._rollout, None), (self._rewards, None)
        save_completions(self, rollout, rewards, inputs, outputs["advantages"])
        if self.args.loss_tokens == "canvas":
            rollout = replace(rollout, counted=rollout.revealed)

        # TRL zeroes the mask of truncated completions (mask_truncated_completions).
        outputs |= to_batch(rollout, kept=outputs["completion_mask"].any(dim=1, keepdim=True))
        outputs["num_items_in_batch"] = self.accelerator.gather(outputs["completion_mask"].sum()).sum()
        for name in ("old_per_token_logps", "ref_per_token_logps"):  # placeholders; `add_logps` has the real ones
            outputs.pop(name, None)
        outputs["skipped"] = rows_without_gradient(self, rewards, outputs["completion_mask"])
        if self.args.loss_type == "wd1":
            outputs["advantages"] = wd1_advantages(self, outputs["advantages"])
        if self.model.training:  # the run's cost is that of training
            self.flops.counted += rollout.flops
            facts = (self._parameters, self._frozen_backbone, self.estimator, self.spec.blocks)
            paper = self.args.paper_flops(len(rollout), *facts)
            self.flops.paper += paper.total
        record_generation(self, rollout, outputs["skipped"])
        return outputs

    def _calculate_rewards(self, *args, **kwargs):
        record_order(self, self._rollout)
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate(self, prompts, *args, **kwargs):
        for row, prompt in enumerate(prompts):  # those of a stream have not been seen before
            check_text(f"row {row} of a batch: prompt", prompt)
        return super()._generate(prompts, *args, **kwargs)

    def _trajectory(self) -> list[list[int]]:
        """The steps that revealed each position of the generation batch, for rewards that ask."""
        assert self._rollout is not None  # rewards are computed while the batch is made
        return self._rollout.unmask_step.tolist()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        """Draw the generation batch; TRL gets the completions cut behind their first EOS, the canvas is kept."""
        device = self.accelerator.device
        ids, mask = left_pad(prompt_ids, self._tokenizer.pad_token_id)
        options = known_arguments(
            unwrap_model_for_generation,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # TRL 1.16
        )
        with (
            profiling_context(self, "diffusion.generate"),
            self.profile.part("sampling"),
            rollout_of(self, prompt_ids),
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, **options) as model,
            torch.no_grad(),
            without_dropout(model),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            rollout = generate(
                model,
                ids.to(device),
                mask.to(device),
                self.sampling,
                seeds=self._row_seeds(len(prompt_ids), device),
                spec=self.spec,
                batch_size=self.args.sampler_batch_size,
                still_running=self._any_process,
            )
        completions = [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.counted, strict=True)]
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

    # ----------------------------------------------------------------------------------------------- the micro-batch

    @property
    def _full_kl(self) -> bool:
        """Whether the KL over the whole vocabulary is added to TRL's loss."""
        return self.args.kl_estimator == "full" and self.beta != 0

    @property
    def _num_draws(self) -> int:
        """Draws of what is random in the views, taken in turn by the inner iterations."""
        return self.args.num_draws(self.estimator) if self.model.training else 1

    def _prepare_inputs(self, generation_batch):
        fresh = not self.model.training or self._buffered_inputs is None or self._step % self._cycle == 0
        inputs = super()._prepare_inputs(generation_batch)
        if fresh:
            add_logps(self, self._buffered_inputs if self.model.training else [inputs])
            if self.model.training:
                record_flops(self)
        return inputs

    def _plan(self, rollout: Rollout, draw: int, batch: dict[str, Tensor]) -> tuple[Plan, int]:
        """The forwards of a micro-batch, and how many are made: as many on each process as on the one with most."""
        check_estimator(self.estimator, rollout, self.spec)
        plan = Plan(self.estimator, rollout, draw, len(rollout), self.args.p_mask_prompt, skipped=batch.get("skipped"))
        needed = torch.tensor([max(1, len(plan))], device=self.accelerator.device)
        return plan, int(self.accelerator.gather(needed).max())

    def _score_view(self, model, plan: Plan, number: int, full_kl: bool = False) -> TokenScores:
        """Scores of one forward; with `full_kl` also the KL from the reference."""
        view, owner = plan[number]
        view, rollout = compact(view), plan.rollout
        with self.accelerator.autocast():
            scores = score_view(
                model,
                view,
                rollout.completion_ids.shape[1],
                self.spec,
                self.args.score_temperature or rollout.temperature,
                differentiable_entropy=self._entropy_bonus_enabled,
                reference=reference_beside(self) if full_kl else None,
                support=rollout.support,
                owner=owner,
                rows=plan.num_rows,
            )
        if self.model.training:  # the run's cost is that of training
            rows, width = view.input_ids.shape
            training = torch.is_grad_enabled()
            self.flops.counted += self._count_flops.view(rows, width, view.num_targets, training, full_kl)
        return scores

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        if isinstance(model, TokenScores):  # TRL's loss, which was given its scores as the model
            return model.logps, model.entropies, None
        # TRL makes the generation batch. It does nothing with old and reference log-probs but put them into it, where
        # `_generate_and_score_completions` puts the estimator's.
        return input_ids.new_zeros(len(input_ids), logits_to_keep, dtype=torch.float32), None, None

    # ---------------------------------------------------------------------------------------------------------- loss

    @property
    def _inner_iteration(self) -> int:
        """Which pass over the generation buffer this is; it advances once every `steps_per_generation` micro-steps."""
        return (self._step // self._steps_per_generation) % self.num_iterations if self.model.training else 0

    @property
    def _separable(self) -> bool:
        return self.estimator.disjoint and not self.estimator.apart and is_separable(self)

    def _compute_loss(self, model, inputs):
        draw, first = self._inner_iteration % self._num_draws, self._inner_iteration == 0
        batch, inputs = inputs, dict(inputs)
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if name in inputs:
                inputs[name] = inputs[name][:, draw]
        unmoved = self.model.training and self._generation_round[0][0] == self.state.global_step
        finds_old = unmoved and first and self.args.scores_old
        if finds_old:
            inputs.pop("old_per_token_logps")  # the old policy is the current one: TRL takes its scores for both
        if self.model.training:
            self._window_step = self.state.global_step
        rollout = from_batch(inputs, self.sampling.facts(self.spec))
        if self.estimator.sub_samples(self.max_completion_length):
            inputs["completion_mask"] = sub_sampled_mask(inputs["completion_mask"], self.estimator, rollout, draw)
        plan, forwards = self._plan(rollout, draw, inputs)

        def score(number: int) -> TokenScores:
            with self.profile.part("forward"):
                return self._score_view(model, plan, number, full_kl=self._full_kl)

        def loss(scores: TokenScores, record: bool) -> Tensor:
            scores = assembled(plan, scores)
            value = self._loss_of(scores, inputs, record)
            if record:
                parts = {**inputs, "log_probs": scores.logps, "kl": scores.kls}
                check_loss(self, value, rollout.prompt_ids, rollout.prompt_mask, parts)
                if finds_old:
                    batch["old_per_token_logps"][:, draw] = scores.logps.detach()
                if unmoved and self.args.old_logps == "rollout":
                    ran = rollout.counted & ~inputs["skipped"][:, None] if "skipped" in inputs else rollout.counted
                    record_mismatch(self, (scores.logps - rollout.logps)[ran])
            return value

        if forwards == 1 or not torch.is_grad_enabled():
            return loss(TokenScores.sum(map(score, range(forwards))), record=True)
        return self._segmented_loss(model, inputs, forwards, score, loss)

    def _loss_of(self, scores: TokenScores, inputs: dict, record: bool) -> Tensor:
        """TRL's loss of log-probs that are already there, and the KL over the vocabulary where it is asked for."""
        trainer, inputs = self if record else self._without_metrics(), with_sequence_ratio(self, scores.logps, inputs)
        if scores.kls is None:
            value = GRPOTrainer._compute_loss(trainer, scores, inputs)
            if record:
                record_entropy(self, scores.entropies, inputs)
            return value
        # Its own KL, from a reference that is the policy, is 0, and so is that KL's gradient.
        loss = GRPOTrainer._compute_loss(trainer, scores, {**inputs, "ref_per_token_logps": scores.logps.detach()})
        if record:
            record_kl(self, scores.kls, inputs["completion_mask"])
        return loss + self.beta * (token_weights(self, inputs) * scores.kls).sum()

    def _without_metrics(self) -> "DiffusionGRPOTrainer":
        """A copy whose loss can be evaluated without a trace: metrics and entropy controller are its own."""
        twin = copy.copy(self)
        twin._metrics = {mode: defaultdict(list) for mode in self._metrics}
        return twin

    def _segmented_loss(self, model, inputs: dict, views: int, score: Callable, loss: Callable) -> Tensor:
        """TRL's loss, one forward and one backward at a time; see `segmented_backward`."""
        unscored_logps = None
        if self._separable:
            unscored_logps = inputs.get("old_per_token_logps", torch.zeros_like(inputs["rollout_logps"]))
        return segmented_backward(
            views, score, loss, partial(backward, self), partial(deferred_sync, self, model), unscored_logps
        )

    # ---------------------------------------------------------------------------------------------------- model card

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's model card, with this library's way to generate instead of an autoregressive pipeline."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_card(self)
