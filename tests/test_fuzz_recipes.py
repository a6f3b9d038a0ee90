"""Mutated recipes: each ends with one line that names what is wrong, or runs with exactly what it asked for.

The oracle knows nothing of any check. A recipe that is refused ends with exit code 2 and a line that names a mutated
field, before a weight is loaded; one that is not refused trains at least one step, and every value of the file is the
value that the run had.
"""

import copy
import datetime
import json
import math
import os
import random
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers_scripts import DPO, GRPO, SFT
from transformers import PreTrainedModel

from trl_dllm import cli
from trl_dllm.scripts import dpo, grpo, sft


SCRIPTS: dict[str, tuple[ModuleType, dict[str, Any]]] = {"grpo": (grpo, GRPO), "sft": (sft, SFT), "dpo": (dpo, DPO)}

# Fields that reach beyond the run, or take long: they get wrong values, but no other right one.
BEYOND = """
activation_offloading auto_find_batch_size bf16_full_eval cast_lm_head_to_fp32 chat_template_path
dataloader_num_workers dataset_num_proc dataset_streaming ddp_backend deepspeed dry_run enable_jit_checkpoint
eval_on_start fp16_full_eval fsdp full_determinism hub_model_id hub_token load_in_4bit load_in_8bit log_completions
log_level log_level_replica num_eval_examples num_train_examples parallelism_config push_to_hub report_to
save_on_each_node skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode
torch_empty_cache_steps trust_remote_code use_cpu
"""
MAY_BE_RIGHT = [True, None, 3, 2.0, "nonsense", "no such/thing", ["nonsense"]]

# Values of every type, of which most are wrong in most fields.
HOSTILE: list[Any] = [
    *["", "nonsense", "ünïcödé ✓", "\u202e\u0000", "1e400", "nan", "٣", "{bad json", "[1]", "-1", "no such/thing"],
    *[-1, 0, 3, -0.5, 0.5, 4.5, 2.0, math.nan, math.inf, -math.inf, True, False, None],
    *[[], [None], ["nonsense"], [math.nan], {}, {"nonsense": 1}, {"nested": {"deep": [1]}}],
    *[datetime.date(2026, 2, 28), b"bytes"],
]

# Right values, of which a run must have exactly what was asked.
RIGHT: dict[str, dict[str, list[Any]]] = {
    "both": {
        "seed": [0, 2**32 - 1],
        "learning_rate": [0, 1e-3, "1e-3", 5],
        "max_steps": [1, 2, "1"],
        "weight_decay": [0.1, "0.1"],
        "adam_beta2": [0.5],
        "max_grad_norm": [0, 0.2],
        "warmup_steps": [1, 0.5],
        "lr_scheduler_type": ["cosine", "constant_with_warmup"],
        "gradient_accumulation_steps": [1, 2],
        "per_device_train_batch_size": [2, 4],
        "gradient_checkpointing": [True, False, "yes"],
        "save_strategy": ["no", "epoch"],
        "logging_steps": [1, 0.5],
        "task_kwargs": [{"min_blanks": 2, "max_blanks": 3}, '{"min_blanks": 4}', {"answer_noise": 0}, {}],
        "puzzle_seed": [-3, 5],
        "num_train_epochs": [0.5, 1e9],
        "dtype": ["float32", "auto", "bfloat16"],
        "attn_implementation": ["eager", "sdpa"],
    },
    "grpo": {
        "estimator": ["mean_field", "exact_trajectory", "pkl", "elbo", "coupled_elbo", "any_order", "spg"],
        "loss_type": ["grpo", "bnpo", "dapo", "cispo", "sapo", "wd1", "luspo", "vespo"],
        "importance_sampling_level": ["token", "sequence", "sequence_token"],
        "scale_rewards": [True, False, "batch"],
        "beta": [0.1, 0],
        "kl_estimator": ["k3", "full"],
        "ratio_denominator": ["ref", "old", "current"],
        "num_iterations": [2],
        "num_segments": [1, 4],
        "estimator_kwargs": [{"num_segments": 3}, {"num_samples": 2}, '{"num_segments": 2}'],
        "epsilon": [0, 1e9],
        "epsilon_high": [0.3],
        "delta": [2.0],
        "temperature": [0.5, 0],
        "remasking": ["random", "margin", "left_to_right"],
        "diffusion_steps": [2, 8],
        "block_length": [4, 16],
        "max_completion_length": [8, 24],
        "confidence_threshold": [0.0, 0.9],
        "reward_funcs": [["solved"], ["cells", "solved"], ["format"], ["accuracy"]],
        "reward_weights": [[1, 0.5], [2.0]],
        "top_entropy_quantile": [0.5, 1],
        "p_mask_prompt": [0, 0.15],
        "score_temperature": [1.0, None],
        "decoding": ["any_order"],
        "cache": ["exact"],
        "num_generations": [2, 4],
        "old_logps": ["rollout"],
        "steps_per_generation": [2],
        "generation_batch_size": [8],
        "multi_objective_aggregation": ["normalize_then_sum"],
        "mask_truncated_completions": [True],
        "sampler_batch_size": [1],
        "loss_tokens": ["canvas"],
    },
    "sft": {
        "objective": ["any_order"],
        "loss_weight": ["none", "1/t"],
        "mask_eps": [1, 0.5],
        "canvas_length": [None, 20, 4096],
        "block_length": [4, 8],
        "max_length": [None, 12, 64],
        "trainable_modules": [["q_proj"], ["all"]],
        "dataloader_drop_last": [True],
        "completion_only_loss": [True],
        "packing": [False, True],
    },
    "dpo": {
        "estimator": ["elbo", "coupled_elbo"],
        "num_samples": [1, 2, 4, "2"],
        "loss_type": ["ipo", ["sigmoid", "sft"], ["aot"], "exo_pair"],
        "loss_weights": [[0.5], [1, 2]],
        "beta": [0.1, "0.2", 0],
        "label_smoothing": [0, 0.1, 0.5],
        "f_divergence_type": ["forward_kl", "js_divergence", "alpha_divergence"],
        "ld_alpha": [0, 1, 0.5],
        "use_weighting": [False, True],
        "precompute_ref_log_probs": [True],
        "sync_ref_model": [True, False],
        "ref_model_sync_steps": [1],
        "max_length": [None, 12, 64],
        "dataloader_drop_last": [True],
        "rejected_kwargs": [{"answer_noise": 1}, '{"answer_noise": 0.9}', {"max_blanks": 9, "answer_noise": 0.4}],
    },
}  # fmt: skip

