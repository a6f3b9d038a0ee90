"""A reward function of your own, on prompts of your own. Seconds on a CPU.

    python examples/own_reward.py

A reward is any function that TRL takes: it is given the completions and the columns of their rows, and returns a
number for each.
"""

from datasets import Dataset

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_dllm.models import create_tiny_model


def share_of_wanted(completions: list[str], wanted: list[str], **kwargs) -> list[float]:
    """Which part of a completion's eight characters are of the kind that its row asks for."""
    return [sum(c in row for c in text) / 8 for text, row in zip(completions, wanted, strict=True)]


rows = [("digits: ", "0123456789"), ("vowels, please: ", "aeiou")]
dataset = Dataset.from_list([{"prompt": prompt, "wanted": wanted} for prompt, wanted in rows] * 64)

model, tokenizer = create_tiny_model("llada")
trainer = DiffusionGRPOTrainer(
    model,
    reward_funcs=share_of_wanted,
    args=DiffusionGRPOConfig(
        "runs/examples/own_reward",
        max_completion_length=8,
        block_length=8,
        diffusion_steps=4,
        estimator="mean_field",  # one forward
        beta=0.0,
        loss_type="dr_grpo",
        num_generations=16,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        max_steps=40,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
)
trainer.train()

rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"wanted characters: {rewards[0]:.2f} in the first step, {rewards[-1]:.2f} in the last")
