"""Rows of a benchmark, from the Hub or from a local folder of the same shape."""

import csv
import gzip
import json
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from .base import PROMPT_FORMATS


DATA_VARIABLE = "TRL_DLLM_DATA"


def data_folder(data_dir: str | None) -> Path | None:
    """The local folder with all tasks' data: `data_dir`, else what TRL_DLLM_DATA names, else None for the Hub."""
    name = data_dir or os.environ.get(DATA_VARIABLE)
    if not name:
        return None
    if not Path(name).is_dir():
        raise ValueError(
            f"data_dir={str(name)!r} is not a folder (it comes from the argument or from {DATA_VARIABLE})."
        )
    return Path(name)


def read_file(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .csv file, either of which may be gzipped."""
    path = Path(path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        if suffixes[-1:] == [".csv"]:
            return list(csv.DictReader(file))
        return [json.loads(line) for line in file if line.strip()]


def read_rows(
    task: str,
    split: str,
    files: Mapping[str, str],
    hub: Mapping[str, tuple[str, str | None, str]],
    data_dir: str | None = None,
    allow_test_as_train: bool = False,
) -> list[dict[str, Any]]:
    """
    All rows of one split.

    Args:
        files: the file of each split, relative to the local folder (".gz" may follow).
        hub: (Hub id, configuration, Hub split) of each split that the Hub has.
        allow_test_as_train: read the test rows where there are none to train on. For trying a recipe out: a model
            that was trained so has no meaningful test score, and a warning says so.

    Raises `ValueError`, naming what is missing, where the split does not exist.
    """
    folder = data_folder(data_dir)
    paths: dict[str, Path] = {}
    if folder is None:
        known, missing = set(hub), f"the Hub has no {split!r} split of {task}"
    else:
        found = {name: _existing(folder / file) for name, file in files.items()}
        paths = {name: path for name, path in found.items() if path is not None}
        known = set(paths)
        missing = f"{folder / files.get(split, f'{task}/{split}.jsonl')} does not exist"
    if split not in known:
        if split != "train" or "test" not in known:
            raise ValueError(f"{missing}. Splits that can be read: {', '.join(sorted(known)) or 'none'}.")
        if not allow_test_as_train:
            raise ValueError(
                f"{missing}, and test data are not trained on unasked. Provide it, train on another task, or pass "
                "allow_test_as_train=True to try a recipe out."
            )
        warnings.warn(f"{task}: training on its test split (allow_test_as_train=True); its test score means nothing.")
        split = "test"
    if folder is not None:
        return read_file(paths[split])
    name, config, hub_split = hub[split]
    return load_dataset(name, config, split=hub_split).to_list()


def _existing(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def choose(rows: list, split: str, num_examples: int | None, seed: int) -> list:
    """`num_examples` of the rows, all for None: shuffled by `seed` for training, else the first ones in file order."""
    if num_examples is not None and num_examples > len(rows):
        raise ValueError(f"num_examples={num_examples}, but the {split!r} split has {len(rows)} rows.")
    if split == "train":
        rows = random.Random(f"rows/{seed}").sample(rows, len(rows))
    return rows[:num_examples]


def to_dataset(
    prompts: list[str], completions: list[str] | None, columns: Mapping[str, list], prompt_format: str
) -> Dataset:
    """A data set with `prompt`, the given columns and (for SFT) `completion`, as text or as messages."""
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format must be one of {PROMPT_FORMATS}, got {prompt_format!r}.")
    data: dict[str, list] = {"prompt": prompts, **columns}
    if completions is not None:
        data["completion"] = completions
    if prompt_format == "chat":
        data["prompt"] = [[{"role": "user", "content": text}] for text in prompts]
        if completions is not None:
            data["completion"] = [[{"role": "assistant", "content": text}] for text in completions]
    return Dataset.from_dict(data)
