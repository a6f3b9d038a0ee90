"""TRL's DPOTrainer for masked diffusion language models: VRPO (LLaDA 1.5).

Datasets, tokenisation, losses, PEFT, quantisation, checkpoints and the distributed back-ends stay TRL's. Three of its
methods are overridden, where it asks a model for log-probs:

- `compute_ref_log_probs`: the reference's, of a batch;
- `_compute_loss`: the policy's, one view at a time, on the reference's draws;
- `_precompute_ref_logps`: whose file is one of this estimator, these draws and this seed.

TRL's loss does nothing with its `model` but call it. So a function that answers with an estimator's scores is passed
as the `model`, and no forward is patched.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..generation.saved import read_decoding
from ..likelihood import TokenScores, score_view
from ..likelihood.view import IGNORE
from ..models import Attention, MaskedDiffusionSpec, unwrap
from ..models.lora import register_lora_targets
from ..models.spec import check_full_attention
from ..noise import hash64, row_seeds
from ..rollout import Rollout
from .architecture import check_architecture
from .base import HOOKS, DiffusionTrainer
from .data import check_dpo_data
from .dpo_config import DiffusionDPOConfig
from .finite import check_loss
from .loss import backward, deferred_sync
from .model_card import VRPO, complete_card
from .reference import load_reference, reference_source, save_reference
from .segmented_backward import segmented_backward
from .stock import (
    Interface,
    check_trl,
    leave_out_router_loss,
    own_config,
    read_config,
    read_tokenizer,
    refuse_parallelism,
    refuse_processor,
    refuse_prompt_learning,
    refuse_sharded_integers,
)


_OVERRIDDEN: Interface = {
    "compute_ref_log_probs": ("model", "inputs"),
    "_compute_loss": ("model", "inputs", "return_outputs"),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "create_model_card": ("model_name", "dataset_name", "tags"),
    "floating_point_ops": ("inputs",),
    **HOOKS,
}

# TRL's metrics of a distribution over the next token, which a bound has not.
_NOT_LOGGED = ("logits/chosen", "logits/rejected", "mean_token_accuracy")

register_lora_targets()


class DiffusionDPOTrainer(DiffusionTrainer, DPOTrainer):
    """
    Preference optimisation of masked diffusion language models (LLaDA, Dream, …): VRPO, with every loss of TRL's DPO.

    Takes the arguments of TRL's [`~trl.DPOTrainer`] and its dataset formats. The log-probability of an answer is an
    estimate of its evidence lower bound, from `num_samples` masks, each of a masking level of its own; policy and
    reference are scored on the same masks, which takes most of the variance out of their difference. A step costs
    `num_samples` forwards of the reference and, if there are several, twice as many of the policy, and takes the
    memory of one.

    Logs TRL's metrics without `logits/*` and `mean_token_accuracy`; `entropy` is that of the masked tokens'
    distributions, in nats and weighted like the bound.

    The masks of a row are a function of (seed, `global_step`, its tokens): the same on any number of processes, in any
    split into micro-batches, and after a resume. In evaluation, and everywhere with `precompute_ref_log_probs`, they
    are one of (seed, its tokens). The first token of a row is never masked, as TRL does not score it either; it
    matters where the prompt is empty.

    Args:
        args ([`DiffusionDPOConfig`]): a stock `DPOConfig` works too and gets the diffusion defaults.

    Raises:
        ValueError: before any weight is loaded, a model that is no masked diffusion model, or an option that does not
            apply.
        RuntimeError: an installed TRL whose methods are not the ones overridden here.

    Example:

    ```python
    from trl_dllm import DiffusionDPOConfig, DiffusionDPOTrainer

    trainer = DiffusionDPOTrainer(
        model="GSAI-ML/LLaDA-8B-Instruct",
        args=DiffusionDPOConfig(num_samples=8, beta=0.2, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    args: DiffusionDPOConfig
    model: PreTrainedModel
    likelihood_paper = VRPO
    _tag_names = ["trl", "dpo", "trl-dllm", "masked-diffusion"]  # noqa: RUF012  TRL declares it so
    _name = "Diffusion DPO"

    def __init__(self, model, ref_model=None, args=None, *positional, **kwargs):
        check_trl(DPOTrainer, _OVERRIDDEN)
        args = own_config(args, DiffusionDPOConfig, DPOConfig, model, "DPO")
        bound = inspect.signature(DPOTrainer.__init__).bind_partial(
            None, model, ref_model, args, *positional, **kwargs
        )
        given = bound.arguments
        if given.get("compute_metrics") is not None:
            raise ValueError("compute_metrics does not apply to diffusion DPO: logits never exist in full. Remove it.")
        refuse_processor(given.get("processing_class"))
        refuse_prompt_learning(model, given.get("peft_config"))
        config = read_config(model, args)
        leave_out_router_loss(config, args)
        if given.get("processing_class") is None:
            given["processing_class"] = read_tokenizer(model, args)
        self.spec = MaskedDiffusionSpec.from_config(config, given["processing_class"])
        check_full_attention("DPO", self.spec.block_size, "Use a family with full attention (LLaDA, Dream, …)")
        refuse_sharded_integers(config, args, given.get("quantization_config"))
        adapted = given.get("peft_config") is not None or hasattr(model, "peft_config")
        if args.sync_ref_model and adapted:
            raise ValueError(
                "sync_ref_model=True with an adapter: the reference is the model without it, which never changes. Set "
                "sync_ref_model=False, or train the whole model."
            )
        if ref_model is not None and MaskedDiffusionSpec.from_model(ref_model) != self.spec:
            raise ValueError(
                f"ref_model has {MaskedDiffusionSpec.from_model(ref_model)}, the model {self.spec}: they cannot be "
                "run on the same masks. Use a reference of the same family and tokenizer."
            )
        check_architecture(model, config, args, given.get("peft_config"))
        check_dpo_data(given, args)
        self.estimator = args.build_estimator()
        # TRL loads the reference within this call, under FSDP to compute it in advance too.
        with reference_source(model, ref_model is None and not adapted):
            super().__init__(*bound.args[1:], **bound.kwargs)
        self.spec = MaskedDiffusionSpec.from_model(self.model, self._tokenizer)
        self.spec.write_to(self.model)
        refuse_parallelism(self.accelerator)

    def process_state(self, folder: str) -> dict[str, Any]:
        save_reference(self, folder)
        return {"num_tokens": self._total_train_tokens}

    def load_process_states(self, states: list[dict[str, Any]], folder: str) -> None:
        load_reference(self, folder)
        if states:
            self._total_train_tokens = states[0]["num_tokens"]

    def known_decoding(self) -> dict[str, Any]:
        """The decoding that the model was trained with before, which preferences do not change."""
        name = unwrap(self.model).config._name_or_path
        return read_decoding(name) if name else {}

    # ----------------------------------------------------------------------------------------------------- the bound

    @property
    def _fixed_draws(self) -> bool:
        """Whether a row is masked alike whenever it is met."""
        return self.args.precompute_ref_log_probs or not self.model.training

    def _rollout(self, input_ids: Tensor, attention_mask: Tensor, counted: Tensor) -> Rollout:
        """A batch as a rollout whose canvas is the whole row, (B, S): prompts differ in length within a pair's batch.

        Only `counted` positions are ever masked, so the prompt, though canvas, is always seen.
        """
        counted = counted.bool()
        counted[:, 0] = False  # TRL reads no log-prob of it, and where logits are shifted no row predicts it
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        content = (hash64(columns, input_ids, counted) * attention_mask).sum(dim=1)
        split, step = (1, 0) if self._fixed_draws else (0, self.state.global_step)
        return Rollout(
            prompt_ids=input_ids[:, :0],
            prompt_mask=attention_mask[:, :0].bool(),
            completion_ids=input_ids,
            unmask_step=torch.zeros_like(input_ids),
            logps=torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device),
            counted=counted,
            view_seed=row_seeds(self.args.seed, split, step, 0, content),
            mask_token_id=self.spec.mask_token_id,
        )

    def _score_view(self, model: nn.Module, rollout: Rollout, attention_mask: Tensor, number: int) -> TokenScores:
        """Weighted log-probs of one draw, (B, S); those of all draws sum to the estimate of a row's bound."""
        view = self.estimator.view(rollout, number, rollout.view_seed, 0)
        view = replace(view, attention=Attention.padding(attention_mask))
        with self.accelerator.autocast():
            return score_view(model, view, rollout.completion_ids.shape[1], self.spec)

    def compute_ref_log_probs(self, model, inputs):
        """The reference's bounds of a batch's chosen and rejected answers, (B,) each, on the policy's draws."""

        def scored(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> FusedCausalLMOutput:
            rollout = self._rollout(input_ids, attention_mask, labels != IGNORE)
            views = range(self.estimator.num_views(rollout))
            return _as_output(TokenScores.sum(self._score_view(model, rollout, attention_mask, n) for n in views))

        return super().compute_ref_log_probs(scored, inputs)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL's file is one of the data set and the weights.
        args, weights = self.args, self._precompute_model_hash
        draws = (type(self.estimator).__name__, args.num_samples, args.seed)
        reading = (args.max_length, args.truncation_mode, args.ld_alpha)
        self._precompute_model_hash = Hasher.hash((weights, *draws, *reading, self.spec))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights

    # ---------------------------------------------------------------------------------------------------------- loss

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's loss of the bounds, one forward and one backward at a time; there are no outputs but the loss."""
        inputs = dict(inputs)
        mask, completion = inputs["attention_mask"], inputs["completion_mask"]
        if not self.args.precompute_ref_log_probs:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        rollout = self._rollout(inputs["input_ids"], mask, completion)
        views = self.estimator.num_views(rollout)

        def score(number: int) -> TokenScores:
            return self._score_view(model, rollout, mask, number)

        def loss(scores: TokenScores, record: bool) -> Tensor:
            value = self._loss_of(scores, inputs)
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            parts = {"log_probs": scores.logps, "reference log_probs": reference}
            check_loss(self, value, inputs["input_ids"], mask, parts)
            return value

        if views == 1 or not torch.is_grad_enabled():
            value = loss(TokenScores.sum(map(score, range(views))), record=True)
        else:
            value = self._segmented_loss(model, views, score, loss)
        return (value, None) if return_outputs else value

    def _loss_of(self, scores: TokenScores, inputs: dict) -> Tensor:
        """TRL's loss and metrics of scores that are already there, the policy's and the reference's."""
        own, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            value = super()._compute_loss(lambda **_: _as_output(scores), inputs, False)
        finally:
            self.precompute_ref_logps = own
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in _NOT_LOGGED:
            metrics.pop(name, None)
        return value

    def _segmented_loss(self, model, views: int, score: Callable, loss: Callable) -> Tensor:
        """See `segmented_backward`; a loss of a row's sum is not separable, so there is a first pass."""
        steps = self.current_gradient_accumulation_steps  # by which Trainer divides the part that is returned

        def add(part: Tensor) -> None:
            backward(self, part / steps)

        return segmented_backward(views, score, loss, add, partial(deferred_sync, self, model), None)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss; logits and labels are None."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def floating_point_ops(self, inputs):
        """Two operations a parameter and token of each forward, four of each backward."""
        views = self.args.num_samples
        forwards = views * ((not self.args.precompute_ref_log_probs) + (2 if views > 1 else 1))
        return super().floating_point_ops(inputs) * (forwards + 2 * views) // 3  # of one forward and one backward

    # ---------------------------------------------------------------------------------------------------- model card

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's model card, with this library's way to generate."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_card(self)


def _as_output(scores: TokenScores) -> FusedCausalLMOutput:
    """Scores (B, S) in the form in which TRL's DPO reads a model's answer, (B, S - 1)."""
    logps = scores.logps[:, 1:]
    nothing = torch.zeros_like(logps)
    return FusedCausalLMOutput(
        log_probs=logps, entropy=scores.entropies[:, 1:], mean_logits=nothing, is_top1=nothing.bool()
    )
