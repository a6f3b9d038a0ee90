"""What the DPO tests share: pairs of different lengths, and a trainer on the tiny sharp model.

Import it as `from helpers_dpo import …`; pytest puts this folder on the path.
"""

import torch
from datasets import Dataset
from helpers_grpo import lora, tiny

from trl_dllm import DiffusionDPOConfig, DiffusionDPOTrainer
from trl_dllm.likelihood import TokenScores


torch.set_num_threads(1)

# Rows differ in prompt, chosen and rejected length: equal rows would hide wrong masks, sums and normalisers.
PROMPTS = ["copy abc:", "x:", "q", "12345678 :", "copy:", "ab", "y=", "a longer prompt"]
CHOSEN = ["abc", "a longer answer", "1", "8", "yes, no", "0123456789", "b", "xyz"]
REJECTED = ["cab, or so", "no", "not this", "87654321", "no", "9", "bb", "zyx, wv"]


def pairs(repeats: int = 2) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeats, "chosen": CHOSEN * repeats, "rejected": REJECTED * repeats})


def config(folder, **kwargs) -> DiffusionDPOConfig:
    """One micro-batch of four pairs a step, three draws."""
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "optim": "sgd",  # Adam turns the sign of a rounding error into a full step
        "seed": 3,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "num_samples": 3,
        "max_grad_norm": 0.0,
    }
    return DiffusionDPOConfig(str(folder), **{**settings, **kwargs})


def build(folder, trainer_class=DiffusionDPOTrainer, model=None, peft=False, data=None, **kwargs):
    """A trainer on the tiny model; keywords that the trainer itself takes go to it, the others to the config."""
    own = {k: kwargs.pop(k) for k in ("eval_dataset", "callbacks", "ref_model") if k in kwargs}
    made, tokenizer = tiny()
    return trainer_class(
        made if model is None else model,
        args=config(folder, **kwargs),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer,
        peft_config=(lora() if peft is True else peft) or None,
        **own,
    )


class OneGraphTrainer(DiffusionDPOTrainer):
    """The control: TRL's loss on one graph through all draws."""

    def _segmented_loss(self, model, views, score, loss):
        return loss(TokenScores.sum(map(score, range(views))), record=True)


def batch_of(trainer, rows: int | None = None) -> dict[str, torch.Tensor]:
    """The first rows of the trainer's data as its collator makes them."""
    data = trainer.train_dataset
    return trainer.data_collator([data[i] for i in range(len(data) if rows is None else rows)])
