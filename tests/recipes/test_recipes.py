"""Every recipe parses with the script that it is for, and the published settings are the papers'."""

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trl import get_peft_config
from trl.trainer.utils import disable_dropout_in_model

from trl_dllm.models import LLaDAConfig, LLaDAModelLM
from trl_dllm.recipe import base_of, find_accelerate_config, load_recipe, recipe_paths, render_recipe
from trl_dllm.rollout import Rollout
from trl_dllm.scripts import dpo, grpo, sft
from trl_dllm.scripts.rewards import resolve_rewards


SCRIPTS = {"sft": sft, "grpo": grpo, "dpo": dpo}
NAMES = recipe_paths()


def parse(name: str, *overrides: str):
    """`(script_args, training_args, model_args)`; bfloat16 training is refused by transformers on a CPU."""
    script = SCRIPTS[name.split("/")[1]]
    return script.make_parser().parse_args_and_config(
        ["--config", name, "--use_cpu", "true", "--bf16", "false", *overrides]
    )


@pytest.mark.parametrize("name", NAMES)
def test_recipe_parses(name):
    script_args, training_args, model_args = parse(name)
    sources = (script_args.task, script_args.dataset_name, getattr(script_args, "prompt", None))
    assert sum(source is not None for source in sources) == 1, "a recipe names a task, a dataset or a prompt"
    assert model_args.model_name_or_path and training_args.output_dir.startswith("runs/")
    if "/grpo/" in name:
        model, label = script_args.reward_model_name_or_path, script_args.reward_model_label
        rewards = resolve_rewards(script_args.task, script_args.reward_funcs, model, label)
        assert rewards
        training_args.build_estimator()


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_a_recipes_head_names_the_recipe(name):
    head = [line for line in NAMES[name].read_text().splitlines() if line.startswith("#")]
    command = f"trl-dllm {name.split('/')[1]} --config {name}"
    assert any(f"{line} ".partition(command)[2].startswith(" ") for line in head), "to be copied from there"


@pytest.mark.parametrize("name", [name for name, path in NAMES.items() if base_of(path)])
def test_a_recipe_with_a_base_holds_what_differs(name):
    path = NAMES[name]
    own, base = yaml.safe_load(path.read_text()), load_recipe(base_of(path))
    assert {key: value for key, value in own.items() if key in base and base[key] == value} == {}
    assert own["output_dir"] != base.get("output_dir")


def test_no_two_recipes_write_to_one_folder():
    folders = [load_recipe(path)["output_dir"] for path in NAMES.values()]
    assert len(folders) == len(set(folders)) == len(NAMES)


def test_no_recipe_names_a_local_path_or_reports_to_a_service():
    for path in NAMES.values():
        text = render_recipe(path)
        assert "report_to: none\n" in text and "/home" not in text and ": /" not in text, path


# ------------------------------------------------------------------------------------------- published settings


@pytest.mark.parametrize("stage", [1, 2])
def test_any_order_sft_of_llada_8b_is_d2s(stage):
    """d2 App. C.1.2: q, k and v, learning rate 1e-5, blocks of 32, batch 8, lowest validation loss; 2 after 1."""
    script_args, args, model_args = parse(f"llada_8b/sft/any_order_stage{stage}")
    assert args.objective == "any_order" and args.block_length == 32 and args.learning_rate == 1e-5
    assert args.trainable_modules == ["q_proj", "k_proj", "v_proj"]
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert args.load_best_model_at_end and args.metric_for_best_model == "eval_loss" and not args.greater_is_better
    assert args.save_steps % args.eval_steps == 0
    assert model_args.dtype == "bfloat16" and not model_args.use_peft and not model_args.load_in_4bit
    assert (args.weight_decay, args.lr_scheduler_type, args.warmup_steps) == (0.1, "linear", 0)
    assert script_args.dataset_name.startswith("your-name/"), "a placeholder"
    before = "GSAI-ML/LLaDA-8B-Instruct" if stage == 1 else "runs/llada_8b/any_order_stage1"
    assert model_args.model_name_or_path == before