# Settings that each is right but for the others, or wrong in one plain way.
CONTRADICTIONS: dict[str, list[dict[str, Any]]] = {
    "both": [
        {"lora_r": 4},
        {"lora_dropout": 0.1, "use_peft": True},
        {"use_peft": True},
        {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]},
        {"use_peft": True, "lora_r": 0},
        {"use_peft": False, "lora_alpha": 4},
        {"load_in_4bit": True},
        {"dataset_name": "some/data"},
        {"dataset_train_split": "train[:3]"},
        {"task": None, "dataset_name": None},
        {"task": None, "task_kwargs": {"min_blanks": 2}, "dataset_name": "some/data"},
        {"data_dir": "no/such/folder"},
        {"task_kwargs": {"min_blank": 2}},
        {"task_kwargs": {"min_blanks": 2.5}},
        {"task_kwargs": {"seed": 2}},
        {"task_kwargs": {"min_blanks": 9, "max_blanks": 3}},
        {"bf16": True, "fp16": True},
        {"fp16": True},
        {"bf16": True, "use_cpu": False},
        {"per_device_train_batch_size": 64},
        {"max_steps": 0},
        {"num_train_epochs": 0, "max_steps": -1},
        {"model_name_or_path": "no/such-model"},
        {"model_name_or_path": None},
        {"warmup_ratio": 0.1},
        {"env": ["A"]},
        {"env": {"A=B": 1}},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 2}},
        {"load_best_model_at_end": True, "eval_strategy": "epoch"},
        {"resume_from_checkpoint": "no/such/checkpoint"},
    ],
    "sft": [
        {"canvas_length": 20, "block_length": 8},
        {"packing": True},
        {"max_length": 4, "canvas_length": 5000},
        {"use_peft": True, "trainable_modules": ["q_proj"]},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
    ],
    "dpo": [
        {"rejected_kwargs": None},
        {"rejected_kwargs": {"answer_noise": 0}},
        {"rejected_kwargs": {"answer_noises": 0.5}},
        {"rejected_kwargs": {"seed": 3}},
        {"rejected_kwargs": "{answer_noise: 3}"},
        {"task": None, "dataset_name": "some/data", "rejected_kwargs": {"answer_noise": 0.5}},
        {"task": "gsm8k", "rejected_kwargs": {"answer_noise": 0.5}},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        {"loss_type": ["aot"], "f_divergence_type": "forward_kl"},
        {"estimator": "coupled_elbo", "num_samples": 3},
        {"estimator": "step_merge"},
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        {"sync_ref_model": True, "use_peft": True, "lora_target_modules": ["q_proj"]},
        {"max_length": 4},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
        {"dry_run": True},
    ],
    "grpo": [
        {"tokens_per_step": 2},
        {"num_segments": 3, "estimator_kwargs": {"num_segments": 4}},
        {"estimator": "elbo", "top_entropy_quantile": 0.5},
        {"estimator": "pkl", "estimator_kwargs": {"num_positions": 4}, "loss_type": "luspo"},
        {"generation_batch_size": 8, "steps_per_generation": 2},
        {"loss_type": "wd1", "beta": 0.1},
        {"estimator": "spg", "beta": 0.0},
        {"estimator": "spg", "ratio_denominator": "current", "beta": 0.1},
        {"reward_funcs": []},
        {"reward_funcs": ["accuracy"]},
        {"reward_funcs": ["no.such.reward"]},
        {"reward_funcs": ["get_soft_overlong_punishment"]},
        {"reward_weights": [1.0, 2.0, 3.0]},
        {"use_vllm": True},
        {"sync_ref_model": True},
        {"num_generations": 3},
        {"max_completion_length": 8192},
        {"kl_estimator": "full"},
        {"epsilon": -0.1},
        {"beta": -1},
    ],
}

