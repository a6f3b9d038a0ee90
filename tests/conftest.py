"""One thread for every test, tiny models of each family, and the folder with the real data."""

import os
from pathlib import Path

import pytest
import torch
from oracles import sharp_model

from trl_dllm.sandbox import SandboxUnavailable, choose_sandbox
from trl_dllm.scripts import init_tiny


torch.set_num_threads(1)


@pytest.fixture(params=["llada", "dream"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def models():
    """`models(family, dtype=torch.float64, attn="sdpa")`: a tiny model far from uniform. Shared: do not change it."""
    cache = {}

    def get(family: str, dtype: torch.dtype = torch.float64, attn: str = "sdpa"):
        key = (family, dtype, attn)
        if key not in cache:
            cache[key] = sharp_model(family, dtype=dtype, attn_implementation=attn)
        return cache[key]

    return get


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> str:
    """A folder with a tiny LLaDA and its tokenizer, as `trl-dllm init-tiny` writes it. Shared: do not write to it."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    init_tiny.main(init_tiny.make_parser().parse_args([folder, "--hidden_size", "16", "--num_layers", "1"]))
    return folder


# What neither the memory nor the operations of a step depend on.
_FREE = {
    *("output_dir", "run_name", "seed", "save_steps", "save_total_limit", "eval_steps", "logging_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "weight_decay"),
    *("adam_beta2", "max_grad_norm", "epsilon", "scale_rewards", "temperature", "score_temperature"),
    "generation_batch_size",  # of all processes
}


@pytest.fixture(scope="session")
def measured():
    """`measured(recipe, *flags)`: settings, model settings and what a dry run measures, once for those alike."""
    from trl_dllm.reports.dry_run import first_stage, measure
    from trl_dllm.scripts import dpo, grpo, sft

    cache = {}

    def get(recipe: str, *flags: str):
        command = recipe.split("/")[1]
        parser = {"grpo": grpo, "sft": sft, "dpo": dpo}[command].make_parser()
        _, args, model_args = parser.parse_args_and_config(["--config", recipe, "--dry_run", "true", *flags])
        settings = {**vars(args), **vars(model_args), "model_name_or_path": first_stage(model_args.model_name_or_path)}
        key = str({name: str(value) for name, value in settings.items() if name not in _FREE and name[0] != "_"})
        if key not in cache:
            cache[key] = measure(command, args, model_args)
        return args, model_args, cache[key]

    return get


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data (GSM8K, Countdown, Sudoku, stored generations, …)."""
    path = os.environ.get("TRL_DLLM_DATA")
    if not path:
        pytest.skip("TRL_DLLM_DATA is not set: it must name the folder with the real data")
    if not Path(path).is_dir():
        pytest.skip(f"TRL_DLLM_DATA={path!r} is not a folder")
    return Path(path)


@pytest.fixture(scope="session")
def sandbox() -> str:
    """The kind of sandbox for generated programs that works here."""
    try:
        return choose_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