def test_masked_sft_on_s1k_is_d1s():
    """d1's released code, and its tiny twin's loss."""
    script_args, args, model_args = parse("llada_8b/sft/s1k_d1")
    assert (args.objective, args.loss_weight, args.learning_rate) == ("masked_diffusion", "1/t", 1e-5)
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (128, 256, 0.05)
    assert model_args.use_peft and model_args.lora_target_modules == ["q_proj", "k_proj", "v_proj"]
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert (args.num_train_epochs, args.max_length, args.weight_decay, args.max_grad_norm) == (20, 4096, 0.1, 1.0)
    assert args.load_best_model_at_end and args.metric_for_best_model == "eval_loss"
    assert script_args.dataset_name.startswith("your-name/"), "a placeholder"
    _, tiny, _ = parse("tiny_llada/sft/sudoku_d1")
    assert (tiny.objective, tiny.loss_weight) == (args.objective, args.loss_weight)


def test_vrpo_of_llada_8b_is_the_papers():
    """LLaDA 1.5: 8 draws, beta 0.2, an SFT loss of 0.05, batches of 64 pairs; the tiny twin has its likelihood."""
    script_args, args, model_args = parse("llada_8b/dpo/vrpo")
    assert (args.estimator, args.num_samples, args.beta) == ("elbo", 8, 0.2)
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.05])
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (5e-7, "cosine", 15)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.num_train_epochs) == (0.9, 0.95, 0.01, 1)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert model_args.model_name_or_path == "GSAI-ML/LLaDA-8B-Instruct" and not model_args.use_peft
    assert script_args.dataset_name.startswith("your-name/"), "a placeholder"
    _, twin, _ = parse("tiny_llada/dpo/sudoku_vrpo")
    for name in ("estimator", "num_samples", "beta", "loss_type", "lr_scheduler_type", "adam_beta2", "weight_decay"):
        assert getattr(twin, name) == getattr(args, name), name


def test_any_order_grpo_of_llada_8b_is_d2s():
    """d2 App. C.1.3."""
    script_args, args, model_args = parse("llada_8b/grpo/gsm8k_any_order")
    assert (args.estimator, args.decoding, args.cache) == ("any_order", "any_order", "exact")
    assert (args.learning_rate, args.beta, args.epsilon) == (1e-6, 0.04, 0.5)
    assert (args.num_generations, args.num_iterations, args.temperature) == (8, 2, 0.9)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 16 * args.num_generations
    assert (args.max_completion_length, args.block_length, args.diffusion_steps) == (256, 32, 128)
    assert args.generation_config().schedule == [2] * 16 and args.remasking == "low_confidence"
    assert (args.loss_type, args.scale_rewards, args.p_mask_prompt) == ("grpo", "group", 0)
    assert not args.stop_at_eos and not args.use_bias_correction_kl and args.disable_dropout
    assert args.score_temperature == 1.0 and args.old_logps == "recompute"
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (128, 64, 0.05)
    assert len(model_args.lora_target_modules) == 7 and model_args.use_peft and not model_args.load_in_4bit
    assert model_args.model_name_or_path == "runs/llada_8b/any_order_stage2"
    assert [name.split("_")[0] for name in script_args.reward_funcs] == ["d1"] * 5


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_is_a_number_of_steps(name):
    """A fraction would be of whatever `max_steps` is set to."""
    assert isinstance(load_recipe(NAMES[name]).get("warmup_steps", 0), int)


# ----------------------------------------------------------------------------------------- adapters, memory, commands

LLADA_8B = {name: load_recipe(path) for name, path in NAMES.items() if name.startswith("llada_8b/")}
LORA_BASE = base_of(NAMES["llada_8b/grpo/gsm8k_step_merge"])
RELEASED = "--lora_target_modules q_proj k_proj v_proj up_proj"


