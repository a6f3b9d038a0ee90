"""A training step, or a decoding one, run on fake tensors: its memory and its operations, without weights or a GPU.

The trainer, its loop, sampler, scorer, loss and optimizer are the product's own, and so are the shapes. What is fake
are the model's weights, and with them all that a forward makes of them: fake tensors have sizes and no contents. Token
ids, masks, log-probs and the loss are real numbers, which the code may look at. The two worlds meet where
`apply_head` is called: its result is replaced by real zeros, and their gradient by a fake one.

A step calls the model hundreds of times at a few sizes. It is run where that tells anything new: once for each size
in sampling, once in scoring, and once with gradients, where those of an earlier view are put beside it if there is
one. The other calls return at once; what counts their operations sees them all.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import gcd, lcm
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback

from ..generation import any_order, block_cache, denoising, generate
from ..likelihood import TokenScores, score
from ..models import MaskedDiffusionSpec, TrainingFlops, unwrap
from ..models import head as head_module
from ..models.lora import register_lora_targets
from ..models.tiny import create_tiny_tokenizer
from ..trainer import dpo_trainer, grpo_trainer
from ..trainer import reference as reference_module
from ..trainer.dpo_trainer import DiffusionDPOTrainer
from ..trainer.grpo_trainer import DiffusionGRPOTrainer
from ..trainer.segmented_backward import segmented_backward
from ..trainer.sft_trainer import DiffusionSFTTrainer
from .memory import Footprint, Memory, weight_bytes


PROMPT = 200  # tokens of a prompt, which nobody has read yet
# A call is of a new size if its tokens or its attention are more than this many times those of another, or if its rows
# of the head are, which take memory a tile at a time.
_LARGER, _MORE_ROWS = 1.25, 2.0

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def make_model(
    config: Any, dtype: Any, attn_implementation: str | None = None, quantization_config: Any = None
) -> nn.Module:
    """The model that `from_pretrained` would load, on the meta device."""
    named = str(dtype or "auto").removeprefix("torch.")
    of_weights = getattr(config, "dtype", None) or torch.bfloat16 if named == "auto" else getattr(torch, named)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=of_weights, attn_implementation=attn_implementation
        )
    if quantization_config is not None:
        from transformers.integrations import replace_with_bnb_linear

        kept = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization_config)
        bits = 4 if quantization_config.load_in_4bit else 8
        setattr(model, f"is_loaded_in_{bits}bit", True)
        model.config.quantization_config = quantization_config
    return model


def make_fake(model: nn.Module) -> None:
    """Replace the parameters and buffers of a model on the meta device by fake tensors, shared ones by shared ones."""
    made: dict[int, Tensor] = {}
    tables: list[tuple[Any, bool]]
    for module in model.modules():
        tables = [(module._parameters, True), (module._buffers, False)]
        for table, is_parameter in tables:
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = _quantised(module, old) if is_parameter else None
                    if new is None:
                        with _FAKE:
                            new = torch.empty(old.shape, dtype=old.dtype)
                        if is_parameter:
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = new
                table[name] = made[id(old)]


def _quantised(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The packed 4-bit weight of one of bitsandbytes' layers, with its state; None of any other weight."""
    kind = getattr(weight, "quant_type", None)
    if kind is None or getattr(module, "weight", None) is not weight:
        return None
    from bitsandbytes.functional import QuantState

    size, blocks = weight.numel(), -(-weight.numel() // 64)
    storage = weight.quant_storage
    with _FAKE:
        packed = torch.empty((size // (2 * storage.itemsize), 1), dtype=storage)
        code, offset = torch.empty(16), torch.empty(())
        absmax, state2 = torch.empty(blocks), None
        if weight.compress_statistics:
            absmax = torch.empty(blocks, dtype=torch.uint8)
            state2 = QuantState(
                torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
            )
        dtype = module.compute_dtype or torch.bfloat16
    new: Any = nn.Parameter(packed, requires_grad=False)
    new.quant_state = QuantState(absmax, weight.shape, code, 64, kind, dtype, offset if state2 else None, state2)
    return new


def make_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """A token a character, with the model's own special ids."""
    tokenizer = create_tiny_tokenizer()
    text = config.get_text_config()
    eos = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    ids = {"<mask>": config.mask_token_id, "<eos>": eos, "<pad>": text.pad_token_id, "<bos>": text.bos_token_id}
    ids = {name: number for name, number in ids.items() if number is not None}
    special = set(ids.values())
    free = (number for number in range(text.vocab_size) if number not in special)
    vocabulary = {name: ids[name] if name in ids else next(free) for name in tokenizer.get_vocab()}
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", behavior="isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        padding_side="left",
        model_max_length=4096,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "mask", "unk")},
    )


