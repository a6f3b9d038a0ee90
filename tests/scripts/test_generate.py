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

from trl_dllm import cli
from trl_dllm.generation import DiffusionGenerationConfig, decoding_of, save_decoding
from trl_dllm.models import create_tiny_model
from trl_dllm.scripts import generate, report, trajectories
from trl_dllm.step_maps import read_rollout


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


def test_trajectories_are_written_and_scored_by_the_report(model, tmp_path, capsys):
    """The model that drew them has their log-probs; another one has not; and the report is the drawing one's own."""
    path = tmp_path / "drawn.jsonl"
    words = ["generate", "--model_name_or_path", model, "--prompt", "12=", "--prompt", "3+4=", "--temperature", "0.8"]
    cli.main([*words, "--no_stop_at_eos", "--save_rollouts", str(path)])
    rollout = read_rollout(path)
    assert rollout.completion_ids.shape == (2, 6) and rollout.temperature == 0.8 and rollout.steps == 4
    capsys.readouterr()
    scored = ["report", "--model_name_or_path", model, "--rollouts", str(path)]
    cli.main([*scored, "--output_dir", str(tmp_path / "report")])
    printed = " ".join(capsys.readouterr().out.split())  # rich breaks lines where they are long
    assert "2 completions" in printed and float(printed.split("largest difference is ")[1].split()[0]) < 1e-5
    found = json.loads((tmp_path / "report" / "likelihood.json").read_text())
    assert found["rollouts"] == str(path) and found["generation"] == {"decoding": "denoising"} and found["n"] == 2
    (exact,) = [line for line in found["estimators"] if line["name"] == "exact trajectory"]
    assert exact["kl"] < 1e-6 and exact["logp"] == pytest.approx(
        rollout.logps[rollout.counted].mean().item(), abs=1e-5
    )
    other = create_tiny_model(hidden_size=16, num_layers=1, seed=5)[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(9)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(Path(model) / "tokenizer.json", tmp_path / "other")
    shutil.copy(Path(model) / "tokenizer_config.json", tmp_path / "other")
    cli.main(["report", "--model_name_or_path", str(tmp_path / "other"), "--rollouts", str(path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert float(printed.split("largest difference is ")[1].split()[0]) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canvas_ids": [5, 6, 7, 999, 3, 3]}, r"canvas_ids[3]=999 must be a whole number from 0 to 100"),
        ({"decoding": "backwards"}, "line 1: decoding='backwards' is unknown; choose"),
        ([{}, {"decoding": "any_order"}], "line 2: decoding='any_order' differs from the first line's, 'denoising'."),
        ({"cfg_scale": 1.5}, "line 1: cfg_scale=1.5: the estimators do not follow guidance"),
        ({"logprobs": None}, None),
    ],
)
def test_a_file_is_read_before_the_model(model, tmp_path, capsys, monkeypatch, change, message):
    line = {"prompt_ids": [5], "canvas_ids": [5, 6, 7, 8, 3, 3], "step_maps": [1, 1, 2, 3, 0, 0], "mask_token_id": 3}
    path = tmp_path / "theirs.jsonl"
    changes = change if isinstance(change, list) else [change]
    path.write_text("".join(json.dumps({**line, **each}) + "\n" for each in changes))
    argv = ["report", "--model_name_or_path", model, "--rollouts", str(path)]
    if message is None:
        cli.main(argv)
        assert "The file has no log-probs to compare" in capsys.readouterr().out
        return
    monkeypatch.setattr(trajectories, "load_model", lambda args: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2 and message in str(ended.value)


def test_what_was_drawn_with_guidance_says_so_and_is_not_scored(model, tmp_path):
    path = str(tmp_path / "guided.jsonl")
    words = ["generate", "--model_name_or_path", model, "--prompt", "12=", "--save_rollouts", path]
    cli.main([*words, "--cfg_scale", "1.5"])
    with pytest.raises(SystemExit, match=r"line 1: cfg_scale=1\.5: the estimators do not follow guidance"):
        cli.main(["report", "--model_name_or_path", model, "--rollouts", path])


def test_a_dry_run_of_the_report_loads_nothing(model, monkeypatch, capsys):
    monkeypatch.setattr(trajectories, "load_model", lambda args: pytest.fail("the model was loaded"))
    cli.main(["report", "--model_name_or_path", model, "--task", "sudoku", "--num_examples", "2", "--dry_run"])
    assert "forwards" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--task", "sudoku", "--rollouts", "a.jsonl"]])
def test_a_report_is_of_a_task_or_of_a_file(model, flags):
    with pytest.raises(SystemExit, match=r"Name a task .--task. .* or a file .--rollouts."):
        cli.main(["report", "--model_name_or_path", model, *flags])
