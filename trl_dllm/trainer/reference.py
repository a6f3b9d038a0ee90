"""The reference policy: where TRL loads it from, and how it is run on what the policy is run on."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import use_adapter

from ..likelihood import Reference
from ..models import hidden_rows, hidden_rows_and_head, unwrap


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
            if trainer.ref_model is not None and _sharded(trainer):
                return hidden_rows_and_head(model, inputs, rows)
            hidden = hidden_rows(model, inputs, rows)
        # The policy's own head is being redirected, and only its forward as it is now projects; adapters are not put
        # on it, and where it is sharded it is gathered whenever the policy's is.
        return hidden, unwrap(model).get_output_embeddings().forward

    return run


def _sharded(trainer) -> bool:
    return trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()


_FILE = "reference.pt"  # in a checkpoint, where the reference follows the policy


def save_reference(trainer, folder: str) -> None:
    """Put a reference that follows the policy (`sync_ref_model`) into a checkpoint; no one else keeps it."""
    if trainer.args.sync_ref_model and trainer.args.should_save and not _sharded(trainer):
        torch.save(unwrap(trainer.ref_model).state_dict(), Path(folder) / _FILE)


def load_reference(trainer, folder: str) -> None:
    """Take it up again."""
    if not trainer.args.sync_ref_model:
        return
    if (Path(folder) / _FILE).is_file():
        state = torch.load(Path(folder) / _FILE, map_location="cpu", weights_only=True)
        unwrap(trainer.ref_model).load_state_dict(state)
    elif trainer.accelerator.is_main_process:
        warnings.warn(
            f"sync_ref_model=True, and {folder} holds no reference model (sharded ones are not saved): it is the "
            "initial model again until it is synchronised."
        )
