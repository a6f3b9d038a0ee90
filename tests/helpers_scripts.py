"""Recipes of a few seconds for the tests of the command line and its scripts."""

import gc
from pathlib import Path

import yaml


# accelerate collects garbage whenever `train` starts: half of a tiny run, unless what was imported is taken out of it.
gc.collect()
gc.freeze()

SFT = {
    "task": "sudoku",
    "num_train_examples": 16,
    "output_dir": "",
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 1,
    "logging_steps": 1,
    "resume_from_checkpoint": True,
    "canvas_length": 16,
}
GRPO = {
    **{key: value for key, value in SFT.items() if key != "canvas_length"},
    "max_completion_length": 16,
    "block_length": 8,
    "diffusion_steps": 4,
    "num_generations": 4,
    "num_segments": 2,
}
DPO = {
    **{key: value for key, value in SFT.items() if key != "canvas_length"},
    "rejected_kwargs": {"answer_noise": 0.5},
    "num_samples": 2,
}


def write_recipe(folder: Path, settings: dict, **changes) -> str:
    """A recipe with these settings, changed, as a file in `folder`."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return str(path)