class OriginalLayer(nn.Module):
    """The linear layers of a block of LLaDA's own code, by its names, at 8B."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(4096, 4096, bias=False))
        self.ff_proj, self.up_proj = (nn.Linear(4096, 12288, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(12288, 4096, bias=False)


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name", [name for name, recipe in LLADA_8B.items() if "/grpo/" in name and recipe.get("lora_r") == 128]
)
def test_lora_adapts_what_the_papers_say_and_the_head_has_what_their_code_did(name):
    """335.5M parameters; under the original names PEFT finds four of the seven modules in silence: 167.8M."""
    with torch.device("meta"):
        _, _, ours = parse(name)
        assert trained(get_peft_model(LLaDAModelLM(LLaDAConfig()), get_peft_config(ours))) == 335_544_320
        _, _, released = parse(name, *RELEASED.split())
        assert trained(get_peft_model(LLaDAModelLM(LLaDAConfig()), get_peft_config(released))) == 167_772_160
        original = LoraConfig(r=ours.lora_r, target_modules=ours.lora_target_modules)
        assert 32 * trained(get_peft_model(OriginalLayer(), original)) == 167_772_160
    heads = [path.read_text().partition("\nbase:")[0] for path in (NAMES[name], base_of(NAMES[name]))]
    assert RELEASED in heads[1] and "335.5M" in heads[1] and "167.8M" in heads[1]
    if "step_merge" in name or "any_order" in name:
        assert RELEASED in heads[0], "d2's"


def kept(layers: int, width: int) -> int:
    """Bytes that a forward of one row keeps for its backward at LLaDA-8B's shapes, by running it on fake tensors."""
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(num_hidden_layers=layers)).to(torch.bfloat16)
        model = get_peft_model(model, get_peft_config(parse("llada_8b/grpo/gsm8k_any_order")[2]))
    disable_dropout_in_model(model)  # `disable_dropout: true`, in every recipe
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            for name, weight in module._parameters.items():
                empty = weight if weight is None else torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = empty if empty is None else nn.Parameter(empty, weight.requires_grad)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.get_base_model().model(torch.full((1, width), 5), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


def test_what_keeps_its_activations_fits_80_gb():
    """The head of _base.yaml and of gsm8k_any_order say how much; 4-bit weights take 5 GiB, bfloat16 ones 16."""
    sizes = {(layers, width): kept(layers, width) for layers in (1, 2) for width in (64, 128)}
    token = 32 * (sizes[2, 128] - sizes[1, 128] - sizes[2, 64] + sizes[1, 64]) / 64
    assert f"{token / 1e6:.1f} MB" == "6.9 MB" and "6.9 MB of activations a token" in LORA_BASE.read_text()
    gib = {name: token * tokens / 2**30 for name, tokens in (("456", 6 * 456), ("712", 8 * 712))}
    assert f"{gib['456']:.0f} GiB" == "18 GiB" and "18 GiB" in LORA_BASE.read_text()
    assert abs(gib["712"] - 37) < 1 and "37 GiB" in NAMES["llada_8b/grpo/gsm8k_any_order"].read_text()
    largest = 0.0
    for name in (name for name, recipe in LLADA_8B.items() if not recipe["gradient_checkpointing"]):
        _, args, model_args = parse(name)
        columns = getattr(args, "max_length", 0)
        if "/grpo/" in name:
            rollout = Rollout.scheduled(args.max_completion_length, args.generation_config().diffusion_steps)
            columns = 512 + args.build_estimator().view(rollout, 0, rollout.view_seed, 0).input_ids.shape[1]
        weights = (5 if model_args.load_in_4bit else 16.2) + 5  # adapters, their gradients, the optimizer
        largest = max(largest, weights + token * args.per_device_train_batch_size * columns / 2**30)
    assert 50 < largest < 80e9 / 2**30, "with prompts of 512 tokens"


@pytest.mark.parametrize("name", LLADA_8B)
def test_checkpointing_and_sharding_are_what_memory_asks_for(name):
    """LoRA runs keep their activations, as in the released code; where what is trained is bfloat16 (also an adapter on
    4-bit weights, by TRL), the command names a ZeRO, which steps on float32 copies."""
    recipe, head = LLADA_8B[name], NAMES[name].read_text().partition("\n#\n")[0]
    coarse = not recipe.get("use_peft") or bool(recipe.get("load_in_4bit"))
    assert recipe["gradient_checkpointing"] == (not recipe.get("use_peft"))
    _, _, sharding = head.partition("--accelerate_config ")
    assert bool(sharding) == coarse
    if coarse:
        settings = yaml.safe_load(find_accelerate_config(sharding.split()[0]).read_text())
        assert settings["deepspeed_config"]["zero_stage"] >= 2


def test_grpo_of_the_published_any_order_llada_differs_in_the_checkpoint_alone():
    ours, published = (load_recipe(NAMES[f"llada_8b/grpo/gsm8k_{name}"]) for name in ("any_order", "ao_llada"))
    assert published["model_name_or_path"] == "GuanghanWang/d2_anyorder_causal_llada_intellectsft_gsm8k"
    assert {key for key in ours | published if ours.get(key) != published.get(key)} == {
        "model_name_or_path",
        "output_dir",
    }


def test_tiny_any_order_recipes_differ_from_their_baselines_in_the_likelihood_alone():
    """DDPO: exact, unclipped, no KL, group advantages; diffu-GRPO: the mean field of the tokens; StepMerge."""
    _, ours, model = parse("tiny_llada/grpo/sudoku_any_order")
    assert (ours.estimator, ours.decoding, ours.cache) == ("any_order", "any_order", "exact")
    expected = {
        "ddpo": {"epsilon": 1e9, "epsilon_high": 1e9, "scale_rewards": "group"},
        "diffu_grpo": {"estimator": "mean_field"},
        "step_merge": {"estimator": "step_merge", "num_segments": 4},
    }
    for name, changes in expected.items():
        script_args, args, other = parse(f"tiny_llada/grpo/sudoku_any_order_{name}")
        assert other.model_name_or_path == model.model_name_or_path and script_args.task == "sudoku"
        mine, theirs = ours.to_dict(), args.to_dict()
        differing = {key for key in theirs if theirs[key] != mine[key]} - {"output_dir", "logging_dir"}
        assert {key: theirs[key] for key in differing} == {k: v for k, v in changes.items() if k in differing}
        assert set(changes) - {"epsilon_high"} <= differing, name
        assert args.beta == 0


@pytest.mark.parametrize("name", ["toxicity", "toxicity_ddpo"])
def test_toxicity_of_eso_lm_is_d2s(name):
    """d2 §5.1.1, App. C.1.1: no prompt, 512 tokens, groups of 16 in fours, temperature 1, no clipping and no KL."""
    script_args, args, model_args = parse(f"eso_lm/grpo/{name}")
    assert script_args.prompt == "<|endoftext|>" and script_args.task is script_args.dataset_name is None
    assert (script_args.reward_model_label, script_args.reward_funcs) == ("toxic", None)
    assert script_args.reward_model_name_or_path == "s-nlp/roberta_toxicity_classifier"
    assert (args.estimator, args.decoding, args.cache) == ("any_order", "any_order", "exact")
    assert args.generation_config().schedule == [1] * 512 == [1] * args.max_completion_length
    assert (args.temperature, args.score_temperature, args.remasking) == (1.0, None, "random")  # the sampling one
    assert (args.num_generations, args.per_device_train_batch_size, args.generation_batch_size) == (16, 4, 16)
    assert (args.beta, args.epsilon, args.scale_rewards, args.loss_tokens) == (0, 1e9, "group", "canvas")
    assert args.loss_type == {"toxicity": "grpo", "toxicity_ddpo": "dr_grpo"}[name]
    assert script_args.num_eval_examples * args.num_generations == 512
    assert not model_args.use_peft and not args.stop_at_eos
