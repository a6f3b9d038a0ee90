"""The page on TRL's options: every field stands in one list, and what the lists say is so."""

import re
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from helpers_grpo import build, config, history, losses, reward, text_prompts, weights
from packaging.version import Version
from trl import GRPOConfig

from trl_dllm.trainer.grpo_config import _REFUSED


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trl_options.md").read_text()
FIELDS = {f.name: f for f in fields(GRPOConfig)}


def lists() -> dict[str, list[tuple[list[str], list[str]]]]:
    """Heading -> rows: the fields of a row's first cell, and its other cells."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
        found[heading] = [(re.findall(r"`(\w+)`", first), others) for first, *others in cells]
    return found


LISTS = lists()
WORKS, MEANS, REFUSED, NONE, HANDED_ON = LISTS


def names(heading: str) -> list[str]:
    return [name for row, _ in LISTS[heading] for name in row]


def test_every_field_stands_in_exactly_one_list():
    listed = Counter(name for heading in LISTS for name in names(heading))
    assert [name for name, times in listed.items() if times > 1] == []
    assert FIELDS.keys() - listed.keys() == set(), "say in docs/trl_options.md what becomes of them"
    # An older version may lack a field; the one that the page was written for lacks none.
    older = any(
        Version(module.__version__) < Version(re.findall(rf"{name} (\d+\.\d+\.\d+)", PAGE)[0])
        for name, module in (("TRL", trl), ("transformers", transformers))
    )
    assert older or listed.keys() - FIELDS.keys() == set(), "no supported version has them"
    # Of those that TRL 1.15 with transformers 5.18 has, none is gone; two are new.
    assert listed.keys() - FIELDS.keys() <= {"activation_checkpointing", "activation_checkpointing_kwargs"}


def test_every_row_has_a_reason_or_a_test_that_exists():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for heading, rows in LISTS.items():
        assert len(rows) > 3 and all(name and all(others) for name, others in rows), heading
    for row, (_, test) in LISTS[WORKS]:
        (name,) = re.findall(r"`(\w+)`", test)
        assert f"def {name}(" in tests, f"{row}: there is no {name}"


# A right value other than the default, and what else it takes; of a field that is not here, the opposite, half or one
# more of the default.
VALUES: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine"},
    "optim": "sgd",
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 1.0,
    "torch_empty_cache_steps": 5,
    "logging_strategy": "epoch",
    "include_num_input_tokens_seen": "all",
    "log_level": "info",
    "log_level_replica": "info",
    "eval_steps": 2,
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["loss"],
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "hub_strategy": "end",
    "metric_for_best_model": "reward",
    "data_seed": 99,
    "accelerator_config": {"even_batches": False},
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": "fork",
    "label_names": ["answer"],
    "length_column_name": "answer",
    "train_sampling_strategy": "sequential",
    "ddp_bucket_cap_mb": 5,
    "debug": "underflow_overflow",
    "model_init_kwargs": {"dtype": "float32"},
    "router_aux_loss_coef": 0.1,
    "num_generations": 2,
    "num_generations_eval": 2,
    "max_completion_length": 16,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "pad_to_multiple_of": 16,
    "generation_batch_size": {"generation_batch_size": 8, "gradient_accumulation_steps": 1},
    "steps_per_generation": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "generation_kwargs": {"generation_kwargs": {"block_length": 8}},
    "chat_template_kwargs": {"chat_template_kwargs": {"tools": None}},
    "cache_implementation": "static",
    "repetition_penalty": 1.2,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_server_host": "127.0.0.1",
    "vllm_max_model_length": 4,
    "transformers_continuous_batching_config": {"max_batch_tokens": 4},
    "delta": 2.0,
    "epsilon_high": 0.3,
    "importance_sampling_level": "sequence",
    "reward_weights": [2.0],
    "multi_objective_aggregation": "normalize_then_sum",
    "scale_rewards": "batch",
    "loss_type": "grpo",
    "sync_ref_model": {"sync_ref_model": True, "beta": 0.1},
    "top_entropy_quantile": 0.5,
    "max_tool_calling_iterations": 1,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": 0.9,
    "vllm_importance_sampling_cap": 1.5,
    "off_policy_mask_threshold": 0.5,
    "num_completions_to_print": 1,
    "log_completions_hub_repo": {"log_completions_hub_repo": "a/b", "log_completions": True},
}

# They need a launcher, a device, an account or a file, or change the whole process; all are accepted or handed on.
ELSEWHERE = {
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "full_determinism", "use_cpu", "deepspeed", "fsdp"),
    *("fsdp_config", "parallelism_config", "ddp_backend", "push_to_hub", "load_best_model_at_end", "eval_strategy"),
    *("output_dir", "resume_from_checkpoint", "enable_jit_checkpoint"),
}


def another(name: str) -> dict[str, Any]:
    """Settings with which that field has another value than its default."""
    value = VALUES.get(name)
    if isinstance(value, dict) and name in value:
        return value
    if value is None:
        default = FIELDS[name].default
        if isinstance(default, bool) or (default is None and "bool" in str(FIELDS[name].type)):
            value = not default
        elif default is None or isinstance(default, str):
            value = "a" if "str" in str(FIELDS[name].type) else 1
        else:
            value = default + 1 if isinstance(default, int) else (default or 1.0) / 2
    return {name: value}


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - ELSEWHERE))
def test_what_the_page_calls_refused_is_what_is_refused(tmp_path, name):
    settings = another(name)
    assert settings[name] != FIELDS[name].default
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names
        try:
            config(tmp_path, **settings)
        except ValueError as error:
            message = str(error)
    assert (name in message) == (name in names(REFUSED)), message
    assert name in names(REFUSED) or not message, message


def test_the_pages_refused_fields_are_the_codes():
    of_the_code = _REFUSED.keys() & FIELDS.keys()
    assert set(names(REFUSED)) - of_the_code == {"auto_find_batch_size"}, "TRL refuses it by itself"
    assert of_the_code <= set(names(REFUSED))


def test_what_the_page_says_has_no_effect_has_none(tmp_path):
    """A run with every one of them set repeats the run without them: metrics, evaluation and weights."""
    known = [name for name in names(NONE) if name in FIELDS]
    settings = {key: value for name in known for key, value in another(name).items()}
    assert len(settings) == len(known)

    def run(**changes):
        trainer = build(
            tmp_path, eval_dataset=text_prompts(1), eval_strategy="steps", eval_steps=1, num_generations_eval=2,
            per_device_eval_batch_size=4, num_iterations=2, max_steps=3, beta=0.04, num_segments=2, **changes,
        )  # fmt: skip
        trainer.train()
        return history(trainer), weights(trainer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        (before, trained), (after, trained_too) = run(), run(**settings)
    assert before == after
    assert all(torch.equal(value, trained_too[name]) for name, value in trained.items())


# ------------------------------------------------------------------------------ what no other test shows to work


def test_the_generation_batch_may_be_given_by_its_size(tmp_path):
    runs = []
    for settings in ({"generation_batch_size": 16}, {"steps_per_generation": 4}):
        trainer = build(tmp_path, max_steps=2, **settings)
        trainer.train()
        runs.append(history(trainer))
        assert trainer.args.generation_batch_size == 16 and trainer.args.steps_per_generation == 4
    assert runs[0] == runs[1]


def length(completions, **kwargs) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_rewards_become_the_advantages_that_their_options_say(tmp_path, scale, aggregation):
    """Σ_k w_k r_k less its group's mean, over a standard deviation; or each reward so in its group, and then the sum
    less the batch's mean over the batch's deviation."""
    seen: list[list[float]] = []

    def recorded(function):
        def call(completions, **kwargs):
            seen.append(function(completions))
            return seen[-1]

        call.__name__ = function.__name__
        return call

    trainer = build(
        tmp_path, reward_funcs=[recorded(reward), recorded(length)], reward_weights=[2.0, -0.5], scale_rewards=scale,
        multi_objective_aggregation=aggregation, temperature=1.5, learning_rate=0.0,
    )  # fmt: skip
    batches = []
    generate = trainer._generate_and_score_completions

    def keeping(inputs):
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = keeping
    trainer.train()
    first, second = (torch.tensor(values).view(2, 4) for values in seen)
    assert all(values.std(dim=1).min() > 0 for values in (first, second)), "nothing would be scaled"
    if aggregation == "sum_then_normalize":
        total = 2 * first - 0.5 * second
        centred = total - total.mean(dim=1, keepdim=True)
        deviation = {"group": total.std(dim=1, keepdim=True), "batch": total.std(), "none": None}[scale]
        expected = centred if deviation is None else centred / (deviation + 1e-4)
    else:
        parts = [(r - r.mean(dim=1, keepdim=True)) / (r.std(dim=1, keepdim=True) + 1e-4) for r in (first, second)]
        total = 2 * parts[0] - 0.5 * parts[1]
        expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(batches[0]["advantages"], expected.flatten(), atol=1e-4, rtol=0)
    assert len(losses(trainer)) == 1
