"""What a model and a dataset are, by their content: any change is seen, and nothing is read twice."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from trl_dllm import identity
from trl_dllm.identity import dataset_hash, hash_files, model_identity, module_identity, weight_files
from trl_dllm.models import create_tiny_model


KEYS = {"weights", "config", "mask_token_id", "tokenizer", "adapter_weights"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trl_dllm" / "hashes.json"


@pytest.fixture
def folder(tmp_path, tiny_checkpoint) -> Path:
    """A copy of a tiny checkpoint."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files whose content is read."""
    names, read = [], identity._hash_file
    monkeypatch.setattr(identity, "_hash_file", lambda path: names.append(path.name) or read(path))
    return names


def make_old(*paths: Path) -> None:
    """As if written a minute ago: a younger file may be written once more within a tick of the clock."""
    for path in paths:
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 60_000_000_000))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def changed_by(folder: Path, change) -> set[str]:
    before = model_identity(str(folder))
    change()
    after = model_identity(str(folder))
    return {key for key in before if before[key] != after[key]}


def adapter(folder: Path, base: Path, value: float = 1.0) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 2}))
    save_file({"lora_A": torch.full((2, 2), value)}, folder / "adapter_model.safetensors")
    return folder


# ------------------------------------------------------------------------------------------------- a model in a folder


def test_it_goes_by_content_and_not_by_place(folder, tmp_path, tiny_checkpoint):
    found = model_identity(str(folder))
    assert found == model_identity(tiny_checkpoint) and set(found) == KEYS
    assert found["mask_token_id"] == 3 and found["adapter_weights"] is None


def test_one_changed_number_is_another_model_though_size_and_time_stay(folder):
    path = folder / "model.safetensors"
    make_old(path)

    def change():
        stat, tensors = path.stat(), load_file(path)
        next(iter(tensors.values())).flatten()[-1] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    assert changed_by(folder, change) == {"weights"}


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"rms_norm_eps": 1e-6}, {"config"}),
        ("config.json", {"mask_token_id": 5}, {"config", "mask_token_id"}),
        ("config.json", {"transformers_version": "9", "dtype": "bfloat16", "_name_or_path": "/elsewhere"}, set()),
        ("generation_config.json", {"eos_token_id": [1, 7]}, {"config"}),
        ("generation_config.json", {"transformers_version": "9"}, set()),
        ("tokenizer_config.json", {"eos_token": "<pad>"}, {"tokenizer"}),
    ],
)
def test_what_changes_what_is_computed_is_seen(folder, file, changes, expected):
    assert changed_by(folder, lambda: edit(folder / file, **changes)) == expected


def test_a_chat_template_belongs_to_the_tokenizer(folder):
    assert changed_by(folder, lambda: (folder / "chat_template.jinja").write_text("{{ 1 }}")) == {"tokenizer"}
    assert changed_by(folder, (folder / "chat_template.jinja").unlink) == {"tokenizer"}


def test_what_is_not_the_models_is_not_looked_at(folder):
    def change():
        (folder / "README.md").write_text("a card")
        (folder / "optimizer.pt").write_bytes(b"1")
        (folder / "training_args.bin").write_bytes(b"1")

    assert changed_by(folder, change) == set()


