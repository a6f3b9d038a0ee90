"""A tiny LLaDA learns 4x4 Sudoku by SFT, then improves by GRPO with d2-StepMerge. About a minute on a CPU.

    python examples/sudoku.py

For a checkpoint of yours give its name in place of the model: `DiffusionGRPOTrainer("GSAI-ML/LLaDA-8B-Instruct", …)`.
"""

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.models import create_tiny_model
from trl_dllm.tasks import get_task


model, tokenizer = create_tiny_model("llada")
task = get_task("sudoku")
on_a_cpu = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}

sft = DiffusionSFTTrainer(
    model,
    DiffusionSFTConfig(
        "runs/examples/sudoku_sft",
        canvas_length=17,  # 16 digits and an EOS
        loss_weight="none",
        learning_rate=4e-3,
        max_steps=150,
        per_device_train_batch_size=64,
        logging_steps=25,
        **on_a_cpu,
    ),
    train_dataset=task.load("train", 4096, min_blanks=4, max_blanks=6),
    processing_class=tokenizer,
)
sft.train()

grpo = DiffusionGRPOTrainer(
    model,
    reward_funcs=task.rewards["cells"],  # the share of empty cells that are filled in correctly
    args=DiffusionGRPOConfig(
        "runs/examples/sudoku_grpo",
        max_completion_length=17,  # the canvas
        block_length=17,
        diffusion_steps=8,  # two tokens a step
        estimator="step_merge",
        num_segments=4,
        loss_type="dr_grpo",
        num_generations=8,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        max_steps=15,
        logging_steps=1,
        **on_a_cpu,
    ),
    train_dataset=task.load("train", 2048, min_blanks=4, max_blanks=6),
    processing_class=tokenizer,
)
grpo.train()

rewards = [entry["reward"] for entry in grpo.state.log_history if "reward" in entry]
print(f"cells solved: {sum(rewards[:5]) / 5:.2f} in the first five steps, {sum(rewards[-5:]) / 5:.2f} in the last")
