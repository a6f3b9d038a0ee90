"""The reference policy: where TRL loads it from, and how it is run on what the policy is run on."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from ..likelihood import Reference
from ..models import hidden_rows, unwrap


@contextmanager
def reference_source(model, needed: bool) -> Iterator[None]:
    """Give TRL a folder to load the reference from, where the policy was made in memory and has no name.

    One folder for all processes: transformers writes it on the first of them alone.
    """
    in_memory = isinstance(model, PreTrainedModel) and not model.config._name_or_path
    if not needed or not in_memory or hasattr(model, "peft_config"):
        yield
        return
    state = PartialState()
    with tempfile.TemporaryDirectory() if state.is_main_process else nullcontext() as own:
        (folder,) = broadcast_object_list([own])
        model.save_pretrained(folder)
        model.config._name_or_path = folder
        state.wait_for_everyone()
        try:
            yield
        finally:
            model.config._name_or_path = ""
        state.wait_for_everyone()  # nobody reads the folder any more


@contextmanager
def as_reference(trainer) -> Iterator[nn.Module]:
    """The module whose forward is the reference's: a model of its own, or the policy without (new) adapters."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    # A model that came with an adapter is its own reference, of which TRL keeps a copy under this name.
    with use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
        yield trainer.model


def reference_beside(trainer) -> Reference:
    """How the scorer runs the reference beside the policy, for the KL over the whole vocabulary."""

    def run(inputs: dict, rows: Tensor):
        with torch.no_grad(), as_reference(trainer) as model:
            hidden = hidden_rows(model, inputs, rows)
        head = unwrap(model).get_output_embeddings()
        # The policy's own head is being redirected, and only its forward as it is now projects; adapters are not put
        # on it. A reference's own head is called as a module: where it is sharded, its hooks gather it.
        return hidden, head if trainer.ref_model is not None else head.forward

    return run