# What makes a text no recipe.
BROKEN: list[Callable[[bytes], bytes]] = [
    lambda text: b"",
    lambda text: b"- a list",
    lambda text: text + b"\nbeta: [1, 2",
    lambda text: text + b"\n\tbeta: 1",
    lambda text: text + b"\nseed: 1\nseed: 2\n",
    lambda text: text + b"\nbeta: !!python/object:os.system {}\n",
    lambda text: text + b"\nrun_name: \xff\xfe\n",
    lambda text: text + b"\n2: 3\n",
    lambda text: text + b"\nnull: 3\n",
    lambda text: text + b"\nseed: 2026-13-45\n",
    lambda text: text + b"\nbase: no_such.yaml\n",
    lambda text: text + b"\nrun_name: &a [*a]\n",
    lambda text: text + b"\nrun_name: " + b"[" * 3000 + b"\n",
]


class Case:
    """A mutated recipe and command line.

    Attributes:
        command, script: what reads it.
        text: of the recipe.
        argv: what is said on the command line.
        asked: every value that was asked for; empty where the text is no recipe.
        names: of which an error must name one.
    """

    def __init__(self, number: int, folder: Path, model: str, command: str | None = None):
        self.draw = random.Random(f"recipe/{number}")
        self.command = command or self.draw.choice(["grpo", "grpo", "sft"])
        self.script, base = SCRIPTS[self.command]
        self.names: list[str] = []
        own = {"model_name_or_path": model, "output_dir": str(folder / "out"), "max_steps": 1}
        self.asked = {**base, **own, "resume_from_checkpoint": False, "save_strategy": "no"}
        kinds = {"hostile": 8, "right": 6, "contradictory": 6, "unknown": 2, "missing": 1, "broken": 1}
        kind = self.draw.choices(list(kinds), list(kinds.values()))[0]
        getattr(self, kind)()
        self.argv = []
        recipe = dict(self.asked)
        if kind in ("hostile", "right") and self.draw.random() < 0.25:
            for name in self.names:
                if isinstance(recipe.get(name), str | int | float):
                    self.argv.append(f"--{name}={recipe.pop(name)}")
                    self.asked[name] = self.argv[-1].split("=", 1)[1]
        self.text = yaml.safe_dump(recipe, allow_unicode=True).encode()
        if kind == "broken":
            self.text, self.asked = self.draw.choice(BROKEN)(self.text), {}

    def __str__(self) -> str:
        mutated = [f"{name}={self.asked[name]!r}" if name in self.asked else f"no {name}" for name in self.names]
        return f"{self.command}: {', '.join(mutated)}{' on the command line' if self.argv else ''}"

    def set(self, name: str, value: Any) -> None:
        self.asked[name] = value
        self.names += [name, *(map(str, value) if isinstance(value, dict) else [])]

    @property
    def known(self) -> list[str]:
        return sorted(set(self.script.make_parser().known()))

    def hostile(self) -> None:
        for name in self.draw.sample(self.known, self.draw.choice([1, 1, 2])):
            skipped = MAY_BE_RIGHT if name in BEYOND.split() else []
            self.set(name, self.draw.choice([value for value in HOSTILE if value not in skipped]))

    def right(self) -> None:
        right = {**RIGHT["both"], **RIGHT[self.command]}
        for name in self.draw.sample(sorted(right), self.draw.choice([1, 2, 3])):
            self.set(name, self.draw.choice(right[name]))

    def contradictory(self) -> None:
        for name, value in self.draw.choice(CONTRADICTIONS["both"] + CONTRADICTIONS[self.command]).items():
            self.set(name, value)

    def missing(self) -> None:
        self.names = [self.draw.choice(sorted(self.asked))]
        del self.asked[self.names[0]]

    def unknown(self) -> None:
        name = self.draw.choice(self.known)
        i = self.draw.randrange(len(name))
        wrong = [name[:i] + name[i + 1 :], name.upper(), name.replace("e", "е"), f"{name} ", f"✓{name}"]  # Cyrillic е
        self.set(self.draw.choice(wrong), 1)

    def broken(self) -> None:
        self.names = ["recipe.yaml", "run_name"]


