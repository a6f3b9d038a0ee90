"""Runs of the trainers that a single process and a worker of several describe in the same words."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers_dpo import config as dpo_config
from helpers_grpo import build, history, lora, losses, text_prompts, tiny, weights
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_dllm import DiffusionDPOTrainer, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.generation import generate
from trl_dllm.models import head


HERE = Path(__file__).parent


def zero(stage: int) -> dict:
    return {
        # 0: tiny parameters are partitioned like large ones.
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "bf16": {"enabled": False},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }


BACKENDS: dict[str, tuple[dict | None, str]] = {
    "ddp": (None, "DistributedDataParallel"),
    "zero2": ({"deepspeed": zero(2)}, "DeepSpeedEngine"),
    "zero3": ({"deepspeed": zero(3)}, "DeepSpeedEngine"),
    "fsdp2": ({"fsdp": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}, "FSDP"),
}


def needs(backend: str) -> None:
    """Skip a test whose back-end is not installed."""
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install trl-dllm[deepspeed])")


def save_tiny(folder, dtype=torch.float32, **kwargs) -> str:
    """A checkpoint whose completions end at different places: its EOS is near to what all hidden states share."""
    model, tokenizer = tiny(**kwargs)
    with torch.no_grad():
        hidden = model(torch.arange(5, 61).view(7, 8), output_hidden_states=True).hidden_states[-1].mean(dim=(0, 1))
        model.lm_head.weight[tokenizer.eos_token_id] += 0.75 * len(hidden) ** 0.5 * hidden / hidden.norm()
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def launch(folder: Path, checkpoint: str, runs: dict, backend: dict | None = None, timeout: int = 300) -> list[dict]:
    """Both processes' results of all `runs`, done one after the other by one pair of processes.

    `backend` is `{"deepspeed": its config}`, `{"fsdp": its config}` or None for DDP. No end after `timeout` seconds is
    an error.
    """
    runs = {name: {"per_device_train_batch_size": 2, **settings} for name, settings in runs.items()}
    path = folder / "settings.json"
    path.write_text(
        json.dumps({"checkpoint": checkpoint, "folder": str(folder), "backend": backend or {}, "runs": runs})
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    # --standalone lets torchrun choose a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, str(HERE / "distributed" / "worker.py"), str(path)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"no end after {timeout} s"
        finally:
            process.terminate()  # torchrun ends its workers, which are no members of its process group
            process.wait()
    assert code == 0, f"exit {code}\n" + log.read_text()[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


class RecordingTrainer(DiffusionGRPOTrainer):
    """Keeps the rollouts of its process and the head tiles of its views, and counts DDP's reductions."""

    def __init__(self, *args, **kwargs):
        self.rollouts, self.views, self.tiles, self.prompt_tokens = [], [], [], []
        self.reductions, self.wrappers = 0, set()
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        names = ("view_seed", "completion_ids", "unmask_step", "advantages")
        rows = zip(*(outputs[name].tolist() for name in names), strict=True)
        self.rollouts.append([[self.state.global_step, *row] for row in rows])
        self.prompt_tokens.append(int(outputs["prompt_mask"].sum()))
        return outputs

    def _plan(self, *args):
        plan, run = super()._plan(*args)
        self.views.append([max(1, len(plan)), run])
        return plan, run

    def _score_view(self, *args, **kwargs):
        scores = super()._score_view(*args, **kwargs)
        self.tiles.append(max(1, -(-int(scores.scored.sum()) // head.TILE_ROWS)))
        return scores

    def training_step(self, model, *args, **kwargs):
        if isinstance(model, DistributedDataParallel) and not self.wrappers:
            model.register_comm_hook(self, _count_and_reduce)
        self.wrappers.add(type(model).__name__)
        return super().training_step(model, *args, **kwargs)


def _count_and_reduce(trainer, bucket):
    if bucket.is_last():
        trainer.reductions += 1
    summed = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda future: future.value()[0] / torch.distributed.get_world_size())


@contextmanager
def tiles_of(rows: int | None) -> Iterator[None]:
    """Tiny batches in many head tiles, so that processes need different numbers of them."""
    before = head.TILE_ROWS
    head.TILE_ROWS = rows or before
    try:
        yield
    finally:
        head.TILE_ROWS = before


def weights_of(trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """The trainable weights, gathered from all processes; a collective where they are sharded."""
    found = weights_of(trainer)
    partitioned = [p for p in found.values() if hasattr(p, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            return {name: p.detach().clone() for name, p in found.items()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in found.items()}


def saved(folder, trainer, wrappers: set[str]) -> dict:
    """Where the final weights are, what wrapped the model, and which part of its parameters is sharded."""
    path = Path(folder) / f"weights{trainer.args.process_index}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(whole_weights(trainer), path)
    sharded = [isinstance(p, DTensor) or hasattr(p, "ds_id") for p in trainer.model.parameters()]
    return {"weights": str(path), "wrapper": sorted(wrappers), "sharded": sum(sharded) / len(sharded)}


@contextmanager
def unpacked() -> Iterator[None]:
    """On a CPU with avx512_bf16 a 4-bit forward without gradients would repack the weights for inference, for good."""
    import bitsandbytes

    forward = bitsandbytes.nn.Linear4bit.forward

    def forward_unpacked(self, x):
        self.support_avx512bf16_for_cpu = False
        return forward(self, x)

    bitsandbytes.nn.Linear4bit.forward = forward_unpacked
    try:
        yield
    finally:
        bitsandbytes.nn.Linear4bit.forward = forward


def run(
    folder,
    checkpoint: str,
    peft: bool = False,
    quantized: str | None = None,
    adapted: bool = False,
    evaluate: bool = False,
    prompts: list[str] | None = None,
    tile_rows: int | None = None,
    **settings,
) -> dict:
    """Two generation cycles of two inner iterations; what the run did, as plain values.

    `quantized` names the dtype that 4-bit weights are packed into.
    """
    settings = {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "beta": 0.04,
        "p_mask_prompt": 0.15,
        "learning_rate": 0.01,
        "optim": "sgd",  # Adam turns the sign of a rounding error into a full step
        "ddp_timeout": 60,
        **settings,
    }
    # Both matrices random, so that every adapter weight has a gradient from the first step.
    adapter = lora(init_lora_weights=False, lora_alpha=2) if peft else False
    model = checkpoint
    if adapted:  # a model that brings an adapter: TRL keeps a copy of it as the reference
        with torch.random.fork_rng():
            torch.manual_seed(5)
            loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
            model = get_peft_model(loaded, lora(init_lora_weights=False, lora_alpha=2))
    if evaluate:
        settings |= {
            "eval_dataset": text_prompts(1),
            "per_device_eval_batch_size": settings["per_device_train_batch_size"],
        }
    if quantized:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=quantized,
        )
    if prompts is not None:
        settings["data"] = Dataset.from_dict({"prompt": prompts * (32 // len(prompts))})
    with tiles_of(tile_rows), unpacked() if quantized else nullcontext():
        trainer = build(folder, RecordingTrainer, model=model, peft=adapter, **settings)
        if quantized:  # whose adapters TRL makes in bfloat16: its rounding would hide everything else
            for p in weights_of(trainer).values():
                p.data = p.data.float()
        trainer.train()
        evaluated = trainer.evaluate() if evaluate else {}
    return {
        **saved(folder, trainer, trainer.wrappers),
        "eval": {name: value for name, value in evaluated.items() if name in ("eval_loss", "eval_kl", "eval_reward")},
        "tiles": trainer.tiles,
        "prompt_tokens": trainer.prompt_tokens,
        "loss": losses(trainer),
        "grad_norm": [float(value) for value in losses(trainer, "grad_norm")],
        "kl": losses(trainer, "kl"),
        "rollouts": trainer.rollouts,
        "reductions": trainer.reductions,
        "views": trainer.views,
    }


def run_rows(folder, checkpoint: str, rows: list[int], cache: str | None = None, **settings) -> dict:
    """Completions of as many prompts as `rows` says of each process, whose sampler asks the others."""
    settings |= {"decoding": "any_order" if cache else "denoising", "cache": cache}
    trainer = build(folder, model=checkpoint, max_steps=1, ds3_gather_for_generation=False, ddp_timeout=60, **settings)
    trainer.train()  # which prepares the model
    mine = slice(*((0, rows[0]) if trainer.args.process_index == 0 else (rows[0], sum(rows))))
    ids = torch.arange(5, 5 + 3 * sum(rows)).view(-1, 3)[mine]
    seeds = torch.arange(sum(rows))[mine]
    rollout = generate(
        trainer.model_wrapped, ids, ids.bool(), trainer.sampling, seeds=seeds, still_running=trainer._any_process
    )
    return {"completions": rollout.completion_ids.tolist(), "forwards": rollout.num_forwards}


def run_sft(folder, checkpoint: str, peft: bool = False, **settings) -> dict:
    """Supervised fine-tuning on rows of different lengths: losses, TRL's metrics and ours, final weights."""
    prompts = ["copy abc:", "x:", "", "12345678 :", "q", "copy:", "ab", "a longer prompt"]
    answers = ["abc", "a longer answer", "b", "1", "yes, no", "0123456789", "", "xyz"]
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.01,
        "optim": "sgd",
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "per_device_eval_batch_size": settings["per_device_train_batch_size"],
        "seed": 11,
        "ddp_timeout": 60,
    }
    data = Dataset.from_dict({"prompt": prompts * 4, "completion": answers * 4})
    trainer = DiffusionSFTTrainer(
        checkpoint,
        DiffusionSFTConfig(str(folder), **{**defaults, **settings}),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        peft_config=lora(init_lora_weights=False, lora_alpha=2) if peft else None,
    )
    before = {name: p.detach().clone() for name, p in weights_of(trainer).items()}
    trainer.train()
    names = ("loss", "grad_norm", "masked_fraction", "entropy", "num_tokens")
    # Before the evaluation, which leaves FSDP's last unit gathered.
    found = saved(folder, trainer, {type(trainer.model_wrapped).__name__})
    if found["sharded"] == 0:
        assert any(not torch.equal(before[name], p) for name, p in weights_of(trainer).items())
    evaluated = trainer.evaluate()
    return {
        **found,
        **{name: [float(value) for value in losses(trainer, name)] for name in names},
        "eval": {name: evaluated[f"eval_{name}"] for name in ("loss", "masked_fraction", "entropy")},
    }


def run_in_memory(folder, checkpoint: str, **settings) -> dict:
    """Full fine-tuning with a reference, on a model that was made in memory: TRL loads the reference by name."""
    model, tokenizer = tiny(num_layers=2)
    trainer = build(folder, model=model, tokenizer=tokenizer, beta=0.04, max_steps=2, ddp_timeout=60, **settings)
    initial = tiny(num_layers=2)[0].state_dict()
    found = trainer.ref_model.state_dict()
    same = initial.keys() == found.keys() and all(torch.equal(initial[name], found[name]) for name in initial)
    trainer.train()
    return {"reference": same, "kl": losses(trainer, "kl")}


def run_broken(folder, checkpoint: str, **settings) -> dict:
    """Only the last process scores a row that is not finite."""
    trainer = build(folder, model=checkpoint, max_steps=2, ddp_timeout=60, **settings)
    score = trainer._score_view

    def scoring(*args, **kwargs):
        scores = score(*args, **kwargs)
        broken = torch.is_grad_enabled() and trainer.accelerator.is_last_process and trainer.state.global_step == 1
        return scores.map(lambda table: table * torch.nan) if broken else scores

    trainer._score_view = scoring
    try:
        trainer.train()
    except FloatingPointError as error:
        finite = all(value.isfinite().all().item() for value in weights(trainer).values())
        return {"error": str(error), "finite": finite, "steps": trainer.state.global_step}
    return {"error": None}


def run_resumed(folder, checkpoint: str, peft: bool = False, steps=(1, 2, 3), **settings) -> dict:
    """A run, and the same one resumed from some of its checkpoints: whether each is the first, bit for bit."""

    def make():
        return build(
            folder,
            model=checkpoint,
            peft=peft,
            beta=0.04,
            p_mask_prompt=0.15,
            num_iterations=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            ddp_timeout=60,
            **settings,
        )

    whole = make()
    whole.train()
    found = {"flops": whole.flops.counted, "same": []}
    for step in steps:
        resumed = make()
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        equal = all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
        found["same"].append([equal, history(resumed) == history(whole), resumed.flops == whole.flops])
    return found


def run_dpo(folder, checkpoint: str, rows: str, peft: bool = False, **settings) -> dict:
    """Preference optimisation on the pairs in folder `rows`: losses, TRL's metrics, final weights."""
    defaults = {
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "per_device_eval_batch_size": settings["per_device_train_batch_size"],
        "ddp_timeout": 60,
        "model_init_kwargs": {"dtype": "auto"},
    }
    trainer = DiffusionDPOTrainer(
        checkpoint,
        args=dpo_config(folder, **{**defaults, **settings}),
        train_dataset=load_from_disk(rows),
        eval_dataset=load_from_disk(rows).select(range(8)),
        peft_config=lora(init_lora_weights=False, lora_alpha=2) if peft else None,
    )
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "num_tokens", "rewards/margins", "rewards/accuracies", "logps/chosen")
    # Before the evaluation, which leaves FSDP's last unit gathered.
    found = saved(folder, trainer, {type(trainer.model_wrapped).__name__})
    evaluated = trainer.evaluate()
    return {
        **found,
        **{name: [float(value) for value in losses(trainer, name)] for name in names},
        "eval": {name: evaluated[f"eval_{name}"] for name in ("loss", "rewards/margins", "logps/rejected")},
    }
