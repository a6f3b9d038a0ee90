"""docs/scaling.md: its memory is the dry run's, and each of its commands is one that a cluster could run."""

import re
from pathlib import Path

import pytest
import transformers
import yaml
from test_code_blocks import blocks, commands

from trl_dllm import cli
from trl_dllm.reports import dry_run
from trl_dllm.reports.memory import Sharding
from trl_dllm.scripts import grpo, sft


PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
PARTS = ["weights", "gathered weights", "gradients", "optimizer", "activations", "reference", "total"]
QUANTISATION = {"4-bit": [], "bfloat16": ["--load_in_4bit", "false", "--use_bnb_nested_quant", "false"], "": []}


def rows() -> list[list[str]]:
    lines = re.findall(r"^\| (gsm8k\w+.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def launches() -> list[list[str]]:
    shell = [content for language, content, _ in blocks(PAGE.read_text()) if language == "bash"]
    return [words for content in shell for words in commands(content) if "--dry_run" not in words]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def from_pretrained(name):
        raise OSError("no network")

    monkeypatch.setattr(dry_run.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: " ".join(row[:3]))
def test_the_memory_is_what_the_dry_run_measures(row, measured, monkeypatch):
    recipe, _, precision = row[0].partition(", ")
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", int(row[2]))
    args, model_args, found = measured(f"llada_8b/grpo/{recipe}", *QUANTISATION[precision])
    facts = dry_run.describe("grpo", args, model_args, Sharding(row[1], int(row[2])), found)
    assert row[3:] == [f"{facts.get(f'GiB a GPU: {part}', 0.0):.1f}" for part in PARTS]


@pytest.mark.parametrize("words", launches(), ids=" ".join)
def test_each_command_launches_a_recipe(words, monkeypatch, tmp_path):
    """From a folder with nothing in it, up to the processes: launcher and script take every argument."""
    monkeypatch.chdir(tmp_path)
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    cli.run(words[1], words[2:])
    (args,) = launched
    if args.config_file is not None:
        assert "distributed_type" in yaml.safe_load(Path(args.config_file).read_text())
    assert args.num_machines in (None, 2) and (args.machine_rank is None) == (args.num_machines is None)
    script = {"grpo": grpo, "sft": sft}[words[1]]
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", args.num_processes or 8)
    assert Path(args.training_script) == Path(script.__file__)
    _, training_args, _ = script.make_parser().parse_args_and_config(args.training_script_args)
    assert words[0] == "trl-dllm" and training_args.resume_from_checkpoint


def test_nodes_and_gpus_keep_the_batch_of_the_recipe():
    """Eight GPUs and the recipe's accumulation, or what a command says instead: the same rows an optimizer step."""
    found = {}
    for words in launches():
        if words[1] == "sft":
            continue
        _, args, _ = grpo.make_parser().parse_args_and_config(["--config", words[words.index("--config") + 1]])
        given = dict(zip(words[2::2], words[3::2], strict=True))
        steps = int(given.get("--gradient_accumulation_steps", args.gradient_accumulation_steps))
        gpus = int(given.get("--num_processes", 8))
        found.setdefault(given["--config"], []).append(gpus * steps * args.per_device_train_batch_size)
    assert set(found["llada_8b/grpo/gsm8k_justgrpo"]) == {128}
    assert found["llada_8b/grpo/gsm8k_step_merge"] == [12, 96, 96, 96, 96], "the first is the recipe as it is"
