"""Weights too coarse for their learning rate: a run that goes through all its steps and changes next to nothing.

Adam moves a weight by about the learning rate. The next bfloat16 number is up to |w| / 128 away, and a step that is
less than half of that rounds to nothing: at 5e-5, nine in ten weights of a small language model stay where they are,
and its reward with them.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


OF_WEIGHTS = (
    "Load them as float32 (dtype: float32; bf16: true still multiplies in bfloat16), train under DeepSpeed, which has "
    "float32 copies, or train an adapter."
)
OF_ADAPTERS = (
    "TRL makes adapters on quantised weights bfloat16, as QLoRA's are. Train under DeepSpeed, which has float32 "
    "copies (--accelerate_config zero2, on one GPU as well), or leave load_in_4bit out."
)
_MOST = 100_000  # elements of a tensor that are looked at
_HALF = (torch.bfloat16, torch.float16)
_BY_LEARNING_RATE = ("adam", "lion")  # optimizers whose steps are about as large as it


def lost_share(parameters: Iterable[Tensor], learning_rate: float) -> float:
    """The share of weights, 0 to 1, that a step of `learning_rate` rounds back to where they are; 0 if there are none.

    Weights of 0 do not count: any step moves them, until they are as large as others. A weight in [2^e, 2^(e+1)) of a
    type with `eps` has its neighbours eps · 2^e away. Of a tensor, evenly spread elements are looked at, 100,000 or
    all.
    """
    lost, total = 0.0, 0.0
    for parameter in parameters:
        weights = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().flatten()
        if not weights.numel():
            continue
        seen = weights[:: max(1, len(weights) // _MOST)].float()
        _, exponent = torch.frexp(seen)  # of a mantissa in [1/2, 1)
        half = torch.ldexp(torch.full_like(seen, torch.finfo(weights.dtype).eps / 4), exponent)
        lost += float(((half > learning_rate) & (seen != 0)).float().mean()) * len(weights)
        total += float((seen != 0).float().mean()) * len(weights)
    return lost / max(1, total)


class WarnOfLostSteps(TrainerCallback):
    """Warns, when training begins, of trained weights most of which the learning rate cannot move.

    DeepSpeed steps on float32 copies, and accelerate makes FSDP's weights float32 under mixed precision: then there is
    nothing to warn of. The learning rate is the schedule's largest.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        name = str(getattr(args.optim, "value", args.optim))
        if self.trainer.is_deepspeed_enabled or not any(kind in name for kind in _BY_LEARNING_RATE):
            return
        trained = [p for p in model.parameters() if p.requires_grad and p.dtype in _HALF]
        share = lost_share(trained, args.learning_rate)
        if share > 0.5:
            quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
            kind = str(trained[0].dtype).removeprefix("torch.")
            warnings.warn(
                f"learning_rate={args.learning_rate:g}: {share:.0%} of the {kind} weights that are trained are so "
                "large that a step of that size rounds to nothing, and the run will change little. "
                + (OF_ADAPTERS if quantised else OF_WEIGHTS)
            )
