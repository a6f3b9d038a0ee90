"""A likelihood of your own: measured against the exact one, then trained with. Seconds on a CPU.

    python examples/own_estimator.py

`BlockMeanField` scores a block of the canvas in one forward, with the blocks before it shown and those behind it
masked, as the sampler saw them when it began the block. docs/extending.md has an estimator that draws at random, and
the contract.
"""

import torch
from datasets import Dataset

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import Estimator, ExactTrajectory, MeanField, canvas_view, token_logps
from trl_dllm.models import create_tiny_model


class BlockMeanField(Estimator):
    def __init__(self, block_length: int):
        self.block_length = block_length

    def num_views(self, rollout):
        """Forwards of a row."""
        return rollout.completion_ids.shape[1] // self.block_length

    def view(self, rollout, n, seeds, iteration):
        """What the model is shown in forward n, and which tokens it is asked for: both (rows, canvas)."""
        block = torch.arange(rollout.completion_ids.shape[1]) // self.block_length
        visible = rollout.revealed & (block < n)
        scored = rollout.revealed & (block == n)
        return canvas_view(rollout, visible, scored)


model, tokenizer = create_tiny_model("llada")
with torch.no_grad():
    model.lm_head.weight.mul_(20)  # a fresh model is close to uniform, where all likelihoods agree
prompts = tokenizer(["1+2=", "a rather longer prompt"], return_tensors="pt", padding=True)
config = DiffusionGenerationConfig(16, block_length=4, diffusion_steps=16)
rollout = generate(model, prompts["input_ids"], prompts["attention_mask"], config)
with torch.no_grad():
    exact = token_logps(model, rollout, ExactTrajectory()).logps
    for name, estimator in (("mean field", MeanField()), ("block mean field", BlockMeanField(4))):
        gap = (token_logps(model, rollout, estimator).logps - exact)[rollout.counted].abs().mean()
        print(f"{name}: {gap:.3f} nats a token from the exact trajectory, {estimator.num_views(rollout)} forward(s)")

trainer = DiffusionGRPOTrainer(
    model,
    reward_funcs=lambda completions, **kwargs: [len(set(text)) / 16 for text in completions],
    args=DiffusionGRPOConfig(
        "runs/examples/own_estimator",
        max_completion_length=16,
        block_length=4,
        diffusion_steps=16,
        num_generations=8,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": ["1+2=", "b"] * 16}),
    processing_class=tokenizer,
    estimator=BlockMeanField(4),  # in a recipe: `estimator: my_module.BlockMeanField`
)
trainer.train()
