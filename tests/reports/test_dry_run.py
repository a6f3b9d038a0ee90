"""What `--dry_run` says of a run: by d2's formula, counted, and in memory.

That the formula's numbers are those of the log is tested on each recipe's tiny twin, and that memory and counted
operations are those of real runs in `test_fake.py`.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers.training_args
from helpers_scripts import GRPO, write_recipe
from transformers import AutoModelForCausalLM

from trl_dllm import cli
from trl_dllm.models import create_tiny_model
from trl_dllm.recipe import find_accelerate_config, recipe_paths
from trl_dllm.reports import dry_run
from trl_dllm.reports.memory import Sharding
from trl_dllm.scripts import grpo, sft
from trl_dllm.scripts.dry import is_dry, sharding_of, sharding_of_launch


RECIPES = Path(__file__).parents[2] / "recipes" / "llada_8b"
TINY = {
    "task": "sudoku",
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "max_completion_length": 16,
    "block_length": 8,
    "diffusion_steps": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "beta": 0.04,
    "num_segments": 2,
}
LORA = {"use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    create_tiny_model("llada", hidden_size=16, num_layers=1)[0].config.save_pretrained(folder)
    return folder


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: False)


@pytest.fixture
def no_hub(monkeypatch):
    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(dry_run.AutoConfig, "from_pretrained", offline)


def words(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def parse(folder, script=grpo, **settings):
    """The arguments of a dry run of a tiny model under these settings; None takes one away."""
    given = {"model_name_or_path": folder, "output_dir": folder, "dry_run": "true", **TINY, **settings}
    argv = words({key: value for key, value in given.items() if value is not None})
    return script.make_parser().parse_args_and_config(argv)


def batch_of(folder, **settings) -> dict:
    """What it says of a generation batch."""
    return dry_run.generation_batch(parse(folder, **settings)[1], parameters=1000, frozen_backbone=False)


def test_the_published_step_merge_recipe_counts_its_twelve_redraws():
    """Old and reference log-probs: 12 draws of 8 views of 12 canvases of 256 tokens, twice 2P operations each."""
    path = str(RECIPES / "grpo" / "config_gsm8k_step_merge.yaml")
    _, args, _ = grpo.make_parser().parse_args_and_config(["--config", path, "--dry_run", "true"])
    parameters = 8_015_581_184
    assert parameters == dry_run.count_parameters(dry_run.LLaDAConfig())
    facts = dry_run.generation_batch(args, parameters, frozen_backbone=True)
    assert facts["FLOPs of old and reference log-probs"] == 2 * 12 * 8 * (12 * 256) * 2 * parameters
    assert facts["FLOPs of old and reference log-probs"] == pytest.approx(9.46e15, rel=1e-3)
    assert facts["flops_paper of a generation batch"] == 12 * 256 * parameters * (2 * 128 + 12 * 8 * (2 + 2 + 4))


@pytest.mark.parametrize(
    "script, recipe", [(grpo, "grpo/config_gsm8k_pkl.yaml"), (sft, "sft/config_any_order_stage1.yaml")]
)
def test_a_bf16_recipe_needs_no_gpu_for_a_dry_run(no_gpu, script, recipe):
    argv = ["--config", str(RECIPES / recipe)]
    assert script.make_parser().parse_args_and_config([*argv, "--dry_run", "true"])[1].bf16
    with pytest.raises(ValueError, match=r"bf16=True .* needs a GPU .* Set use_cpu: true"):
        script.make_parser().parse_args_and_config(argv)


def test_the_run_is_as_many_generation_batches_as_its_steps_need(tiny):
    """Five optimizer steps at two a generation batch begin a third one, whose updates are counted when it is drawn."""
    facts = batch_of(tiny, num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=2)
    assert facts["optimizer steps a generation batch"] == 2
    assert facts["flops_paper of the run"] == 3 * facts["flops_paper of a generation batch"]
    assert "flops_paper of the run" not in batch_of(tiny, max_steps=None)


def test_a_threshold_or_an_early_stop_takes_the_schedules_steps(tiny):
    name = "flops_paper of a generation batch"
    settings = {"estimator": "exact_trajectory", "num_segments": None}
    fixed = batch_of(tiny, stop_at_eos="false", **settings)
    assert fixed["decoding steps a completion"] == fixed["views a completion"] == 8
    for other in ({"stop_at_eos": "true"}, {"confidence_threshold": 0.9}):
        assert batch_of(tiny, **other, **settings)[name] == fixed[name]


def test_flops_are_of_all_processes_and_memory_is_of_one(tiny, monkeypatch):
    alone = dry_run.describe("grpo", *parse(tiny)[1:])
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 8)
    eight = dry_run.describe("grpo", *parse(tiny)[1:], Sharding("zero2", 8))
    for name in ("flops of a generation batch", "flops_paper of a generation batch"):
        assert eight[name] == 8 * alone[name]
    assert eight["GiB a GPU: optimizer"] == pytest.approx(alone["GiB a GPU: optimizer"] / 8, rel=1e-3)
    assert eight["GiB a GPU: weights"] == alone["GiB a GPU: weights"]
    assert (eight["processes"], alone["processes"]) == ("8, zero2", 1)


@pytest.mark.parametrize("rows, generations", [(2, 16), (6, 4), (1, 8)], ids=["part", "one and a half", "one row"])
def test_a_process_may_have_less_than_a_group(tiny, monkeypatch, rows, generations):
    """Eight processes share the groups of a generation batch, and one of them is measured."""
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 8)
    _, *args = parse(tiny, per_device_train_batch_size=rows, num_generations=generations)
    facts = dry_run.describe("grpo", *args, Sharding("ddp", 8))
    assert facts["completions a generation batch"] == 8 * rows and facts["GiB a GPU: total"] > 0


def test_a_dry_run_loads_no_weights_and_counts_the_batch(tmp_path, tiny_checkpoint, monkeypatch, capsys):
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


def test_an_earlier_stage_need_not_have_run(tmp_path, monkeypatch):
    """Its output folder is not there: the shapes are those of the model that its own recipe starts from."""
    monkeypatch.chdir(tmp_path)
    assert dry_run.first_stage("runs/llada_8b/any_order_stage2") == "GSAI-ML/LLaDA-8B-Instruct"
    assert dry_run.first_stage("runs/tiny_llada/sft") == "runs/tiny_llada/init"
    assert dry_run.read_config("runs/tiny_llada/sft").hidden_size == 64
    (tmp_path / "runs" / "tiny_llada" / "sft").mkdir(parents=True)
    assert dry_run.first_stage("runs/tiny_llada/sft") == "runs/tiny_llada/sft"
    assert dry_run.first_stage("a/model") == "a/model"


def test_a_dry_run_knows_the_published_shapes_without_the_hub(no_hub):
    assert 7.9e9 < dry_run.count_parameters(dry_run.read_config("GSAI-ML/LLaDA-8B-Instruct")) < 8.1e9
    for name in ("Dream-org/Dream-v0-Instruct-7B", "apple/DiffuCoder-7B-Instruct"):
        assert 7.5e9 < dry_run.count_parameters(dry_run.read_config(name)) < 7.7e9
    assert 7.3e9 < dry_run.count_parameters(dry_run.read_config("inclusionAI/LLaDA-MoE-7B-A1B-Instruct")) < 7.4e9
    assert dry_run.read_config("GSAI-ML/iLLaDA-8B-Instruct").model_type == "illada"
    with pytest.raises(OSError, match="no network"):
        dry_run.read_config("some/other-model")


CONFIGS = ("ddp", "zero2", "zero3", "fsdp")


@pytest.mark.parametrize("config, kind", zip(CONFIGS, ("ddp", "zero2", "zero3", "fsdp2"), strict=True))
def test_the_command_line_says_how_the_step_is_spread(config, kind, tmp_path):
    launch = cli.resolve_accelerate_config(["--accelerate_config", config, "--num_processes", "4"])
    assert sharding_of(launch) == Sharding(kind, 4)
    assert sharding_of(["--config_file", str(find_accelerate_config(config))]) == Sharding(kind, 8)
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    flags = ["--use_deepspeed", "--deepspeed_config_file", str(settings), "--num_processes", "2"]
    assert sharding_of(flags) == Sharding("zero1", 2)
    assert sharding_of([]) == Sharding("none", 1)


def test_a_launched_process_knows_how_the_step_is_spread():
    """By the variables that `accelerate launch` sets."""
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "WORLD_SIZE": "8"}
    assert sharding_of_launch(deepspeed) == Sharding("zero3", 8)
    assert sharding_of_launch({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "4"}) == Sharding("fsdp2", 4)
    assert sharding_of_launch({"WORLD_SIZE": "2"}) == Sharding("ddp", 2)
    assert sharding_of_launch({}) == Sharding("none", 1)


def test_the_flag_is_read_as_the_parser_reads_it():
    for argv in ("--dry_run", "--dry_run=true", "--dry_run --beta 0", "--dry_run false --dry_run true"):
        assert is_dry(argv.split())
    for other in ("", "--dry_run false", "--dry_run=false", "--dry_run true --dry_run false"):
        assert not is_dry(other.split())


@pytest.mark.slow
def test_accelerate_launch_itself_makes_one_dry_run(tiny):
    """Two processes under ZeRO-3, of which the second has nothing to do."""
    config, script = str(find_accelerate_config("zero3")), grpo.__file__
    flags = words({"model_name_or_path": tiny, "output_dir": tiny, **TINY, "dry_run": "true"})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    done = subprocess.run([*command, script, *flags], capture_output=True, text=True, timeout=300)
    out = " ".join(done.stdout.split())
    assert done.returncode == 0 and "completions a generation batch │ 8" in out, done.stdout + done.stderr
    assert out.count("dry run, no weights loaded") == 1 and "2, zero3" in out


@pytest.mark.parametrize("config", CONFIGS)
def test_a_dry_run_for_eight_processes_takes_this_one(tiny, config, capsys, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("launched"))
    flags = words({"model_name_or_path": tiny, "output_dir": tiny, **TINY})
    cli.run("grpo", [*flags, "--dry_run", "true", "--accelerate_config", config, "--num_processes", "8"])
    out = capsys.readouterr().out
    assert "completions a generation batch │ 32" in " ".join(out.split()) and "GiB a GPU: total" in out


def _recipes() -> list:
    quick = ("tiny_llada/grpo/sudoku_gdpo", "tiny_llada/sft/sudoku")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in recipe_paths()]


@pytest.mark.parametrize("name", _recipes())
def test_every_recipe_is_measured_within_a_minute(name, measured, no_gpu, no_hub, tmp_path, monkeypatch, capsys):
    """Of eight processes, however they share; without a GPU, a Hub, data or earlier stages. In seconds of a core."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 8)
    command, start = name.split("/")[1], time.process_time()
    args, model_args, found = measured(name)
    totals = {}
    for kind in ("ddp", "zero2", "zero3", "fsdp2"):
        facts = dry_run.dry_run(command, args, model_args, Sharding(kind, 8), found)
        totals[kind] = facts["GiB a GPU: total"]
        assert "GiB a GPU: total" in capsys.readouterr().out and math.isfinite(totals[kind])
    assert time.process_time() - start < 60
    assert 0 < totals["zero2"] <= totals["ddp"]
    if name.startswith("llada_8b"):
        assert 3 < totals["fsdp2"] < totals["ddp"] < 110


def test_what_the_recipe_says_of_the_model_is_measured(tmp_path):
    """A block-causal model is decoded in its own blocks: 8 are refused for blocks of 4, and taken once it has them."""
    create_tiny_model("sdar", hidden_size=16, num_layers=1, block_size=4)[0].config.save_pretrained(tmp_path)
    settings = {"estimator": "step_merge", "stop_at_eos": "false"}
    with pytest.raises(ValueError, match="block_length=8"):
        dry_run.measure("grpo", *parse(str(tmp_path), **settings)[1:])
    given = {**settings, "model_init_kwargs": json.dumps({"block_size": 8})}
    assert dry_run.measure("grpo", *parse(str(tmp_path), **given)[1:]).flops
