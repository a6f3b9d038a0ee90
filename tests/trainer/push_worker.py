"""Trains one step on a Hub that the environment names, and pushes: `push_worker.py FOLDER CHECKPOINT KIND`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))

from helpers_grpo import build


def main(folder: str, checkpoint: str, kind: str) -> None:
    trainer = build(
        folder,
        model=checkpoint,
        peft=kind == "lora",
        learning_rate=1e-4,
        push_to_hub=True,
        hub_model_id="me/model",
        save_strategy="steps",
        save_steps=1,
        trace_steps=1,
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="me/prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
