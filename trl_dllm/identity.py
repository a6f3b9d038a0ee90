"""Which weights, tokenizer and data a result was made with, told by their content and not by where they lie.

Weights are read in full, so that any changed number is another identity, and once: hashes of files are kept by path,
size and times in `$XDG_CACHE_HOME/trl_dllm/hashes.json` (`~/.cache` if that is not set). A model on the Hub is told by
its name and commit.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file, extract_commit_hash

from .models import unwrap


# (a single file, the index of several), in the order in which transformers looks for them.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)

# What a config says of where it was, how it is stored or who wrote it, and not of what the model computes.
_INCIDENTAL = {"_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_INCIDENTAL |= {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}  # PEFT's

# A file may be written twice within one tick of the clock that its time is read off; a younger one is hashed again.
_TICK_NS = 2_000_000_000


def model_identity(name: str, revision: str | None = None, adapter: str | None = None) -> dict[str, Any]:
    """`weights`, `config`, `mask_token_id`, `tokenizer` and `adapter_weights` of a model, before any of it is loaded.

    Args:
        name (`str`): a folder, of a model or of a PEFT adapter, or a name on the Hub.
        revision (`str`, *optional*): of a name on the Hub.
        adapter (`str`, *optional*): folder or Hub name of a PEFT adapter that is loaded onto it.

    Raises:
        OSError: neither a folder nor a name that the Hub knows.
    """
    if adapter is not None:
        return {**model_identity(name, revision), "adapter_weights": _adapter_identity(adapter)}
    folder = Path(name)
    if not folder.is_dir():
        place, config = _on_hub(name, revision)
        if "base_model_name_or_path" in config:
            return {**_base_identity(config), "tokenizer": place, "adapter_weights": place}
        mask = config.get("mask_token_id")
        return {"weights": place, "config": place, "mask_token_id": mask, "tokenizer": place, "adapter_weights": None}
    tokenizer = tokenizer_files(folder)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        found = {**_base_identity(_json(folder / "adapter_config.json")), "adapter_weights": _adapter_identity(name)}
        return {**found, "tokenizer": _files(tokenizer)} if tokenizer else found
    config = _json(folder / "config.json")
    own = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    own["eos"] = _json(folder / "generation_config.json").get("eos_token_id")  # ends completions
    return {
        "weights": _files(weight_files(folder)),
        "config": _digest(own),
        "mask_token_id": config.get("mask_token_id"),
        "tokenizer": _files(tokenizer),
        "adapter_weights": None,
    }


def module_identity(model: nn.Module, tokenizer) -> dict[str, Any]:
    """The same of a model in memory; reads every parameter once. It is not comparable with `model_identity`."""
    model, whole = unwrap(model), hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _INCIDENTAL}
    config["eos"] = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    words = {"vocabulary": tokenizer.get_vocab(), "template": tokenizer.chat_template}
    if tokenizer.is_fast:  # padding and truncation are how it was last called
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        words["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    return {
        "weights": whole.hexdigest(),
        "config": _digest(config),
        "mask_token_id": config.get("mask_token_id"),
        "tokenizer": _digest(words),
        "adapter_weights": None,
    }


def dataset_hash(dataset) -> str | None:
    """Hash of a dataset's rows, in order; None for one that is streamed."""
    if not hasattr(dataset, "__len__"):
        return None
    whole = hashlib.blake2b(digest_size=16)
    for row in dataset:
        whole.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return whole.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that transformers and PEFT read weights from; none where there are none."""
    for single, index in _WEIGHTS:
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            shards = sorted(set(_json(folder / index).get("weight_map", {}).values()))
            return [folder / index, *(folder / shard for shard in shards)]
    return [folder / file for file in _ADAPTER if (folder / file).exists()][:1]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to a tokenizer."""
    return sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern) if path.is_file()})


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """BLAKE2b of each file's content; a file that has the size and times of its last reading is not read again."""
    known, found, todo = _read_cache(), {}, {}
    for path in paths:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = known.get(str(path.resolve()))
        if entry and entry[:-1] == stamp:
            found[path] = entry[-1]
        else:
            todo[path] = stamp
    start = time.time_ns()
    with ThreadPoolExecutor(4) as pool:
        found.update(zip(todo, pool.map(_hash_file, todo), strict=True))
    old_enough = {path: stamp for path, stamp in todo.items() if start - stamp[1] > _TICK_NS}
    if old_enough:
        _write_cache({str(path.resolve()): [*stamp, found[path]] for path, stamp in old_enough.items()})
    return found


def _hash_file(path: Path) -> str:
    digest, buffer = hashlib.blake2b(digest_size=16), memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_dllm" / "hashes.json"


def _read_cache() -> dict[str, list]:
    try:
        entries = json.loads(_cache_path().read_text())
    except (OSError, ValueError):  # none yet, or one that cannot be read: everything is hashed
        return {}
    return entries if isinstance(entries, dict) else {}


def _write_cache(entries: Mapping[str, list]) -> None:
    path = _cache_path()
    kept = {file: entry for file, entry in _read_cache().items() if Path(file).exists()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**kept, **entries}))
        os.replace(temporary, path)
    except OSError:  # a home that cannot be written to: the files are hashed again next time
        pass


def _adapter_identity(name: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return _on_hub(name, None)[0]
    config = _json(folder / "adapter_config.json")
    own = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    files = [folder / file for file in _ADAPTER if (folder / file).exists()]
    return _digest([own, _files(files)])


def _base_identity(adapter_config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the model that an adapter was trained on."""
    return model_identity(adapter_config["base_model_name_or_path"], adapter_config.get("revision"))


def _on_hub(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """`name@commit`, and the config that stands there."""
    for file in ("config.json", "adapter_config.json"):
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return f"{name}@{extract_commit_hash(path, None) or revision}", _json(Path(path))
    raise OSError(
        f"{name!r} is no folder, and neither the Hub nor its cache has a config.json or an adapter_config.json of it."
    )


def _files(paths: Iterable[Path]) -> str:
    """One hash of several files, by their names."""
    return _digest(sorted((path.name, value) for path, value in hash_files(paths).items()))


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
