"""TRL's SFTTrainer for masked diffusion language models.

Datasets, tokenisation, PEFT, quantisation, checkpoints and the distributed back-ends stay TRL's. Overridden are:

- the collator: answers are filled with EOS up to the canvas;
- `compute_loss`: an objective turns the batch into a `View`, and the scorer that GRPO uses runs it;
- `get_batch_samples`: the loss is the mean over the rows of an optimizer step, so rows are counted and not tokens;
- `prediction_step`: there are no logits to return.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..blocks import Blocks
from ..likelihood import View, score_view
from ..likelihood.plan import compact
from ..likelihood.view import IGNORE, behind_clean
from ..models import NEVER, Attention, MaskedDiffusionSpec
from ..models.lora import register_lora_targets
from ..models.spec import check_full_attention, check_unshifted
from ..noise import Purpose, hash64, row_seeds, uniform
from .architecture import check_architecture, find_modules
from .base import HOOKS, DiffusionTrainer
from .data import check_sft_data
from .finite import check_loss
from .model_card import complete_card
from .sft_config import DiffusionSFTConfig
from .stock import (
    Interface,
    check_trl,
    hub_kwargs,
    leave_out_router_loss,
    own_config,
    read_config,
    refuse_parallelism,
    refuse_processor,
    refuse_prompt_learning,
    refuse_sharded_integers,
)


_OVERRIDDEN: Interface = {
    "get_batch_samples": (),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "create_model_card": ("model_name", "dataset_name", "tags"),
    **HOOKS,
}


register_lora_targets()


@dataclass
class AnswerCollator(DataCollatorForLanguageModeling):
    """TRL's collator, padding on the right, after each answer was filled with EOS.

    A row's answer is what its `labels` name, one stretch at its end. It is given an EOS if it has none, and EOS up to
    `canvas_length` tokens or, where it is longer, to a multiple of `block_length`; for a block-causal model then to
    the end of its last block. An answer that `max_length` cut off is left as it is: an EOS would teach the model to
    stop there.

    Raises:
        ValueError: labels with a gap behind the first answer token.
    """

    eos_token_id: int | None = None
    canvas_length: int | None = None
    block_length: int | None = None
    max_length: int | None = None
    blocks: Blocks | None = None

    def torch_call(self, examples: list[dict]) -> dict[str, Tensor]:
        """Batch rows of `input_ids` and `labels`: the same, (B, S), and `attention_mask`."""
        return super().torch_call([self._fill(example) for example in examples])

    def _fill(self, example: dict) -> dict:
        ids, labels = list(example["input_ids"]), list(example.get("labels", example["input_ids"]))
        prompt = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
        answer = labels[prompt:]
        if IGNORE in answer:
            raise ValueError(
                f"labels: token {prompt + answer.index(IGNORE)} of a row is not trained on but stands behind one that "
                "is; an answer must be one stretch at the end of its row. Split conversations into "
                "prompt/completion rows."
            )
        cut = len(ids) == self.max_length and ids[-1] != self.eos_token_id
        fill = 0
        if answer and not cut:
            ended = len(answer) + (self.eos_token_id not in answer)
            block = self.block_length or 1
            fill = max(self.canvas_length or 0, -(-ended // block) * block) - len(answer)
            if self.blocks is not None:
                aligned = len(ids) if self.blocks.alignment == "position" else len(answer)
                fill += -(aligned + fill) % self.blocks.size
        return {"input_ids": ids + [self.eos_token_id] * fill, "labels": labels + [self.eos_token_id] * fill}


def masked_diffusion_view(
    input_ids: Tensor,
    attention_mask: Tensor,
    answer: Tensor,
    seeds: Tensor,
    spec: MaskedDiffusionSpec,
    args: DiffusionSFTConfig,
) -> View:
    """The forward process on the answers (LLaDA Algorithm 2): tokens masked with probability t, one uniform t a row.

    A masked token weighs 1/t (or 1), divided by its answer's number of tokens n. Draws that mask nothing are not made:
    the masks are drawn given that there is at least one, which has probability 1-(1-t)^n, and the weight 1/t is
    multiplied by it. The expected loss is Algorithm 2's for every n, and the largest weight is n and not 1/t.

    Args:
        input_ids (`Tensor` of shape (B, S), int64): prompt, answer and right padding.
        attention_mask (`Tensor` of shape (B, S)): 0 on padding.
        answer (`Tensor` of shape (B, S), bool): the tokens that may be masked; a row may have none.
        seeds (`Tensor` of shape (B,), int64): row seeds; a row's draw depends on its seed and its answer's length
            alone.
        spec (`MaskedDiffusionSpec`): of the model.
        args (`DiffusionSFTConfig`): `mask_eps` and `loss_weight` are read.

    Returns:
        `View` of S columns; one forward. For a block-causal model of up to 2S: each block is masked behind clean ones
        (BD3LM), with one t for all of a row's blocks.
    """
    count = answer.sum(dim=1, keepdim=True)
    place = answer.long().cumsum(dim=1) - 1
    t = args.mask_eps + (1 - args.mask_eps) * uniform(seeds, Purpose.SFT, 0)[:, None]
    draw = uniform(seeds[:, None], Purpose.SFT, 1, place)

    def some(n: Tensor) -> Tensor:  # the probability that any of n tokens is masked
        return -torch.expm1(n * torch.log1p(-t))

    # While nothing is masked yet, a token is the first with probability t / some(tokens from it on), 1 for the last.
    left = (count - place).clamp(min=1)
    may_be_first = answer & ((draw * some(left) < t) | (left == 1))
    masked = (answer & (draw < t)) | (may_be_first & (may_be_first.cumsum(dim=1) == 1))
    weight = some(count) / t if args.loss_weight == "1/t" else torch.ones_like(t)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    view = View(
        input_ids=input_ids.masked_fill(masked, spec.mask_token_id),
        position_ids=positions,
        attention=Attention.padding(attention_mask),
        targets=input_ids.masked_fill(~masked, IGNORE),
        index=positions,
        weight=(weight / count.clamp(min=1)).expand(input_ids.shape),
    )
    if spec.blocks is None:
        return view
    prompt = answer.long().argmax(dim=1, keepdim=True)
    block = spec.blocks.of(positions, prompt).masked_fill(attention_mask == 0, -1)
    return compact(behind_clean(view, input_ids, block))


def any_order_view(
    input_ids: Tensor,
    attention_mask: Tensor,
    answer: Tensor,
    seeds: Tensor,
    spec: MaskedDiffusionSpec,
    args: DiffusionSFTConfig,
) -> View:
    """d2's any-order causal fine-tuning (Eq. 73, App. C.1.2): each answer token from those before it in a random
    order.

    The order is random within a block and left to right between blocks of `args.block_length`, one token at a time.
    The layout is `likelihood/any_order.py`'s, prompt ⊕ answer ⊕ masks: answer token j attends to the prompt and to
    tokens up to itself in the order, its mask to the prompt, itself and the tokens before it, and is scored.

    Args and returns as in `masked_diffusion_view`; the view has S columns and one more for each token of the longest
    answer.
    """
    rows, width = input_ids.shape
    count = answer.sum(dim=1, keepdim=True)
    place = torch.arange(max(int(count.max()), 1), device=input_ids.device)
    real = place < count  # (B, A): the answer's tokens, from its first
    column = (answer.long().argmax(dim=1, keepdim=True) + place).clamp(max=width - 1)
    block = place // (args.block_length or len(place))
    draw = uniform(seeds[:, None], Purpose.SFT, 2, place) + block  # blocks first, then the draws within a block
    rank = draw.masked_fill(~real, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    level = (1 + rank).masked_fill(~real, NEVER)
    behind = attention_mask == 0
    # What a row's answer does not reach goes to a column of its own: the row's last may be a token of the answer.
    row_level = input_ids.new_zeros(rows, width + 1).scatter(1, column.masked_fill(~real, width), level)[:, :width]
    row_level = row_level.masked_fill(behind, NEVER)
    positions = torch.arange(width, device=input_ids.device).expand_as(input_ids)
    unscored = torch.full_like(input_ids, IGNORE)
    weight = (1 / count.clamp(min=1)).expand(rows, width + len(place))
    return View(
        input_ids=torch.cat([input_ids, torch.full_like(column, spec.mask_token_id)], dim=1),
        position_ids=torch.cat([positions, column], dim=1),
        attention=Attention(
            level=torch.cat([row_level, torch.full_like(level, NEVER)], dim=1),
            reach=torch.cat([row_level.masked_fill(behind, 0), rank.masked_fill(~real, 0)], dim=1),
        ),
        targets=torch.cat([unscored, input_ids.gather(1, column).masked_fill(~real, IGNORE)], dim=1),
        index=torch.cat([positions, column], dim=1),
        weight=weight,
    )


def check_objective(name: str, spec: MaskedDiffusionSpec) -> None:
    """Raise ValueError where a model family cannot be trained on the objective."""
    if name == "any_order":
        check_unshifted("objective='any_order'", spec.logits_shift)
        check_full_attention("objective='any_order'", spec.block_size, "Set objective='masked_diffusion'")


# The config's `objective` names. Each builds the view of a batch whose weighted log-probs, negated, are the losses.
OBJECTIVES: dict[str, Callable[..., View]] = {"masked_diffusion": masked_diffusion_view, "any_order": any_order_view}


class DiffusionSFTTrainer(DiffusionTrainer, SFTTrainer):
    """
    Supervised fine-tuning of masked diffusion language models (LLaDA, Dream, …): LLaDA Algorithm 2, d1's SFT.

    Takes the arguments of TRL's [`~trl.SFTTrainer`] and its dataset formats. In prompt/completion rows the prompt is
    never masked; in `text` and `messages` rows everything is answer. (In families with shifted logits the first token
    of a row is never masked either: no row predicts it.) The loss is the mean over the rows of an optimizer step, on
    however many processes and micro-batches. Logs, beside `loss`: `masked_fraction` of the answer tokens, `entropy` in
    nats of the masked tokens' distributions (weighted like the loss) and `num_tokens` seen.

    The masks of a row are a function of (seed, `global_step`, the row's number in the step's batch): the same after a
    resume and on any number of processes. Those of an evaluation are a function of (seed, the row's tokens), so that
    evaluation losses can be compared over steps and batch sizes.

    Args:
        args ([`DiffusionSFTConfig`]): a stock `SFTConfig` works too and gets the diffusion defaults.
        data_collator: instead of [`AnswerCollator`]; it returns `input_ids`, `attention_mask` and `labels`,
            right-padded.

    Raises:
        ValueError: before any weight is loaded, a model that is no masked diffusion model, or an option that does not
            apply; after loading, a name in `trainable_modules` that no module has.

    Example:

    ```python
    from trl_dllm import DiffusionSFTConfig, DiffusionSFTTrainer

    trainer = DiffusionSFTTrainer(
        model="GSAI-ML/LLaDA-8B-Base",
        args=DiffusionSFTConfig(canvas_length=256, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    args: DiffusionSFTConfig
    model: PreTrainedModel
    _tag_names = ["trl", "sft", "trl-dllm", "masked-diffusion"]  # noqa: RUF012  TRL declares it so
    _name = "Diffusion SFT"
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL declares None and GRPO sets it as here

    def __init__(self, model, args=None, *positional, **kwargs):
        check_trl(SFTTrainer, _OVERRIDDEN)
        args = own_config(args, DiffusionSFTConfig, SFTConfig, model, "SFT")
        bound = inspect.signature(SFTTrainer.__init__).bind_partial(None, model, args, *positional, **kwargs)
        given = bound.arguments
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if given.get(name) is not None:
                raise ValueError(f"{name} does not apply to diffusion SFT: logits never exist in full. Remove it.")
        refuse_prompt_learning(model, given.get("peft_config"))
        adapter = given.get("peft_config") or getattr(model, "active_peft_config", None)
        if adapter is not None and args.trainable_modules is not None:
            raise ValueError(
                f"trainable_modules={args.trainable_modules} together with an adapter: an adapter trains its own "
                "weights. Name the modules in the adapter's target_modules instead."
            )
        collator = given.get("data_collator")
        if collator is not None and (args.canvas_length or args.block_length):
            raise ValueError(
                f"canvas_length={args.canvas_length}, block_length={args.block_length}: a data_collator of your own "
                "has to fill the answers itself. Remove one or the other."
            )
        config = read_config(model, args)
        leave_out_router_loss(config, args)
        if isinstance(model, str) and given.get("processing_class") is None:
            given["processing_class"] = AutoProcessor.from_pretrained(model, **hub_kwargs(args))
        refuse_sharded_integers(config, args, given.get("quantization_config"))
        refuse_processor(given.get("processing_class"))
        if given.get("processing_class") is not None:
            check_objective(args.objective, MaskedDiffusionSpec.from_config(config, given["processing_class"]))

        trainable = args.trainable_modules
        if trainable is None and args.objective == "any_order" and adapter is None:
            trainable = ["q_proj", "k_proj", "v_proj"]  # d2 App. C.1.2
        trainable = None if trainable == ["all"] else trainable
        check_architecture(model, config, args, given.get("peft_config"), trainable)
        check_sft_data(given, args, config)
        self._micro_step = 0  # micro-batches of the current optimizer step that this process has scored
        super().__init__(*bound.args[1:], **bound.kwargs)

        self.spec = MaskedDiffusionSpec.from_model(self.model, self._tokenizer)
        self.spec.write_to(self.model)
        check_objective(args.objective, self.spec)  # of a model in memory whose tokenizer TRL has found
        refuse_parallelism(self.accelerator)
        if collator is None:
            self.data_collator = AnswerCollator(
                pad_token_id=self._tokenizer.pad_token_id,
                pad_to_multiple_of=args.pad_to_multiple_of,
                eos_token_id=self._tokenizer.eos_token_id,
                canvas_length=args.canvas_length,
                block_length=args.block_length,
                max_length=args.max_length,
                blocks=self.spec.blocks,
            )
        if trainable is not None:
            freeze_all_but(self.model, trainable)
            if args.gradient_checkpointing:  # reentrant checkpointing gives no gradient behind frozen embeddings
                self.model.enable_input_require_grads()

    def process_state(self, folder: str) -> dict[str, Any]:
        return {"num_tokens": self._total_train_tokens}

    def load_process_states(self, states: list[dict[str, Any]], folder: str) -> None:
        if states:
            self._total_train_tokens = states[0]["num_tokens"]

    def get_batch_samples(self, *args, **kwargs):
        """The micro-batches of an optimizer step and, as TRL's `num_items_in_batch`, their rows over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self._micro_step = 0
        rows = torch.tensor(sum(len(batch["input_ids"]) for batch in batches), device=self.accelerator.device)
        return batches, self.accelerator.reduce(rows, reduction="sum")

    def _seeds(self, inputs: dict) -> Tensor:
        """Row seeds of a micro-batch, int64 (B,)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        columns = torch.arange(ids.shape[1], device=ids.device)
        if not self.model.training:
            content = (hash64(columns, ids) * mask).sum(dim=1)
            return row_seeds(self.args.seed, 1, 0, 0, content)
        # Accelerate deals micro-batches out to processes in turn, so this is the row's number in the step's batch.
        batch = self._micro_step * self.accelerator.num_processes + self.accelerator.process_index
        rows = batch * self.args.per_device_train_batch_size + torch.arange(len(ids), device=ids.device)
        return row_seeds(self.args.seed, 0, self.state.global_step, 0, rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Minus the weighted log-probs of the masked tokens, summed over a row and averaged over rows.

        `num_items_in_batch` is the number of rows of the optimizer step; None averages over the rows given.
        """
        answer = inputs["labels"] != IGNORE
        answer[:, : self.spec.logits_shift] = False
        view = OBJECTIVES[self.args.objective](
            inputs["input_ids"], inputs["attention_mask"], answer, self._seeds(inputs), self.spec, self.args
        )
        scores = score_view(model, view, inputs["input_ids"].shape[1], self.spec)
        if self.model.training:
            self._micro_step += 1
        loss = -scores.logps.sum()
        if num_items_in_batch is None:
            loss = loss / len(answer)
        else:  # DDP and DeepSpeed average gradients over processes, and this is a sum over them
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        self._record(view, answer, scores, inputs["attention_mask"])
        check_loss(self, loss, inputs["input_ids"], inputs["attention_mask"], {"log_probs": scores.logps})
        return (loss, scores) if return_outputs else loss

    @torch.no_grad()
    def _record(self, view: View, answer: Tensor, scores, attention_mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        weight = view.weight[view.targets != IGNORE].sum()
        sums = (scores.scored.sum(), answer.sum(), scores.entropies.sum(), weight, attention_mask.sum())
        sums = self.accelerator.reduce(torch.stack([s.double() for s in sums]), reduction="sum")
        masked, answers, entropy, weight, tokens = sums.tolist()
        self._metrics[mode]["masked_fraction"].append(masked / max(answers, 1))
        self._metrics[mode]["entropy"].append(entropy / weight if weight else 0.0)
        if mode == "train":
            self._total_train_tokens += int(tokens)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss; logits and labels are None."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's model card, with this library's way to generate."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_card(self)


def freeze_all_but(model: torch.nn.Module, names: list[str]) -> None:
    """Leave only the modules trainable whose dotted name ends with one of `names`, with everything inside them.

    Raises:
        ValueError: a name that no module's name ends with.
    """
    modules = find_modules(model, "trainable_modules", names)
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
