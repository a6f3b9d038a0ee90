"""TRL's own training scripts and examples, with names, model and data replaced and nothing else.

They are read from the installed TRL. What its documentation's commands say and is refused here is `REFUSED`.
"""

import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from helpers_grpo import tiny
from safetensors.torch import load_file

from trl_dllm.recipe import RECIPES


SCRIPTS = Path(trl.__file__).parent / "scripts"
ON_CPU = Path(__file__).parent / "distributed" / "on_cpu.py"
NAMES = ("GRPOTrainer", "GRPOConfig", "SFTTrainer", "SFTConfig", "DPOTrainer", "DPOConfig")

# Flags of TRL's documented commands that diffusion models have no use for, or that need what is not here.
REFUSED = {
    "--packing": "packed rows would attend to each other: DiffusionSFTConfig says so",
    "--push_to_hub": "test_model_card.py pushes to a Hub on localhost",
}

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# ZeRO as DeepSpeed's and transformers' documentation writes it.
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
}
STAGES = {
    "zero2.json": {
        "stage": 2,
        "overlap_comm": True,
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "zero3.json": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def replaced(text: str) -> str:
    """The text with this library's trainers and configs for TRL's, imported from where they are."""

    def importing(match: re.Match) -> str:
        indent, names = match[1], [name.strip() for name in match[2].split(",")]
        ours, theirs = [n for n in names if n in NAMES], [n for n in names if n not in NAMES]
        lines = [f"{indent}from trl import {', '.join(theirs)}"] if theirs else []
        return "\n".join([*lines, *[f"{indent}from trl_dllm import {name}" for name in ours]])

    text = re.sub(r"^( *)from trl import (\w[\w, ]*)$", importing, text, flags=re.MULTILINE)
    return re.sub(rf"\b({'|'.join(NAMES)})\b", r"Diffusion\1", text)


def example(docstring_of: type) -> str:
    """The code of a docstring's example."""
    (code,) = re.findall(
        r"    Example:\n\n    ```python\n(.*?)```", inspect.getdoc(docstring_of) or "", re.DOTALL
    ) or [re.search(r"Example:\s+```python\n(.*?)```", docstring_of.__doc__ or "", re.DOTALL)[1]]
    return "\n".join(line.strip()[4:] for line in code.splitlines() if line.strip()) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model that chats, data, and TRL's scripts with the names replaced."""
    folder = tmp_path_factory.mktemp("trl")
    model, tokenizer = tiny()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    questions = ["1+2", "what is 3 + 4", "7", "2 * 5 = "]
    rows = {
        "prompts": [{"prompt": [{"role": "user", "content": q}], "solution": "$3$"} for q in questions] * 4,
        "chats": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1]}]}
            for q in questions
        ]
        * 4,
        "prompt": [
            {"prompt": [{"role": "user", "content": "1+2"}], "solution": "$3$"}
        ],  # a canvas of TRL's 256 tokens
        "pairs": [
            {
                "prompt": [{"role": "user", "content": q}],
                "chosen": [{"role": "assistant", "content": q[::-1]}],
                "rejected": [{"role": "assistant", "content": q + "?"}],
            }
            for q in questions
        ]
        * 4,
        "stories": [{"text": f"Once there was {q}."} for q in questions] * 2,
    }
    for name, data in rows.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            text = "\n".join(json.dumps(row) for row in data[: None if split == "train" else 4])
            (folder / name / f"{split}.jsonl").write_text(text + "\n")
    for name in ("grpo", "sft", "dpo"):
        (folder / f"{name}.py").write_text(replaced((SCRIPTS / f"{name}.py").read_text()))
    for name, stage in STAGES.items():
        (folder / name).write_text(json.dumps({**ZERO, "zero_optimization": stage}))
    return folder


def arguments(name: str, output: str) -> list[str]:
    """What a script is started with: the data and the size of a test.

    Three steps, because DeepSpeed's warm-up begins with two at a learning rate of 0.
    """
    common = "--model_name_or_path model --max_steps 3 --logging_steps 1 --report_to none --learning_rate 1e-3 "
    common += f"--bf16 false --output_dir {output} "
    own = {
        "grpo": "--dataset_name prompts --reward_funcs accuracy_reward think_format_reward "
        "get_soft_overlong_punishment rewards.length --max_completion_length 8 --num_generations 4 "
        "--per_device_train_batch_size 4",
        "sft": "--dataset_name chats --eval_strategy steps --eval_steps 1 --per_device_train_batch_size 2",
        "dpo": "--dataset_name pairs --eval_strategy steps --eval_steps 1 --per_device_train_batch_size 2",
    }
    return shlex.split(common + own[name])


REWARDS = """
def length(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [len(text) + ord(text[:1] or "a") / 100 for text in texts]
"""


def trained(folder: Path, checkpoint: Path) -> bool:
    """Whether a folder has a model whose weights are not those of `checkpoint`, or an adapter that is not zero."""
    (file,) = list(folder.glob("*.safetensors"))
    weights = load_file(file)
    if file.name.startswith("adapter"):
        return any(value.any() for name, value in weights.items() if "lora_B" in name)
    before = load_file(checkpoint / "model.safetensors")
    assert weights.keys() == before.keys()
    return any(not value.equal(before[name]) for name, value in weights.items())