def test_shards_are_read_by_their_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        names[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / names[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(weight_files(folder)) == len(tensors) + 1
    shard = folder / names[name]
    assert changed_by(folder, lambda: save_file({name: tensor + 1}, shard)) == {"weights"}


def test_an_adapter_beside_its_model_and_in_a_folder_of_its_own(folder, tmp_path):
    base, first, second = model_identity(str(folder)), adapter(tmp_path / "a", folder), tmp_path / "b"
    beside = model_identity(str(folder), adapter=str(first))
    assert {**beside, "adapter_weights": None} == base and beside["adapter_weights"]
    assert model_identity(str(first)) == beside, "the base is the one that its config names"
    assert model_identity(str(folder), adapter=str(adapter(second, folder, value=2.0))) != beside
    edit(second / "adapter_config.json", base_model_name_or_path="elsewhere", inference_mode=True)
    save_file({"lora_A": torch.full((2, 2), 1.0)}, second / "adapter_model.safetensors")
    assert model_identity(str(folder), adapter=str(second)) == beside
    edit(second / "adapter_config.json", r=4)
    assert model_identity(str(folder), adapter=str(second)) != beside


def test_a_model_of_the_hub_is_told_by_its_commit(folder, tmp_path, monkeypatch):
    commits = {None: "a" * 40, "v1": "b" * 40}

    def cached_file(name, file, revision=None, **kwargs):
        snapshot = tmp_path / "hub" / "snapshots" / commits[revision]
        if not snapshot.exists():
            snapshot.mkdir(parents=True)
            shutil.copy(folder / "config.json", snapshot)
        return str(snapshot / file) if (snapshot / file).exists() else None

    monkeypatch.setattr(identity, "cached_file", cached_file)
    found = model_identity("me/model")
    assert found["weights"] == f"me/model@{'a' * 40}" and found["mask_token_id"] == 3 and set(found) == KEYS
    assert model_identity("me/model", "v1")["weights"] == f"me/model@{'b' * 40}"


def test_what_is_neither_a_folder_nor_on_the_hub_is_an_error():
    with pytest.raises(OSError, match="no/such-model"):
        model_identity("no/such-model")


# -------------------------------------------------------------------------------------------------- reading files once


def test_a_file_is_read_once_until_it_changes(folder, reads, cache):
    path = folder / "model.safetensors"
    make_old(path)
    first = hash_files([path])
    assert hash_files([path]) == first and reads == [path.name]
    assert cache.exists() and not list(folder.glob("*hash*")), "never beside somebody's weights"
    path.write_bytes(path.read_bytes())
    make_old(path)
    assert hash_files([path]) == first and reads == [path.name] * 2, "its time is another one"


def test_a_file_that_was_just_written_is_read_again(folder, reads):
    path = folder / "model.safetensors"
    path.touch()
    hash_files([path]), hash_files([path])
    assert reads == [path.name] * 2, "its time cannot tell it from what is written in the same tick"


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_cache_that_cannot_be_read_is_made_anew(folder, reads, cache, text):
    path = folder / "model.safetensors"
    make_old(path)
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert hash_files([path]) == hash_files([path]) and reads == [path.name]


def test_a_cache_that_cannot_be_written_is_done_without(folder, reads, cache, monkeypatch):
    path = folder / "model.safetensors"
    make_old(path)
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    assert hash_files([path]) == hash_files([path]) and reads == [path.name] * 2


def test_files_that_are_gone_leave_the_cache(folder, tmp_path, cache):
    other = Path(shutil.copy(folder / "model.safetensors", tmp_path / "other"))
    make_old(other, folder / "model.safetensors")
    hash_files([other])
    other.unlink()
    hash_files([folder / "model.safetensors"])
    assert list(json.loads(cache.read_text())) == [str(folder / "model.safetensors")]


# ------------------------------------------------------------------------------------------- models in memory and rows


def test_a_model_in_memory_goes_by_its_parameters():
    model, tokenizer = create_tiny_model(hidden_size=16, num_layers=1)
    first = module_identity(model, tokenizer)
    assert set(first) == KEYS and first == module_identity(*create_tiny_model(hidden_size=16, num_layers=1))
    tokenizer(["1", "12"], padding=True, truncation=True, max_length=2)
    assert first == module_identity(model, tokenizer), "how a tokenizer was last called is not what it is"
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    second = module_identity(model, tokenizer)
    assert {key for key in KEYS if first[key] != second[key]} == {"weights"}
    tokenizer.chat_template = "{{ 1 }}"
    assert module_identity(model, tokenizer)["tokenizer"] != first["tokenizer"]
    model.config.mask_token_id = 5
    assert module_identity(model, tokenizer)["mask_token_id"] == 5
    assert module_identity(model.to(torch.bfloat16), tokenizer)["weights"] != second["weights"]


def test_rows_go_by_their_content_and_order():
    rows = [{"prompt": "1=", "answer": 3}, {"prompt": "2=", "answer": 4}]
    first = dataset_hash(Dataset.from_list(rows))
    assert first == dataset_hash(rows) == dataset_hash([{"answer": row["answer"], **row} for row in rows])
    assert first != dataset_hash(rows[::-1]) and first != dataset_hash(rows[:1])
    assert first != dataset_hash([rows[0], {"prompt": "2=", "answer": 5}])
    assert dataset_hash(Dataset.from_list(rows).to_iterable_dataset()) is None
