"""What every trainer here does with TRL: refuse what does not apply, take over its configs, and check its methods."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ProcessorMixin

from ..models import unwrap
from ..models.spec import FACTS


# field -> (accepted values, why it does not apply and what to do instead)
Refused = dict[str, tuple[tuple, str]]

# method -> the parameters that an override relies on
Interface = dict[str, tuple[str, ...]]

Config = TypeVar("Config")


def check_trl(trainer_class: type, interface: Interface) -> None:
    """Raise RuntimeError unless the installed TRL's trainer has the methods that are overridden here."""
    for name, parameters in interface.items():
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


def known_arguments(function: Callable, **kwargs) -> dict[str, Any]:
    """Of `kwargs`, those that this version's `function` takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in kwargs.items() if name in parameters}


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """No dropout while completions are drawn, in a model that is otherwise left as it is.

    Not `model.eval()`: on some CPUs that repacks 4-bit weights for inference, for good.
    """
    noisy = [
        module
        for module in model.modules()
        if module.training and (isinstance(module, _DropoutNd) or getattr(module, "attention_dropout", False))
    ]
    for module in noisy:
        module.training = False
    try:
        yield
    finally:
        for module in noisy:
            module.training = True


# ------------------------------------------------------------------------------------------------------------- configs


def refuse(config, refused: Refused, what: str) -> None:
    """Raise ValueError for the first option of `refused` that has another value than those accepted."""
    for name, (accepted, why) in refused.items():
        if getattr(config, name, accepted[0]) not in accepted:
            raise ValueError(f"{name}={getattr(config, name)!r} does not apply to {what}: {why}.")


def take_over(cls: type[Config], stock_cls: type, args) -> Config:
    """A config of `cls` with a stock one's values and the diffusion fields at their defaults; not validated yet."""
    # Not rebuilt from its fields: TRL's __post_init__ has resolved some of them and would refuse its own result.
    config = object.__new__(cls)
    config.__dict__.update(args.__dict__)
    stock = {f.name for f in fields(stock_cls)}
    for f in fields(cls):  # type: ignore[arg-type]  # a TypeVar cannot be bound to "a dataclass"
        if f.name not in stock:
            setattr(config, f.name, f.default if f.default_factory is MISSING else f.default_factory())
    return config


def own_config(args, config_class: type[Config], stock_class: type, model, suffix: str) -> Config:
    """The trainer's `args`: as given, made of a stock config, or the defaults, as TRL names their output folder."""
    if args is None:
        name = model if isinstance(model, str) else unwrap(model).config._name_or_path
        return config_class(f"{(name or 'model').split('/')[-1]}-{suffix}")  # type: ignore[call-arg]  # output_dir
    if isinstance(args, config_class):
        return args
    if isinstance(args, stock_class):
        return config_class.from_stock(args)  # type: ignore[attr-defined]  # every config here has it
    raise TypeError(f"args must be a {config_class.__name__}, got {type(args).__name__}.")


# ------------------------------------------------------------------------------------------------ models and arguments


def refuse_processor(processing_class) -> None:
    """Raise ValueError for a multimodal processor."""
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class={type(processing_class).__name__} is a multimodal processor; only text models are "
            "supported. Pass the model's tokenizer."
        )


def refuse_prompt_learning(model, peft_config) -> None:
    """Raise ValueError for an adapter that adds virtual tokens, given or already on the model."""
    adapter = peft_config or getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"peft_config={type(adapter).__name__} puts virtual tokens before the prompt, which moves every row "
            "that the scorer reads. Use LoRA."
        )


def refuse_sharded_integers(config, args, quantization_config=None) -> None:
    """Raise ValueError for bitsandbytes weights of integers under FSDP, which shards floating-point numbers alone.

    Args:
        config: the model's, which says how a quantised checkpoint was made.
        args: the trainer's settings; `fsdp` and `model_init_kwargs` are read.
        quantization_config (*optional*): what the trainer was given.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    given = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    given = given or getattr(config, "quantization_config", None)
    if not given or not (args.fsdp or launched):
        return
    settings = given if isinstance(given, dict) else given.to_dict()
    if settings.get("load_in_8bit"):
        raise ValueError(
            "quantization_config: load_in_8bit=True under FSDP, which shards floating-point weights alone. Load in 4 "
            "bits with bnb_4bit_quant_storage='bfloat16', or train with DDP or DeepSpeed."
        )
    storage = settings.get("bnb_4bit_quant_storage") or "uint8"
    if settings.get("load_in_4bit") and not getattr(torch, str(storage).removeprefix("torch.")).is_floating_point:
        raise ValueError(
            f"quantization_config: bnb_4bit_quant_storage={str(storage)!r} under FSDP, which shards floating-point "
            "weights alone: every process would hold all packed weights. Store them as the dtype of the model "
            "(bnb_4bit_quant_storage='bfloat16'), or train with DDP or DeepSpeed."
        )


def refuse_parallelism(accelerator) -> None:
    """Raise ValueError for processes that hold a part of a row each."""
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "parallelism_config with tensor, context or sequence parallelism is not supported: rows are masked by "
            "the process that holds them whole. Use DDP, FSDP or DeepSpeed ZeRO."
        )


def hub_kwargs(args) -> dict[str, Any]:
    """Which revision of a checkpoint's config and tokenizer to read, as TRL does for its weights."""
    init_kwargs = args.model_init_kwargs or {}
    trust = init_kwargs.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    return {"revision": init_kwargs.get("revision"), "trust_remote_code": trust}


def with_facts(config, args):
    """A config that is given what `model_init_kwargs` say of the model, as `from_pretrained` will."""
    for name, value in (args.model_init_kwargs or {}).items():
        if name in FACTS and hasattr(config, name):
            setattr(config, name, value)
    return config


def read_config(model, args):
    """The config of a model that is given by name or in memory, before any weight is loaded."""
    if isinstance(model, str):
        try:
            config = AutoConfig.from_pretrained(model, **hub_kwargs(args))
        except OSError as error:  # which without a network does not say what it was looking for
            raise OSError(f"model_name_or_path={model!r} cannot be read: {error}") from error
        return with_facts(config, args)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a name or a transformers model, got {type(model).__name__}.")
    config = unwrap(model).config
    # TRL builds the reference model, and PEFT and the Hub reload this one, through AutoModelForCausalLM.
    if not isinstance(config, tuple(AutoModelForCausalLM._model_mapping.keys())):
        AutoModelForCausalLM.register(type(config), type(unwrap(model)), exist_ok=True)
    return config


def leave_out_router_loss(config, args) -> None:
    """Turn off the load-balancing loss of a mixture of experts, and warn where the model asks for one.

    TRL takes the model's own coefficient where `router_aux_loss_coef` is None. But the scorer runs masked copies of a
    completion, several for one loss, whose router logits it does not collect.
    """
    own = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    if args.router_aux_loss_coef is None and own:
        warnings.warn(
            f"The model's router_aux_loss_coef={own} is left out: masked diffusion scoring has no load-balancing loss "
            "of the router. Set router_aux_loss_coef=0.0 to say so."
        )
    args.router_aux_loss_coef = 0.0


def read_tokenizer(model, args):
    """The checkpoint's own tokenizer, which TRL loads only behind the weights; None for a model made in memory."""
    name = model if isinstance(model, str) else unwrap(model).config._name_or_path
    if not name:
        return None
    options = hub_kwargs(args) if isinstance(model, str) else {"trust_remote_code": args.trust_remote_code}
    return AutoTokenizer.from_pretrained(name, **options)
