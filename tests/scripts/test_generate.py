"""`trl-dllm generate` and `report` decode as the model was trained; what is given wins."""

import json
import shutil
from pathlib import Path

import pytest

from trl_dllm.generation import DiffusionGenerationConfig, decoding_of, save_decoding
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
    with pytest.raises(SystemExit, match=r"cfg_scale=1\.5: the estimators do not follow guidance"):
        report.main(report.make_parser().parse_args(["--model_name_or_path", model, "--task", "sudoku"]))
