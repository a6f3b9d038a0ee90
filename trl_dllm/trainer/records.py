"""What every trainer here writes beside a model: how it is decoded, what it belongs to, and whether it is finished."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback

from ..fingerprint import FINGERPRINT, Fingerprint
from ..generation import save_decoding
from ..generation.saved import DECODING
from ..identity import tokenizer_files, weight_files
from .dpo_config import DiffusionDPOConfig
from .grpo_config import DiffusionGRPOConfig
from .sft_config import DiffusionSFTConfig


_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", DECODING)


class RecordingTrainer(Trainer):
    """A trainer whose checkpoints and models carry `decoding.json` and, if it has one, its fingerprint."""

    args: DiffusionGRPOConfig | DiffusionSFTConfig | DiffusionDPOConfig
    fingerprint: Fingerprint | None = None  # set by the scripts, which know what it is made of

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir) if output_dir else self._output_dir
        if self.args.should_save:
            (folder / FINGERPRINT).unlink(missing_ok=True)  # of what is being overwritten
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            save_decoding(self.known_decoding(), folder)
            if self.fingerprint is not None:
                self.fingerprint.write(folder)

    def known_decoding(self) -> dict[str, Any]:
        """What is saved beside the model of how it is to be decoded: as far as the training says."""
        return self.args.known_decoding()

    def save_finished(self) -> None:
        """Save the trained model and the trainer's state to output_dir; last of all the word that it is finished."""
        folder = self._output_dir
        if self.fingerprint is not None:
            self.fingerprint = replace(self.fingerprint, finished=None)
        self.save_model(str(folder))
        self.save_state()
        if self.args.should_save and self.fingerprint is not None:
            files = {path.name: path.stat().st_size for path in model_files(folder)}
            finished = {"global_step": self.state.global_step, "max_steps": self.state.max_steps, "files": files}
            self.fingerprint = replace(self.fingerprint, finished=finished)
            self.fingerprint.write(folder)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Load a checkpoint as `train` does, on every back-end; take no step, and neither log nor save an end."""
        self.callback_handler.callbacks.insert(0, _stop := _StopBeforeTraining())
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except _Loaded:
            self.is_in_train = False
        finally:
            self.remove_callback(_stop)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # It copies the files that it knows from the checkpoint, and uploads what is then in output_dir.
        saved = Path(checkpoint_folder) / DECODING
        if self.is_world_process_zero() and saved.exists():
            shutil.copy(saved, self._output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # TrainingArguments has filled it in
        return Path(self.args.output_dir)


class _Loaded(Exception):
    """Everything that a checkpoint holds is loaded."""


class _StopBeforeTraining(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise _Loaded


def model_files(folder: Path) -> list[Path]:
    """What a saved model or adapter consists of: weights, configs and tokenizer."""
    configs = [folder / name for name in _CONFIGS if (folder / name).exists()]
    return [*weight_files(folder), *configs, *tokenizer_files(folder)]


def is_complete(folder: Path, fingerprint: Fingerprint) -> bool:
    """Whether a folder holds the finished model that its fingerprint speaks of, every file as long as it was."""
    files = (fingerprint.finished or {}).get("files", {})
    present = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())
    return present and all(_opens(path) for path in weight_files(folder)) and bool(files and weight_files(folder))


def _opens(path: Path) -> bool:
    """Whether the header of safetensors can be read, and the numbers that it names are there."""
    if path.suffix != ".safetensors":
        return True
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False
