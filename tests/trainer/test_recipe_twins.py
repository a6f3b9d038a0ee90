"""Each published GRPO recipe trains: its tiny twin takes ten steps with the recipe's own likelihood and loss.

A twin is the recipe with another model, canvas, data and batch; estimator, loss, KL, clipping, inner iterations,
advantages, order and schedule of the optimizer stay what they are.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers_classifier import write_classifier
from helpers_eso_lm import EOS, run, write_original
from helpers_grpo import reward, text_prompts, tiny
from transformers import TrainerCallback
from trl import get_peft_config

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.models import backbone_parameters
from trl_dllm.recipe import load_recipe, recipe_paths
from trl_dllm.reports.dry_run import generation_batch
from trl_dllm.scripts.grpo import main, make_parser


FILES = [path for name, path in recipe_paths().items() if name.startswith("llada_8b/grpo/")]
CANVAS, STEPS = 16, 10

KEPT = (
    "beta",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "kl_estimator",
    "loss_tokens",
    "loss_type",
    "lr_scheduler_type",
    "num_iterations",
    "old_logps",
    "p_mask_prompt",
    "ratio_denominator",
    "redraw_views",
    "remasking",
    "scale_rewards",
    "score_temperature",
    "temperature",
    "use_bias_correction_kl",
)


def twin(path: Path, folder: Path):
    """The recipe's arguments, shrunk on the command line as a user would."""
    recipe = load_recipe(path)
    length = recipe["max_completion_length"]
    block = {1: 1, length: CANVAS}.get(recipe["block_length"], CANVAS // 2)
    blocks = CANVAS // block
    steps = CANVAS * recipe["diffusion_steps"] // length // blocks * blocks
    overrides = {
        "max_completion_length": CANVAS,
        "block_length": block,
        "diffusion_steps": steps,
        "max_steps": STEPS,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "model_name_or_path": folder,
        "output_dir": folder,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
    }
    if "num_segments" in recipe:
        overrides["num_segments"] = max(2, steps * recipe["num_segments"] // recipe["diffusion_steps"])
    sizes = {"num_positions": 3, "block_size": 5, "num_steps": 3}
    if "estimator_kwargs" in recipe:
        kwargs = {key: sizes.get(key, value) for key, value in recipe["estimator_kwargs"].items()}
        overrides["estimator_kwargs"] = json.dumps(kwargs)
    if recipe.get("use_peft"):
        overrides |= {"lora_r": 4, "load_in_4bit": "false", "use_bnb_nested_quant": "false"}
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return make_parser().parse_args_and_config(["--config", str(path), *words]), recipe


class Gradients(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.removeprefix("config_"))
def test_the_tiny_twin_of_a_recipe_trains_ten_steps(tmp_path, path):
    (_, args, model_args), recipe = twin(path, tmp_path)
    for key in KEPT:
        if key in recipe:
            assert getattr(args, key) == recipe[key], f"{key} is the recipe's"
    model, tokenizer = tiny(scale=8.0)
    model.config.save_pretrained(tmp_path)
    foreseen = generation_batch(args, backbone_parameters(model), frozen_backbone=bool(model_args.use_peft))
    callback = Gradients()
    trainer = DiffusionGRPOTrainer(
        model,
        reward,
        args,
        train_dataset=text_prompts(),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[callback],
    )
    assert type(trainer.estimator) is type(args.build_estimator())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(callback.norms) == STEPS
    assert all(map(math.isfinite, losses)) and all(map(math.isfinite, callback.norms)), (losses, callback.norms)
    assert max(callback.norms) > 1e-6, callback.norms
    assert ("kl" in trainer.state.log_history[0]) == (recipe["beta"] != 0)
    paper = [entry["flops_paper"] for entry in trainer.state.log_history if "flops_paper" in entry]
    assert paper[0] == foreseen["flops_paper of a generation batch"], "the dry run's, to the digit"
    assert paper[-1] == foreseen["flops_paper of the run"]


def test_every_published_method_has_a_recipe():
    expected = {f"{task}_pkl" for task in ("gsm8k", "math500", "humaneval", "mbpp")}
    expected |= {f"{task}_step_merge" for task in ("gsm8k", "math500", "countdown", "sudoku")}
    methods = (
        "pkl_u pkl_t any_order diffu_grpo wd1 coupled_grpo espo gdpo tracerl justgrpo cj_grpo ddpo agrpo gspo_token "
        "spg"
    )
    expected |= {f"gsm8k_{method}" for method in methods.split()}
    assert expected <= {path.stem.removeprefix("config_") for path in FILES}


def test_padre_recipes_have_the_papers_settings():
    """App. 9.1: AdamW (0.9, 0.99), 5e-6, cosine, p 0.15, 10k steps."""
    found = 0
    for path in FILES:
        if "_pkl" not in path.stem:
            continue
        found += 1
        args = make_parser().parse_args_and_config(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])[1]
        assert (args.adam_beta1, args.adam_beta2, args.learning_rate) == (0.9, 0.99, 5e-6)
        assert (args.lr_scheduler_type, args.p_mask_prompt, args.max_steps) == ("cosine", 0.15, 10000)
        assert args.kl_estimator == "full" and args.loss_type == "dr_grpo" and not args.stop_at_eos
    assert found == 6


@pytest.mark.parametrize(
    "task, segments, iterations, canvas, temperature",
    [
        ("gsm8k", 8, 12, 256, 0.9),
        ("math500", 16, 12, 512, 0.9),
        ("countdown", 16, 8, 128, 0.9),
        ("sudoku", 16, 8, 128, 0.3),
    ],
)
def test_step_merge_recipes_have_the_papers_settings(task, segments, iterations, canvas, temperature):
    """d2 Table 5 and App. C.2."""
    name = f"llada_8b/grpo/{task}_step_merge"
    _, args, model = make_parser().parse_args_and_config(["--config", name, "--use_cpu", "true", "--bf16", "false"])
    assert (args.num_segments, args.num_iterations) == (segments, iterations)
    assert (args.max_completion_length, args.diffusion_steps, args.temperature) == (canvas, canvas // 2, temperature)
    assert (args.learning_rate, args.beta, args.epsilon, args.p_mask_prompt) == (3e-6, 0.04, 0.5, 0.15)
    assert (args.num_generations, args.scale_rewards, args.loss_type) == (6, "none", "grpo")
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 16 * 6
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.load_in_4bit) == (128, 64, 0.05, True)


@pytest.mark.parametrize(
    ("name", "prompt"), [("toxicity", None), ("toxicity", ""), ("toxicity_ddpo", None)], ids=["bos", "empty", "ddpo"]
)
def test_the_tiny_twin_of_an_eso_lm_recipe_is_steered(tmp_path, name, prompt):
    """From a checkpoint in Eso-LM's own keys to a run that raises the classifier's log-probability of its label."""
    write_original(tmp_path / "hub", torch.float32)
    run("eso_lm", tmp_path / "hub", tmp_path / "init")
    (tmp_path / "classifier").mkdir()
    path, steps = recipe_paths()[f"eso_lm/grpo/{name}"], 15
    overrides = {
        "max_completion_length": CANVAS,
        "block_length": CANVAS,
        "diffusion_steps": CANVAS,
        "max_steps": steps,
        "eval_steps": steps,
        "num_eval_examples": 1,
        "num_generations": 64,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "num_train_examples": steps,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "model_name_or_path": tmp_path / "init",
        "reward_model_name_or_path": write_classifier(tmp_path / "classifier", seed=8),  # -4 on average, 0 at best
        "output_dir": tmp_path / "run",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "bf16": "false",
        **({} if prompt is None else {"prompt": prompt}),
    }
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    script_args, args, model_args = make_parser().parse_args_and_config(["--config", str(path), *words])
    recipe = load_recipe(path)
    for key in KEPT:
        if key in recipe:
            assert getattr(args, key) == recipe[key], f"{key} is the recipe's"
    trainer = main(script_args, args, model_args)
    log = trainer.state.log_history
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    assert len(rewards) == steps and rewards == [e["rewards/log_prob_toxic/mean"] for e in log if "reward" in e]
    assert all(entry["grad_norm"] > 0 and math.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1, rewards
    assert any("eval_reward" in entry for entry in log)
    assert trainer.processing_class.bos_token_id == EOS and "kl" not in log[0]
    facts = json.loads((tmp_path / "run" / "fingerprint.json").read_text())["meaning"]
    assert facts["reward_funcs"][0]["label"] == "toxic"
