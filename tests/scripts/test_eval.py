"""`trl-dllm eval`: generations are reused for the same model alone, and drawn as the model was trained to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from trl_dllm.evaluation import GENERATIONS, SUMMARY
from trl_dllm.generation import DiffusionGenerationConfig, decoding_of, save_decoding
from trl_dllm.scripts import eval as evaluation


TRAINED = DiffusionGenerationConfig(
    12,
    block_length=6,
    diffusion_steps=4,
    remasking="random",
    stop_at_eos=False,
    decoding="any_order",
    cache="exact",
    temperature=0.9,
)


@pytest.fixture
def model(tmp_path, tiny_checkpoint) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def adapter(tmp_path, model) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(model: Path, folder: Path, *flags: str) -> dict:
    argv = ["--model_name_or_path", str(model), "--task", "sudoku", "--num_examples", "4", "--output_dir", str(folder)]
    return evaluation.main(evaluation.make_parser().parse_args([*argv, *flags]))


def add(path: Path, value: float) -> None:
    tensors = {name: tensor + value for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def no_weights(monkeypatch) -> None:
    """From now on, loading any weight fails the test."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)


# ------------------------------------------------------------------------------------------ whose generations they are


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer", "adapter_weights", "no adapter"])
def test_another_model_at_the_same_path_is_refused_before_it_loads(model, adapter, tmp_path, monkeypatch, change):
    flags = ["--max_new_tokens", "16", "--adapter", str(adapter)]
    run(model, tmp_path / "eval", *flags)
    before = (tmp_path / "eval" / GENERATIONS).read_text()
    if change == "weights":
        add(model / "model.safetensors", 1.0)
    elif change == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    elif change == "tokenizer":
        (model / "chat_template.jinja").write_text("{{ 1 }}")
    elif change == "adapter_weights":
        add(adapter / "adapter_model.safetensors", 1.0)
    elif change == "no adapter":
        flags = flags[:2]
    no_weights(monkeypatch)
    name = "adapter_weights" if change == "no adapter" else change
    with pytest.raises(ValueError, match=rf"holds an evaluation with other settings \({name} differ\)") as error:
        run(model, tmp_path / "eval", *flags)
    assert f"│ {name} " in str(error.value) and "Choose another, or delete that folder" in str(error.value)
    assert (tmp_path / "eval" / GENERATIONS).read_text() == before


def test_the_same_model_is_reused_wherever_it_lies_and_loads_no_weights(model, tmp_path, monkeypatch):
    whole = run(model, tmp_path / "eval", "--max_new_tokens", "16")
    model.rename(tmp_path / "moved")
    no_weights(monkeypatch)
    again = run(tmp_path / "moved", tmp_path / "eval", "--max_new_tokens", "16")
    assert again.pop("seconds") <= whole.pop("seconds") and again == whole


def test_all_lengths_of_the_d1_protocol_are_checked_before_the_model_loads(model, tmp_path, monkeypatch):
    flags = ["--protocol", "d1", "--lengths", "32"]
    run(model, tmp_path / "eval", *flags)
    no_weights(monkeypatch)
    with pytest.raises(ValueError, match=r"eval/32' holds an evaluation with other settings \(parser differ\)"):
        run(model, tmp_path / "eval", "--parser", "d1", "--protocol", "d1", "--lengths", "64", "32")


# -------------------------------------------------------------------------------------------------------- the decoding


def test_it_decodes_as_the_model_was_trained_and_says_so(model, tmp_path, capsys):
    save_decoding(decoding_of(TRAINED), model)
    summary = run(model, tmp_path / "eval")
    expected = DiffusionGenerationConfig(**{**decoding_of(TRAINED), "temperature": 0.0})
    assert DiffusionGenerationConfig(**{**summary["generation"], "tokens_per_step": None}) == expected
    line = f"Decoding as saved with {model}: max_new_tokens=12, block_length=6, diffusion_steps=4, remasking=random, "
    assert any(printed.startswith(line) for printed in capsys.readouterr().out.splitlines())
    records = [json.loads(text) for text in (tmp_path / "eval" / GENERATIONS).read_text().splitlines()]
    assert all(record["steps"] == 4 for record in records)


def test_what_is_given_wins_and_is_said(model, tmp_path, capsys):
    save_decoding(decoding_of(TRAINED), model)
    summary = run(model, tmp_path / "eval", "--max_new_tokens", "24", "--remasking", "margin", "--temperature", "1.0")
    found = summary["generation"]
    assert (found["max_new_tokens"], found["block_length"], found["diffusion_steps"]) == (24, 6, 8)
    assert (found["remasking"], found["decoding"], found["temperature"]) == ("margin", "any_order", 1.0)
    assert "; but max_new_tokens=24, diffusion_steps=8, remasking=margin." in capsys.readouterr().out


def test_an_adapter_brings_its_own(model, adapter, tmp_path):
    save_decoding({"max_new_tokens": 8}, model)
    assert run(model, tmp_path / "base", "--adapter", str(adapter))["generation"]["max_new_tokens"] == 8
    save_decoding(decoding_of(TRAINED), adapter)
    assert run(model, tmp_path / "own", "--adapter", str(adapter))["generation"]["max_new_tokens"] == 12


def test_a_default_canvas_is_said(model, tmp_path, monkeypatch, capsys):
    run(model, tmp_path / "eval", "--dry_run")
    assert f"No decoding.json with {model}: the canvas has 256 tokens, the default." in capsys.readouterr().out


def test_the_d1_protocol_takes_what_the_model_is_and_nothing_else(model, tmp_path, monkeypatch):
    save_decoding(decoding_of(TRAINED), model)
    configs = []
    monkeypatch.setattr(evaluation, "dry_run_decoding", lambda command, name, config, *rest: configs.append(config))
    run(model, tmp_path / "eval", "--protocol", "d1", "--dry_run", "--lengths", "64")
    expected = {"block_length": 32, "tokens_per_step": 2, "stop_at_eos": False, "temperature": 0.0}
    assert configs == [DiffusionGenerationConfig(64, decoding="any_order", cache="exact", **expected)]


def test_a_summary_names_the_model_and_what_it_is(model, tmp_path):
    run(model, tmp_path / "eval", "--max_new_tokens", "8")
    summary = json.loads((tmp_path / "eval" / SUMMARY).read_text())
    assert summary["model"] == str(model) and summary["adapter"] is None and summary["mask_token_id"] == 3
    assert len(summary["weights"]) == 32 and summary["split"] == "test" and torch.get_num_threads() == 1


def test_programs_that_may_not_run_are_refused_before_anything_is_drawn(model, tmp_path, monkeypatch):
    def refused(text, row):
        raise PermissionError("TRL_DLLM_ALLOW_CODE_EXECUTION")

    task = replace(evaluation.find_task("sudoku"), score=refused, parsers={})
    monkeypatch.setattr(evaluation, "find_task", lambda name: task)
    no_weights(monkeypatch)
    with pytest.raises(PermissionError, match="ALLOW_CODE_EXECUTION"):
        run(model, tmp_path / "out")
