"""The values of TRL's own settings, checked before TRL computes with them."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from transformers import training_args
from transformers.debug_utils import DebugOption
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_xla_available

from ..fields import check_choice, check_fields, check_kind


# TRL's and transformers' fields that take more, or less, than they declare.
_WIDER: dict[str, Any] = {
    "num_generations": int,
    "output_dir": str | PathLike | None,
    "debug": Literal["", "underflow_overflow", "tpu_metrics_debug"] | list[DebugOption] | None,
    "resume_from_checkpoint": str | PathLike | bool | None,
    "accelerator_config": Any,
    "deepspeed": dict | str | PathLike | None,
    "fsdp": str | bool | list[str] | None,
    "fsdp_config": dict | str | PathLike | None,
}

# Ranges of their numbers: what a value must be, whether it is, and the fields. None, where a field may be None, is in
# every range.
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("at least 2: advantages compare the completions of a prompt", lambda x: x >= 2, "num_generations"),
    ("at least 1, or -1 for no limit", lambda x: x == -1 or x >= 1, "max_steps"),
    ("between 0 and 2**32 - 1", lambda x: 0 <= x < 2**32, "seed"),
    (
        "at least 1",
        lambda x: x >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_iterations "
        "num_generations_eval steps_per_generation generation_batch_size max_completion_length save_total_limit "
        "eval_accumulation_steps dataloader_prefetch_factor ref_model_sync_steps max_length dataset_num_proc "
        "ddp_timeout precompute_ref_batch_size",
    ),
    (
        "greater than 0",
        lambda x: x > 0,
        "num_train_epochs save_steps eval_steps delta sapo_temperature_pos sapo_temperature_neg discopop_tau",
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        "learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps logging_steps eval_delay "
        "dataloader_num_workers beta epsilon epsilon_high off_policy_mask_threshold entropy_coef "
        "neftune_noise_alpha",
    ),
    ("in [0, 1)", lambda x: 0 <= x < 1, "adam_beta1 adam_beta2"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "top_entropy_quantile ref_model_mixup_alpha ld_alpha"),
)


def check_settings(config: Any, elsewhere: Iterable[str], choices: Mapping[str, Sequence[object]]) -> None:
    """Check the types, ranges and choices of TRL's fields, which TRL itself computes with unchecked.

    Args:
        config (dataclass instance): before or after TRL's `__post_init__`.
        elsewhere (`Iterable[str]`): fields that something else checks.
        choices (`Mapping`): the values of fields that TRL declares as any string.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """
    for name, known in choices.items():
        check_choice(name, getattr(config, name), known)
    for name, kind in _WIDER.items():
        if hasattr(config, name):
            check_kind(name, getattr(config, name), kind)
    done = {*elsewhere, *choices, *_WIDER}
    check_fields(config, [f.name for f in fields(config) if f.name not in done])
    for right, fits, names in _RANGES:
        for name in names.split():
            value = getattr(config, name, None)
            # What is no number here is refused elsewhere.
            if isinstance(value, (int, float)) and not fits(value):
                raise ValueError(f"{name}={value!r} must be {right}.")
    for name in config._VALID_DICT_FIELDS:  # which transformers parses where they are strings
        value = getattr(config, name)
        # Some may be the path of a file; transformers takes for JSON what starts with a brace.
        if isinstance(value, str) and (name not in done or value.startswith("{")):
            _check_json(name, value)
    if isinstance(config.output_dir, str) and not config.output_dir.strip():
        raise ValueError(f"output_dir={config.output_dir!r} must name a folder.")
    _check_padding(config.pad_to_multiple_of)
    _check_compile(config)
    resume = config.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() not in ("true", "false") and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={resume!r} is no folder. Name a checkpoint's, or say true for the last one."
        )
    _check_scheduler(config)
    _check_bf16(config)


def _check_json(name: str, text: str) -> None:
    """Refuse a string that is not the JSON of a mapping."""
    try:
        fits = isinstance(json.loads(text), dict)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name}={text!r} must be a mapping, or the JSON of one.")


def _check_padding(value: Any) -> None:
    """Refuse what is no number of tokens, which TRL reads from a string too."""
    if value in (None, "auto") or (isinstance(value, str) and value.lower() in ("none", "null")):
        return
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"pad_to_multiple_of={value!r} must be a whole number of at least 1, 'auto' or None.")


def _check_compile(config: Any) -> None:
    """Refuse a mode or a backend that torch.compile does not have."""
    if config.torch_compile_mode is not None:
        from torch._inductor import list_mode_options

        check_choice("torch_compile_mode", config.torch_compile_mode, list_mode_options())
    if config.torch_compile_backend is not None:
        from torch._dynamo import list_backends

        check_choice("torch_compile_backend", config.torch_compile_backend, list_backends(exclude_tags=()))


def _check_scheduler(config: Any) -> None:
    """Refuse arguments that the learning rate's schedule does not take."""
    given = config.lr_scheduler_kwargs
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION.get(SchedulerType(config.lr_scheduler_type))
    if schedule is None or not isinstance(given, dict):
        return
    known = [name for name in inspect.signature(schedule).parameters if name not in ("optimizer", "num_warmup_steps")]
    for name in given:
        if name not in known:
            raise ValueError(
                f"lr_scheduler_kwargs: lr_scheduler_type={str(config.lr_scheduler_type)!r} has no argument {name!r}; "
                f"it takes {', '.join(known)}."
            )


def _check_bf16(config: Any) -> None:
    """Refuse bfloat16 where the device has none; transformers does so too, but names no field."""
    bf16 = not config.fp16 if config.bf16 is None else config.bf16  # TRL's default
    able = config.use_cpu or training_args.is_torch_bf16_gpu_available() or is_torch_xla_available()
    if (bf16 or config.bf16_full_eval) and not able:
        raise ValueError(
            f"bf16={config.bf16} (None means True) needs a GPU that computes in bfloat16, and there is none. Set "
            "use_cpu: true to train on the CPU, or bf16: false."
        )


def name_checkpointing(config: Any) -> None:
    """Say `activation_checkpointing`, as transformers 5.23 calls it, wherever the old name is set.

    TRL turns checkpointing on under the old name, for which transformers would warn at every start.
    """
    for suffix in ("", "_kwargs"):
        if getattr(config, f"activation_checkpointing{suffix}", False) is None:
            setattr(config, f"activation_checkpointing{suffix}", getattr(config, f"gradient_checkpointing{suffix}"))
