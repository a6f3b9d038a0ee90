"""A dry run loads no weights, counts the batch, and knows the published shapes."""

import pytest
from helpers_scripts import GRPO, write_recipe

from trl_dllm import cli
from trl_dllm.scripts import grpo


def test_a_dry_run_loads_no_weights_and_counts_the_batch(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights loaded"))
    config = write_recipe(
        tmp_path, GRPO, model_name_or_path=tiny_checkpoint, output_dir=str(tmp_path), num_iterations=2, beta=0.04
    )
    parsed = grpo.make_parser().parse_args_and_config(["--config", config, "--dry_run", "true"])
    facts = grpo.main(*parsed)
    assert facts["completions a generation batch"] == 4 and facts["prompts a generation batch"] == 1
    assert facts["decoding steps a completion"] == 4 and facts["views a completion"] == 2
    parameters = 5840
    assert facts["FLOPs of sampling a generation batch (d2 App. C.2)"] == 4 * 16 * 4 * 2 * parameters
    assert facts["FLOPs of old and reference log-probs"] == 2 * 4 * 16 * 2 * 2 * parameters
    assert facts["FLOPs of its updates"] == 4 * 16 * 2 * 6 * parameters * 2
    common = ["--model_name_or_path", tiny_checkpoint, "--max_new_tokens", "16", "--diffusion_steps", "4", "--dry_run"]
    cli.main(["eval", *common, "--task", "sudoku", "--num_examples", "64", "--output_dir", str(tmp_path / "e")])
    cli.main(["generate", *common, "--prompt", "1="])
    assert "forwards" in capsys.readouterr().out


def test_a_dry_run_knows_the_published_shapes_without_the_hub(monkeypatch):
    from trl_dllm.reports import dry_run

    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(dry_run.AutoConfig, "from_pretrained", offline)
    assert 7.9e9 < dry_run.count_parameters(dry_run.read_config("GSAI-ML/LLaDA-8B-Instruct")) < 8.1e9
    assert 7.5e9 < dry_run.count_parameters(dry_run.read_config("Dream-org/Dream-v0-Instruct-7B")) < 7.7e9
    with pytest.raises(OSError, match="no network"):
        dry_run.read_config("some/other-model")
