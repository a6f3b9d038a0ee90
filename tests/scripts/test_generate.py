"""`generate` and `report` decode as the model was trained, what is given wins; and the model that they load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import IDS
from oracles import sharp_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_dllm.generation import DiffusionGenerationConfig, decoding_of, save_decoding
from trl_dllm.models import create_tiny_model
from trl_dllm.scripts import generate, report


@pytest.fixture
def model(tmp_path, tiny_checkpoint) -> str:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    config = DiffusionGenerationConfig(6, block_length=3, diffusion_steps=4, remasking="margin", temperature=0.9)
    save_decoding(decoding_of(config), folder)
    return str(folder)


def settings(config: DiffusionGenerationConfig) -> tuple:
    return config.max_new_tokens, config.block_length, config.diffusion_steps, config.remasking, config.temperature


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (6, 3, 4, "margin", 0.0)),
        (["--max_new_tokens", "12"], (12, 3, 8, "margin", 0.0)),
        (["--diffusion_steps", "2", "--temperature", "0.5"], (6, 3, 2, "margin", 0.5)),
        (["--max_new_tokens", "8"], (8, 8, 5, "margin", 0.0)),
    ],
)
def test_what_is_not_given_is_as_the_model_was_trained(model, flags, expected):
    args = generate.make_parser().parse_args(["--model_name_or_path", model, "--prompt", "1=", *flags])
    assert settings(generate.generation_config(args)) == expected


def test_generate_fills_the_saved_canvas_and_says_so(model, capsys):
    argv = ["--model_name_or_path", model, "--prompt", "12=", "--no_stop_at_eos", "--temperature", "1.0"]
    (text,) = generate.main(generate.make_parser().parse_args(argv))
    assert len(text) <= 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Decoding as saved with {model}: max_new_tokens=6, block_length=3, diffusion_steps=4")
    assert lines[-1] == f"12={text}"


def test_report_draws_as_the_model_was_trained_at_its_own_temperature(model, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    argv = ["--model_name_or_path", model, "--task", "sudoku", "--num_examples", "2", "--output_dir", str(tmp_path)]
    report.main(report.make_parser().parse_args(argv))
    found = json.loads((tmp_path / "likelihood.json").read_text())["generation"]
    assert (found["max_new_tokens"], found["diffusion_steps"], found["temperature"]) == (6, 4, 1.0)


def test_report_refuses_guidance_that_was_saved_too(model):
    save_decoding({"max_new_tokens": 6, "cfg_scale": 1.5}, model)
    with pytest.raises(ValueError, match=r"cfg_scale=1\.5: the estimators do not follow guidance"):
        report.main(report.make_parser().parse_args(["--model_name_or_path", model, "--task", "sudoku"]))


def test_an_adapter_in_the_original_names_is_on_the_model(tmp_path):
    base = sharp_model("llada", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    create_tiny_model("llada", 16, 1)[1].save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    weights, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    rename = {"model.layers": "model.transformer.blocks", "self_attn.o_proj": "attn_out"}
    state = load_file(weights)
    for native, original in rename.items():
        state = {key.replace(native, original): value for key, value in state.items()}
    save_file(state, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["attn_out"]}))
    argv = ["--model_name_or_path", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--prompt", "1"]
    model, _ = generate.load_model(generate.make_parser().parse_args(argv))
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits.cpu(), adapted(input_ids=IDS).logits)
