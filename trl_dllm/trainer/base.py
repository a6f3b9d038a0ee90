"""What every trainer here adds to Trainer: complete checkpoints, exact resumes, and an end at the first NaN.

It stands before TRL's trainer in the bases of a trainer. `checkpoint.py` and `finite.py` do the work.
"""

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..models.adapters import resume_adapters
from .checkpoint import find_checkpoint, load_process_states, make_way, save_process_state
from .coarse import WarnOfLostSteps
from .data import check_steps
from .finite import check_gradient
from .records import RecordingTrainer
from .stock import Interface


HOOKS: Interface = {
    "train": ("resume_from_checkpoint",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "_load_rng_state": ("checkpoint",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_build_accelerator_args": (),
}


class DiffusionTrainer(RecordingTrainer):
    """Trainer with these hooks, and with what it writes beside a model.

    A trainer says what is its own in `process_state` and `load_process_states`.
    """

    def __init__(self, *args, **kwargs):
        self.finished_epochs = 0  # before the first step of this process
        self.rows_of_step: list[tuple[Tensor, Tensor]] = []  # ids and masks of the optimizer step's micro-batches
        super().__init__(*args, **kwargs)
        self.add_callback(WarnOfLostSteps(self))

    def _build_accelerator_args(self, **kwargs):
        # `torch_compile`: rows, widths and canvases change from call to call. Without this each new size would be a
        # graph of its own, until the compiler gives up (at 8).
        found = super()._build_accelerator_args(**kwargs)
        if found["dynamo_plugin"].dynamic is None:
            found["dynamo_plugin"].dynamic = True
        return found

    def process_state(self, folder: str) -> dict[str, Any]:
        """What this process needs to go on exactly, beside what Trainer saves: tensors, numbers, strings.

        What is one for all processes, and large, goes into a file of `folder` instead.
        """
        raise NotImplementedError

    def load_process_states(self, states: list[dict[str, Any]], folder: str) -> None:
        """Take up what `process_state` gave: this process's own first, then those of processes that are gone."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in Trainer; `resume_from_checkpoint=True` takes the newest complete checkpoint, and warns of others."""
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if resume_from_checkpoint is True and checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True: {self.args.output_dir!r} holds no complete checkpoint. Leave it out "
                "to start from the beginning."
            )
        (checkpoint,) = broadcast_object_list([checkpoint])  # a shared folder may look different from another node
        self._taken_up, self.finished_epochs = False, 0
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            self.finished_epochs = int(state.epoch or 0)
        output = super().train(checkpoint, *args, **kwargs)
        if checkpoint is not None and not self._taken_up:  # no step was left, in an epoch of its own
            self.load_process_states(load_process_states(self, checkpoint), checkpoint)
        check_steps(self.state.global_step)
        return output

    def get_batch_samples(self, *args, **kwargs):
        # A run that is resumed behind its last step: Trainer would take one more before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # which restores a sharded state dict, under the names that it was saved with
            resume_adapters(self.model if model is None else model, resume_from_checkpoint)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            limited = bool(self.args.save_total_limit and self.args.save_total_limit > 0)
            make_way(self._get_output_dir(trial), self.state.global_step, limited)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    # Trainer calls these two on every process of every back-end: the one when all but the trainer state is written,
    # before the upload to the Hub and before old checkpoints are deleted; the other just before the first step, when
    # what it counts itself is set up.

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        save_process_state(self, output_dir, self.process_state(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._taken_up = True
            self.load_process_states(load_process_states(self, checkpoint), checkpoint)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        check_gradient(self, grad_norm)
        return grad_norm