class _Bridge(torch.autograd.Function):
    """Real zeros in place of a fake result; a fake gradient in place of theirs."""

    @staticmethod
    def forward(ctx, fake: Tensor) -> Tensor:
        return torch.zeros(fake.shape, dtype=fake.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        with _FAKE:
            return torch.empty(gradient.shape, dtype=gradient.dtype)


@dataclass
class Calls:
    """Which calls of the model are run, and what the others return.

    Args:
        accumulates (`bool`): whether an optimizer step adds up the gradients of several micro-batches.
        put_gradients (`Callable`): puts gradients of an earlier view beside the weights.
        token (`int`): what the sampler draws everywhere.
    """

    accumulates: bool = False
    put_gradients: Callable[[], None] = lambda: None
    token: int = 0
    sampling: bool = False
    truncates: bool = False  # the sampler keeps the tokens that it could have drawn, which fake logits do not tell
    scored: bool = False  # what is scored without gradients was run
    complete: bool = False  # what is run with gradients was run
    over: bool = False  # and its backward pass
    shapes: list[tuple[int, int, int, bool]] = field(default_factory=list)  # (rows, width, head rows, with gradients)
    _run: dict[Any, list[tuple[int, ...]]] = field(default_factory=dict)  # sizes that were run
    _columns: dict[Any, tuple[int, torch.dtype]] = field(default_factory=dict)  # of each kind of result

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put this in the way of every call of `apply_head` and `hidden_rows`."""
        with ExitStack() as stack:
            for module in (denoising, any_order, block_cache, score):
                if hasattr(module, "apply_head"):
                    stack.enter_context(mock.patch.object(module, "apply_head", self.apply_head))
            stack.enter_context(mock.patch.object(reference_module, "hidden_rows", self.hidden_rows))
            for module in (grpo_trainer, dpo_trainer):
                stack.enter_context(mock.patch.object(module, "segmented_backward", self.segmented_backward))
            yield

    def apply_head(self, model, inputs: dict, rows: Tensor, reduce: Callable, *row_args: Tensor, **options) -> Tensor:
        kind, training = reduce.__code__, torch.is_grad_enabled()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.shapes.append((ids.shape[0], ids.shape[1], len(rows), training))
        size = (ids.numel(), mask.numel() if isinstance(mask, Tensor) else 0, len(rows))
        if self._is_new((kind, training), size):
            if training and self.accumulates:
                self.put_gradients()
            run = self._on_real(reduce) if self.sampling and self.truncates else reduce
            result = head_module.apply_head(model, inputs, rows, run, *row_args, **options)
            self._columns[kind] = result.shape[1], result.dtype
            out = _Bridge.apply(result)
        else:
            columns, dtype = self._columns[kind]
            out = torch.zeros(len(rows), columns, dtype=dtype, requires_grad=training)
            self.complete |= training
            self.scored |= not training and not self.sampling
        if self.sampling and out.shape[1] > 1:
            out[:, 0] = self.token
        return out

    def _on_real(self, reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits, *args: reduce(torch.zeros(logits.shape, dtype=logits.dtype), *args)

    def segmented_backward(self, num_views: int, score: Callable, loss: Callable, *how: Any) -> Tensor:
        """The step's own; where no forward is run any more, its forwards alone, which are counted."""
        self.accumulates |= num_views > 1
        if not self.over:
            return segmented_backward(num_views, score, loss, *how)
        if how[-1] is None:  # not separable: a first pass finds all log-probs
            with torch.no_grad():
                for n in range(num_views):
                    score(n)
        return loss(TokenScores.sum(score(n) for n in range(num_views)), True)

    def hidden_rows(self, model, inputs: dict, rows: Tensor) -> Tensor:
        if self._is_new("reference", (inputs["input_ids"].numel(), len(rows))):
            return head_module.hidden_rows(model, inputs, rows)
        bare = unwrap(model)
        with _FAKE:
            return torch.empty(len(rows), bare.config.get_text_config().hidden_size, dtype=bare.dtype)

    def _is_new(self, key: Any, size: tuple[int, ...]) -> bool:
        """Whether to run a call of this kind: `size` is its tokens, attention and rows of the head."""
        if self.over or (self.scored and not self.sampling and not torch.is_grad_enabled()):
            return False
        limits = [*[_LARGER] * (len(size) - 1), _MORE_ROWS]
        seen = self._run.setdefault(key, [])
        for other in seen:
            if all(new <= limit * old for new, old, limit in zip(size, other, limits, strict=True)):
                return False
        seen.append(size)
        return True


@dataclass(frozen=True)
class Measured:
    """What a step takes on one process: its memory, and its operations by what they are for."""

    footprint: Footprint
    flops: dict[str, int]


@contextmanager
def _without_devices(model_of: Callable[..., nn.Module]) -> Iterator[None]:
    """Trainers load no weights and move none, and are the only process."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(TrainingArguments, "world_size", 1))
        alone = dict.fromkeys(("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"), "false")
        stack.enter_context(mock.patch.dict(os.environ, alone))
        stack.enter_context(mock.patch("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None))
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self))
        for module in ("grpo_trainer", "sft_trainer", "dpo_trainer"):
            stack.enter_context(mock.patch(f"trl.trainer.{module}.create_model_from_path", model_of))
        yield


class _GRPO(DiffusionGRPOTrainer):
    """The trainer, saying what is being done and what it costs."""

    memory: Memory
    calls: Calls
    counted: dict[str, int]

    def _generate_single_turn(self, *args, **kwargs):
        self.calls.sampling = True
        try:
            with self.memory.during("sampling"):
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.calls.sampling = False

    def _generate_and_score_completions(self, inputs):
        before = self.flops.counted
        outputs = super()._generate_and_score_completions(inputs)
        self.counted["sampling"] += self.flops.counted - before
        return outputs

    def training_step(self, *args, **kwargs):
        self.calls.over = self.calls.complete
        with _disable_current_modes() if self.calls.over else nullcontext():  # there is nothing to watch any more
            return super().training_step(*args, **kwargs)

    def _score_view(self, *args, **kwargs):
        told = self.calls.scored and not torch.is_grad_enabled()
        with _disable_current_modes() if told else nullcontext():
            return super()._score_view(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        before, sampled = self.flops.counted, self.counted["sampling"]
        with self.memory.during("scoring"):
            inputs = super()._prepare_inputs(generation_batch)
        sampled = self.counted["sampling"] - sampled
        self.counted["old and reference"] += self.flops.counted - before - sampled
        return inputs


def _quiet(args: Any, folder: str) -> Any:
    """The settings of one process of the run, which writes nothing."""
    args = copy.copy(args)
    for name, value in {
        "output_dir": folder,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": [],
        "push_to_hub": False,
        "disable_tqdm": True,
        "resume_from_checkpoint": None,
        "torch_compile": False,
        "deepspeed": None,
        "deepspeed_plugin": None,
        "fsdp": [],
        "model_init_kwargs": None,
        "ignore_data_skip": True,
        "dataloader_num_workers": 0,
    }.items():
        if hasattr(args, name):
            setattr(args, name, value)
    if getattr(args, "log_completions", False):
        args.log_completions = False
    if args.fp16:  # of as many bytes, and there for CPUs
        args.fp16, args.bf16 = False, True
    return args


def measure_grpo(args: Any, model_args: Any, config: Any) -> Measured:
    """Run a GRPO recipe on fake tensors; operations are those of a generation batch."""
    rows = args.per_device_train_batch_size * args.steps_per_generation
    with tempfile.TemporaryDirectory() as folder:
        args = _quiet(args, folder)
        args.generation_batch_size = rows
        args.num_generations = gcd(rows, args.num_generations)
        cycle = args.steps_per_generation * args.num_iterations
        steps = lcm(args.gradient_accumulation_steps, cycle) // args.gradient_accumulation_steps
        args.max_steps = steps
        prompts = [{"prompt": f"{row:0{PROMPT}d}"} for row in range(max(rows, args.max_steps * rows))]

        def spread(completions, **kwargs):  # no row's gradient is 0
            return [float(row) for row in range(len(completions))]

        def build(**kwargs):
            return _GRPO(reward_funcs=spread, args=args, train_dataset=Dataset.from_list(prompts), **kwargs)

        cycles = steps * args.gradient_accumulation_steps // cycle
        counted = {"sampling": 0, "old and reference": 0}

        def begin(trainer, memory, calls):
            trainer.memory, trainer.calls, trainer.counted = memory, calls, counted
            calls.truncates = trainer.sampling.truncates

        footprint, trainer = _measure(build, begin, model_args, config)
        counted["updates"] = trainer.flops.counted - sum(counted.values())
    return Measured(footprint, {part: number // cycles for part, number in counted.items()})


def measure_sft(args: Any, model_args: Any, config: Any) -> Measured:
    """Run an SFT recipe on fake tensors; operations are those of an optimizer step."""
    answer = args.canvas_length or (args.max_length or 1024) - PROMPT
    row = {"prompt": "1" * PROMPT, "completion": "1" * max(1, answer - 1)}  # and an EOS
    return _measure_rows(DiffusionSFTTrainer, row, args, model_args, config)


def measure_dpo(args: Any, model_args: Any, config: Any) -> Measured:
    """Run a DPO recipe on fake tensors; operations are those of an optimizer step."""
    answer = max(2, (args.max_length or 1024) - PROMPT) - 1
    row = {"prompt": "1" * PROMPT, "chosen": "1" * answer, "rejected": "2" * answer}
    return _measure_rows(DiffusionDPOTrainer, row, args, model_args, config)


def _measure_rows(trainer_class: type, row: dict, args: Any, model_args: Any, config: Any) -> Measured:
    """Run an optimizer step on rows that are all alike."""
    with tempfile.TemporaryDirectory() as folder:
        args = _quiet(args, folder)
        args.max_steps = 1
        rows = [row] * (args.gradient_accumulation_steps * args.per_device_train_batch_size)
        held: list[Calls] = []

        def build(**kwargs):
            return trainer_class(args=args, train_dataset=Dataset.from_list(rows), **kwargs)

        footprint, trainer = _measure(build, lambda trainer, memory, calls: held.append(calls), model_args, config)
        count = TrainingFlops(trainer.model)
        flops = {"without": 0, "with": 0}
        for number, width, scored, training in held[0].shapes:
            flops["with" if training else "without"] += count.view(number, width, scored, training)
    return Measured(footprint, {f"{part} gradients": number for part, number in flops.items() if number})


class _AtEnd(TrainerCallback):
    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


def _measure(build, begin, model_args, config) -> tuple[Footprint, Any]:
    from trl import get_peft_config, get_quantization_config

    quantisation = get_quantization_config(model_args)

    def make(*args, **kwargs):
        model = make_model(config, model_args.dtype, model_args.attn_implementation, quantisation)
        model.config._name_or_path = str(model_args.model_name_or_path)
        return model

    register_lora_targets()
    calls = Calls()
    with _without_devices(make), calls.installed():
        trainer = build(model=make(), processing_class=make_tokenizer(config), peft_config=get_peft_config(model_args))
        trainer.remove_callback(PrinterCallback)
        make_fake(trainer.model)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            make_fake(reference)
        calls.accumulates = trainer.args.gradient_accumulation_steps > 1
        special = set(trainer.processing_class.all_special_ids)
        calls.token = next(number for number in range(1000) if number not in special)

        memory = Memory(*[model for model in (trainer.model, reference) if model is not None])
        calls.put_gradients = memory.put_gradients
        begin(trainer, memory, calls)
        with ExitStack() as watched:  # until the first optimizer step is made: later ones make nothing new
            watched.enter_context(memory)
            trainer.add_callback(_AtEnd(watched.close))
            trainer.train()
        args = trainer.args
        footprint = footprint_of(trainer.model, memory, reference, mixed=args.bf16 or args.fp16)
    return footprint, trainer


def footprint_of(model: nn.Module, memory: Memory, reference: nn.Module | None, mixed: bool) -> Footprint:
    """What was measured of a step on these models."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Footprint(
        frozen=weight_bytes(model, trained=False),
        trained=weight_bytes(model, trained=True),
        reference=weight_bytes(reference) if reference is not None else 0,
        parameters=sum(p.numel() for p in trained),
        size=trained[0].element_size(),
        mixed=mixed,
        largest=max(weight_bytes(part) for part in _parts(model)),
        peaks=memory.peaks,
    )


def _parts(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: a decoder layer, the embeddings or the head."""
    bare = unwrap(model)
    layers = [module for module in bare.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [*layers, bare.get_input_embeddings(), bare.get_output_embeddings()]


def measure_decoding(config: Any, decoding: Any, rows: int, dtype: str) -> tuple[int, int, int]:
    """Decode `rows` prompts of 200 tokens on fake tensors: operations, bytes of weights, bytes of all else."""

    model = make_model(config, dtype).eval()
    make_fake(model)
    tokenizer = make_tokenizer(config)
    spec = MaskedDiffusionSpec.from_config(config, tokenizer)
    special = set(tokenizer.all_special_ids)
    calls = Calls(sampling=True, token=next(number for number in range(1000) if number not in special))
    ids = torch.full((rows, PROMPT), calls.token)
    ids[:, 0] = torch.arange(rows) % 1000 + 1
    memory = Memory(model)
    with calls.installed(), memory:
        rollout = generate(model, ids, torch.ones_like(ids), decoding, spec=spec)
    return rollout.flops, weight_bytes(model), memory.peak()
