"""What lies beside a saved model: its decoding, what it belongs to, and whether it is finished."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers_grpo import build, lora, tiny, weights

from trl_dllm import DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.fingerprint import FINGERPRINT, Fingerprint
from trl_dllm.generation import read_decoding
from trl_dllm.generation.saved import DECODING, decoding_config
from trl_dllm.trainer.records import is_complete, model_files


SAVES = {"save_strategy": "steps", "save_steps": 1}


def build_sft(folder, peft=False, **settings) -> DiffusionSFTTrainer:
    model, tokenizer = tiny()
    args = DiffusionSFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1, **SAVES, **settings
    )
    rows = Dataset.from_dict({"prompt": ["ab", "c", "def"], "completion": ["1", "22", "3"]})
    return DiffusionSFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora() if peft else None
    )


# -------------------------------------------------------------------------------------------------------- the decoding


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_decoding_of_grpo_lies_beside_every_model(tmp_path, peft):
    settings = {"temperature": 0.9, "remasking": "margin", "stop_at_eos": False, "estimator": "mean_field"}
    trainer = build(tmp_path / "run", peft=peft, **settings, **SAVES)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "model"):
        assert (folder / "adapter_config.json").exists() is peft
        assert json.loads((folder / DECODING).read_text()) == {
            "max_new_tokens": 8,
            "temperature": 0.9,
            "block_length": 4,
            "diffusion_steps": 4,
            "remasking": "margin",
            "confidence_threshold": None,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": None,
            "stop_at_eos": False,
            "decoding": "denoising",
            "cache": None,
            "future_blocks": "masked",
            "cfg_scale": 0.0,
        }
        found = decoding_config(read_decoding(folder), {"temperature": 0.9, "eos_token_ids": trainer.eos_token_ids})
        assert found == trainer.sampling
        assert not (folder / FINGERPRINT).exists(), "nobody told the trainer what it is made of"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"canvas_length": 16}, {"max_new_tokens": 16}),
        ({"canvas_length": 16, "block_length": 8}, {"max_new_tokens": 16, "block_length": 8}),
        (
            {"canvas_length": 16, "objective": "any_order"},
            {"max_new_tokens": 16, "block_length": 16, "decoding": "any_order", "cache": "exact"},
        ),
        ({"objective": "any_order"}, {"block_length": 32, "decoding": "any_order", "cache": "exact"}),
        ({}, {}),
    ],
    ids=str,
)
def test_sft_saves_what_it_knows_of_decoding(tmp_path, settings, expected):
    trainer = build_sft(tmp_path / "run", **settings)
    trainer.train()
    assert read_decoding(tmp_path / "run" / "checkpoint-1") == expected
    trainer.save_model(str(tmp_path / "model"))
    assert read_decoding(tmp_path / "model") == expected
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"max_new_tokens={expected.get('max_new_tokens', 256)}, " in card
    assert ("decoding='any_order', cache='exact'" in card) is ("decoding" in expected)


def test_the_model_card_of_grpo_decodes_as_it_was_trained(tmp_path):
    trainer = build(tmp_path, estimator="any_order", decoding="any_order", cache="exact", **SAVES)
    trainer.train()
    shown = "max_new_tokens=8, temperature=0.0, block_length=4, diffusion_steps=4, decoding='any_order', cache='exact'"
    assert f"config = DiffusionGenerationConfig({shown})" in (tmp_path / "README.md").read_text()


def test_the_decoding_goes_to_the_hub_with_a_checkpoint(tmp_path, monkeypatch):
    trainer = build(tmp_path / "run", max_steps=1, **SAVES)
    trainer.train()
    uploaded = []

    def upload_folder(folder_path, **kwargs):
        uploaded.extend(path.name for path in Path(folder_path).iterdir())
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    trainer.hub_model_id, trainer.push_in_progress = "me/model", None
    assert not (tmp_path / "run" / DECODING).exists()
    trainer._push_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert DECODING in uploaded and "model.safetensors" in uploaded


# ---------------------------------------------------------------------------------------------------- the fingerprint


def test_the_fingerprint_lies_beside_every_model_and_says_last_that_it_is_finished(tmp_path, monkeypatch):
    trainer = build(tmp_path, max_steps=2, **SAVES)
    trainer.fingerprint = Fingerprint({"seed": 3}, {"max_steps": 2})
    trainer.train()
    for step in (1, 2):
        assert Fingerprint.read(tmp_path / f"checkpoint-{step}") == trainer.fingerprint
    assert Fingerprint.read(tmp_path) is None
    trainer.save_finished()
    found = Fingerprint.read(tmp_path)
    assert (found.meaning, found.finished["global_step"], found.finished["max_steps"]) == ({"seed": 3}, 2, 2)
    assert {"model.safetensors", "config.json", "tokenizer.json", DECODING} <= set(found.finished["files"])
    assert is_complete(tmp_path, found)

    # Saved once more, and killed before all of it is there.
    def dying(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(trainer), "save_state", dying)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_finished()
    assert not Fingerprint.read(tmp_path).finished and not is_complete(tmp_path, Fingerprint.read(tmp_path))


def test_a_model_that_is_being_saved_again_is_not_finished(tmp_path, monkeypatch):
    trainer = build(tmp_path, max_steps=1)
    trainer.fingerprint = Fingerprint({"seed": 3})
    trainer.train()
    trainer.save_finished()
    seen = []
    monkeypatch.setattr(
        type(trainer.model), "save_pretrained", lambda *a, **k: seen.append(Fingerprint.read(tmp_path))
    )
    trainer.save_finished()
    assert seen == [None], "while files are written, nothing says that they are complete"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = build(folder, max_steps=1)
    trainer.fingerprint = Fingerprint({})
    trainer.train()
    trainer.save_finished()
    return folder


@pytest.mark.parametrize("damage", ["none", "missing", "cut", "tokenizer", "header", "unfinished", "no weights"])
def test_a_finished_model_is_one_whose_files_are_complete(finished, tmp_path, damage):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    found, path = Fingerprint.read(folder), folder / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "header":
        path.write_bytes(bytes(path.stat().st_size))
    elif damage == "unfinished":
        found.finished = None
    elif damage == "no weights":
        path.unlink()
        del found.finished["files"]["model.safetensors"]
    assert is_complete(folder, found) is (damage == "none")


def test_model_files_of_an_adapter(tmp_path):
    trainer = build(tmp_path, peft=True)
    trainer.save_model(str(tmp_path))
    names = {path.name for path in model_files(tmp_path)}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", DECODING} <= names
    assert not names & {"training_args.bin", "README.md", "model.safetensors"}


# ------------------------------------------------------------------------------------------------ loading, and no step


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_checkpoint_is_loaded_without_a_step(tmp_path, peft):
    whole = build(tmp_path, peft=peft, max_steps=3, **SAVES)
    whole.train()
    loaded = build(tmp_path, peft=peft, max_steps=3, **SAVES)
    callbacks = list(loaded.callback_handler.callbacks)
    loaded.load_checkpoint(str(tmp_path / "checkpoint-3"))
    assert loaded.state.global_step == 3 and not loaded.is_in_train
    assert loaded.callback_handler.callbacks == callbacks
    assert all(torch.equal(value, weights(loaded)[name]) for name, value in weights(whole).items())
    again = build(tmp_path / "again", peft=peft, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3, "and so does `train`"


def test_the_best_model_is_loaded_where_it_is_asked_for(tmp_path):
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"metric_for_best_model": "eval_reward", "greater_is_better": False}
    data = Dataset.from_dict({"prompt": ["ab", "cd"] * 8})
    build_one = lambda: build(tmp_path, max_steps=3, data=data, eval_dataset=data, **settings, **SAVES)  # noqa: E731
    whole = build_one()
    whole.train()
    best = Path(whole.state.best_model_checkpoint).name
    loaded = build_one()
    loaded.load_checkpoint(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, weights(loaded)[name]) for name, value in weights(whole).items()), best