@pytest.fixture
def here(place, monkeypatch):
    """The folder, as the working directory of a script that runs in this process."""
    (place / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    return place


@pytest.mark.parametrize("name", ["grpo", "sft", "dpo"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_trls_script_trains(here, monkeypatch, name, peft):
    output = f"one-{name}-{peft}"
    lora = ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "all-linear"]
    argv = [f"{name}.py", *arguments(name, output), "--use_cpu", "true", *(lora if peft else [])]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(f"{name}.py", run_name="__main__")
    assert trained(here / output, here / "model") and (here / output / "decoding.json").exists() is (name == "grpo")


def documented(name: str) -> list[list[str]]:
    """The commands of a script's docstring, as lists of words behind the script."""
    text = (SCRIPTS / f"{name}.py").read_text().replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in re.findall(r"^python trl/scripts/.*$", text, re.MULTILINE)]


@pytest.mark.parametrize("words", documented("sft"), ids=["full", "lora"])
def test_the_documented_commands_of_trls_sft_run(here, monkeypatch, words):
    """Model, data and output replaced; the number of steps and the device are the test's."""
    kept = [word for word in words if word not in REFUSED]
    assert len(kept) == len(words) - len(REFUSED)
    output = f"documented-{'--use_peft' in words}"
    small = ["--model_name_or_path", "model", "--dataset_name", "chats", "--output_dir", output, "--max_steps", "1"]
    eos = ["--eos_token", "</s>" if "</s>" in tiny()[1].get_vocab() else tiny()[1].eos_token]
    small += [*eos, "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *kept, *small])
    runpy.run_path("sft.py", run_name="__main__")
    assert trained(here / output, here / "model")


@pytest.mark.parametrize(
    ("trainer", "model", "data"),
    [
        (trl.GRPOTrainer, "Qwen/Qwen2.5-0.5B-Instruct", '"trl-lib/DeepMath-103K", split="train"'),
        (trl.SFTTrainer, "Qwen/Qwen2.5-0.5B-Instruct", '"roneneldan/TinyStories", split="train[:1%]"'),
    ],
    ids=["grpo", "sft"],
)
def test_the_example_of_trls_trainer_runs(here, monkeypatch, trainer, model, data):
    """On the machine that it is written for, as far as precision goes: bfloat16 is TRL's default."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    code = example(trainer)
    assert model in code and data in code, "TRL has another example now: read it, and replace what it names"
    ours = "prompt" if trainer is trl.GRPOTrainer else "stories"
    code = replaced(code).replace(model, "model").replace(data, f'"{ours}", split="train"')
    found = {}
    exec(compile(code, trainer.__name__, "exec"), found)
    assert found["trainer"].state.global_step == found["trainer"].state.max_steps > 0
    assert type(found["trainer"]).__name__ == f"Diffusion{trainer.__name__}"


def test_only_the_names_of_a_script_are_replaced():
    for name in ("grpo", "sft", "dpo"):
        before, after = (SCRIPTS / f"{name}.py").read_text(), replaced((SCRIPTS / f"{name}.py").read_text())
        assert "DiffusionDiffusion" not in after and f"from trl_dllm import Diffusion{name.upper()}Trainer" in after
        undone = after.replace("Diffusion", "")
        kept = [line for line in before.splitlines() if not line.strip().startswith("from trl import")]
        there = [
            line for line in undone.splitlines() if not line.strip().startswith(("from trl import", "from trl_dllm"))
        ]
        assert there == kept


# ---------------------------------------------------------------------------------------------------- two processes

CONFIGS = [path.stem for path in sorted((RECIPES / "accelerate_configs").glob("*.yaml"))]

# What a process says of itself under each.
BACK_ENDS = {
    "ddp": "MULTI_CPU None split=False of 2",
    "fsdp": "FSDP None split=True of 2",
    "zero2": "DEEPSPEED 2 split=False of 2",
    "zero3": "DEEPSPEED 3 split=True of 2",
}


def launch(place: Path, name: str, kind: str) -> subprocess.CompletedProcess:
    """A script on two processes: by `accelerate launch` with a config of this library, or with a DeepSpeed JSON."""
    output = f"two-{name}-{kind}"
    argv = [str(ON_CPU), f"{name}.py", *arguments(name, output)]
    if kind in STAGES:
        start = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        argv += ["--deepspeed", kind]
    else:
        config = str(RECIPES / "accelerate_configs" / f"{kind}.yaml")
        start = ["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
        start += ["--mixed_precision", "no", "--main_process_port", "0"]
    argv += [] if kind == "fsdp" else ["--use_cpu", "true"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(place)]),
    }
    (place / "rewards.py").write_text(REWARDS)
    return subprocess.run(
        [sys.executable, "-m", *start, *argv], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CONFIGS, *STAGES])
@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_trls_script_trains_on_two_processes(place, name, kind):
    done = launch(place, name, kind)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(f"back end: {BACK_ENDS[Path(kind).stem]}") == 2, done.stdout
    assert trained(place / f"two-{name}-{kind}", place / "model")