def is_what_was_asked(name: str, asked: Any, found: Any) -> bool:
    """Whether a setting is what the file says: the same, or what TRL's documentation says it stands for."""
    if isinstance(found, Enum):
        found = found.value
    if asked is None or (isinstance(asked, bool) is isinstance(found, bool) and asked == found):
        return True
    if name == "scale_rewards":
        return {True: "group", False: "none"}.get(asked) == found
    if name == "report_to" and asked == "none":
        return found == []
    if name == "include_num_input_tokens_seen":
        return {True: "all", False: "no"}.get(asked) == found
    if name == "num_segments" and found is None:
        return True  # of another estimator: ignored with a warning
    if isinstance(asked, str) and not isinstance(found, str):  # as it would stand on the command line
        if isinstance(found, list) and len(found) == 1:  # of which it is one item
            return found == [asked]
        if isinstance(found, bool):
            return found is (asked.lower() in ("yes", "true", "t", "y", "1"))
        return float(asked) == found if isinstance(found, int | float) else json.loads(asked) == found
    return False


def check(case: Case, folder: Path, monkeypatch, capsys) -> None:
    (folder / "recipe.yaml").write_bytes(case.text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a recipe's `env` goes there
    runs, loaded = [], []
    main, load = case.script.main, PreTrainedModel._load_pretrained_model

    def watched(*arguments):
        found = {name: copy.deepcopy(value) for part in arguments for name, value in vars(part).items()}
        runs.append((found, main(*arguments)))

    def watched_load(model, *args, **kwargs):
        loaded.append(model)
        return load(model, *args, **kwargs)

    monkeypatch.setattr(case.script, "main", watched)
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(watched_load))
    try:
        cli.main([case.command, "--config", "recipe.yaml", *case.argv])
    except SystemExit as ended:
        line = str(ended)
        assert ended.code == 2, f"{case}: exit code {ended.code}: {line}"
        assert line.startswith(f"trl-dllm {case.command}: ") and "\n" not in line, f"{case}: {line}"
        assert capsys.readouterr().err.endswith(f"{line}\n"), f"{case}: printed something else than: {line}"
        assert any(name.lower() in line.lower() for name in case.names), f"{case}: names none of them: {line}"
        assert not loaded, f"{case}: weights were loaded before: {line}"
        return
    ((found, trainer),) = runs
    assert case.asked, f"{case}: a text that is no recipe ran"
    for name, asked in case.asked.items():
        if name != "env":
            assert is_what_was_asked(name, asked, found[name]), f"{case}: {name} was {found[name]!r}"
    if found["dry_run"]:  # which a mutation may have asked for
        assert "dry_run" in case.asked and "GiB a GPU: total" in trainer
        return
    assert trainer.state.global_step >= max(1, int(case.asked.get("max_steps") or 1)), f"{case}: no step"
    assert list(Path(trainer.args.output_dir).glob("*.safetensors")), f"{case}: no model"


@pytest.mark.parametrize("number", range(60))
def test_a_mutated_recipe_is_refused_by_name_or_runs_as_it_says(
    number, tmp_path, monkeypatch, capsys, tiny_checkpoint
):
    check(Case(number, tmp_path, tiny_checkpoint), tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60, 560))
def test_many_mutated_recipes_are_refused_by_name_or_run_as_they_say(
    number, tmp_path, monkeypatch, capsys, tiny_checkpoint
):
    check(Case(number, tmp_path, tiny_checkpoint), tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("number", range(1000, 1020))
def test_a_mutated_recipe_of_preferences_is_refused_by_name_or_runs_as_it_says(
    number, tmp_path, monkeypatch, capsys, tiny_checkpoint
):
    check(Case(number, tmp_path, tiny_checkpoint, "dpo"), tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1020, 1170))
def test_many_mutated_recipes_of_preferences_are_refused_by_name_or_run_as_they_say(
    number, tmp_path, monkeypatch, capsys, tiny_checkpoint
):
    check(Case(number, tmp_path, tiny_checkpoint, "dpo"), tmp_path, monkeypatch, capsys)
