"""What `--dry_run` says of a run: by d2's formula, counted, and in memory.

That the formula's numbers are those of the log is tested on each recipe's tiny twin.
"""

from pathlib import Path

import pytest
import transformers.training_args
from helpers_scripts import GRPO, write_recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_dllm import cli
from trl_dllm.models import TrainingFlops, backbone_parameters, create_tiny_model
from trl_dllm.reports import dry_run
from trl_dllm.scripts import common, grpo, sft


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
    for module in (transformers.training_args, common):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: False)


@pytest.fixture
def no_hub(monkeypatch):
    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(dry_run.AutoConfig, "from_pretrained", offline)


def words(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def facts_of(folder, script=grpo, **settings) -> dict:
    """The dry run of a tiny model under these settings; None takes one away."""
    given = {"model_name_or_path": folder, "output_dir": folder, "dry_run": "true", **TINY, **settings}
    argv = words({key: value for key, value in given.items() if value is not None})
    return script.main(*script.make_parser().parse_args_and_config(argv))


def test_the_published_step_merge_recipe_counts_its_twelve_redraws(no_gpu, no_hub):
    """Old and reference log-probs: 12 draws of 8 views of 12 canvases of 256 tokens, twice 2P operations each."""
    path = str(RECIPES / "grpo" / "config_gsm8k_step_merge.yaml")
    facts = grpo.main(*grpo.make_parser().parse_args_and_config(["--config", path, "--dry_run", "true"]))
    parameters = 8_015_581_184
    assert facts["FLOPs of old and reference log-probs"] == 2 * 12 * 8 * (12 * 256) * 2 * parameters
    assert facts["FLOPs of old and reference log-probs"] == pytest.approx(9.46e15, rel=1e-3)
    assert facts["flops_paper of a generation batch"] == 12 * 256 * parameters * (2 * 128 + 12 * 8 * (2 + 2 + 4))
    assert facts["FLOPs of a decoding step of 6 rows, counted"] == pytest.approx(4.088e13, rel=1e-3)


@pytest.mark.parametrize(
    "script, recipe", [(grpo, "grpo/config_gsm8k_pkl.yaml"), (sft, "sft/config_any_order_stage1.yaml")]
)
def test_a_bf16_recipe_needs_no_gpu_for_a_dry_run(no_gpu, no_hub, script, recipe):
    argv = ["--config", str(RECIPES / recipe)]
    assert script.main(*script.make_parser().parse_args_and_config([*argv, "--dry_run", "true"]))
    with pytest.raises(ValueError, match=r"bf16=True .* needs a GPU .* Set use_cpu: true"):
        script.make_parser().parse_args_and_config(argv)


def test_the_run_is_as_many_generation_batches_as_its_steps_need(tiny):
    """Five optimizer steps at two a generation batch begin a third one, whose updates are counted when it is drawn."""
    facts = facts_of(tiny, num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=2)
    assert facts["optimizer steps a generation batch"] == 2
    assert facts["flops_paper of the run"] == 3 * facts["flops_paper of a generation batch"]
    assert "flops_paper of the run" not in facts_of(tiny, max_steps=None)


def test_a_threshold_or_an_early_stop_takes_the_schedules_steps(tiny):
    name = "flops_paper of a generation batch"
    settings = {"estimator": "exact_trajectory", "num_segments": None}
    fixed = facts_of(tiny, stop_at_eos="false", **settings)
    assert fixed["decoding steps a completion"] == fixed["views a completion"] == 8
    for other in ({"stop_at_eos": "true"}, {"confidence_threshold": 0.9}):
        assert facts_of(tiny, **other, **settings)[name] == fixed[name]


@pytest.mark.parametrize("peft", [{}, LORA], ids=["full", "lora"])
def test_counted_figures_are_those_of_the_model_that_is_trained(tiny, peft):
    """Prompts of 200 tokens; any-order views have two streams of 16, and score all of them at once."""
    model = create_tiny_model("llada", hidden_size=16, num_layers=1)[0]
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model.gradient_checkpointing_enable()
    count = TrainingFlops(model.train())
    facts = facts_of(tiny, estimator="any_order", num_segments=None, **peft)
    assert facts["FLOPs of a decoding step of 4 rows, counted"] == count(4, 216, 216, 4 * 8)
    assert facts["FLOPs of an update on a view of 4 rows, counted"] == count.view(4, 232, 4 * 16, training=True)
    facts = facts_of(tiny, estimator="pkl_u", estimator_kwargs='{"block_size": 3}', num_segments=None, **peft)
    assert facts["FLOPs of an update on a view of 4 rows, counted"] == count.view(4, 216, 4 * 3, training=True)
    with_reference = facts_of(tiny, kl_estimator="full", **peft)["FLOPs of an update on a view of 4 rows, counted"]
    assert with_reference == count.view(4, 216, 4 * 8, training=True, reference=True)


@pytest.mark.parametrize(
    "settings, size",
    [
        ({"dtype": "float32"}, 4),
        ({"dtype": "bfloat16"}, 2),
        ({"dtype": "bfloat16", **LORA}, 4),
        ({"dtype": "bfloat16", **LORA, "load_in_4bit": "true"}, 2),
    ],
    ids=["float32", "bfloat16", "lora", "qlora"],
)
def test_gradients_have_the_type_of_what_is_trained(tiny, settings, size):
    """PEFT's adapters are float32 on a bfloat16 model; TRL casts those on quantised weights to bfloat16."""
    model = create_tiny_model("llada", hidden_size=16, num_layers=1)[0]
    trained = backbone_parameters(model)
    if "use_peft" in settings:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = facts_of(tiny, **settings)
    assert facts["GiB a GPU: gradients"] * 2**30 == trained * size
    assert facts["GiB a GPU: optimizer"] * 2**30 == trained * 8
    assert ("GiB a GPU: reference" in facts) == ("use_peft" not in settings)


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


def test_a_dry_run_knows_the_published_shapes_without_the_hub(no_hub):
    assert 7.9e9 < dry_run.count_parameters(dry_run.read_config("GSAI-ML/LLaDA-8B-Instruct")) < 8.1e9
    for name in ("Dream-org/Dream-v0-Instruct-7B", "apple/DiffuCoder-7B-Instruct"):
        assert 7.5e9 < dry_run.count_parameters(dry_run.read_config(name)) < 7.7e9
    assert 7.3e9 < dry_run.count_parameters(dry_run.read_config("inclusionAI/LLaDA-MoE-7B-A1B-Instruct")) < 7.4e9
    assert dry_run.read_config("GSAI-ML/iLLaDA-8B-Instruct").model_type == "illada"
    with pytest.raises(OSError, match="no network"):
        dry_run.read_config("some/other-model")
