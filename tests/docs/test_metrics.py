"""docs/metrics.md explains every name that tiny runs of the trainers log, and no other."""

import re
from pathlib import Path

import helpers_dpo
import helpers_grpo
from datasets import Dataset

from trl_dllm import DiffusionSFTConfig, DiffusionSFTTrainer


PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()

# What makes each of GRPO's names appear, with a canvas on which some rows are cut off.
GRPO = [
    {"beta": 0.1, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": helpers_grpo.text_prompts(1)},
    {"beta": 0.1, "kl_estimator": "full", "cache": "prefix", "estimator": "exact_trajectory"},
    {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 0.5},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "vespo", "steps_per_generation": 2},
]


def names(heading: str) -> set[str]:
    """The names in the first cells of a section's tables."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.M)
    found = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(set(found)) == len(found), f"{heading}: a name has two rows"
    return set(found)


def logged(*trainers) -> set[str]:
    """What the runs logged, without `eval_` in front; the reward function's own name is `{function}`."""
    found: set[str] = set()
    for trainer in trainers:
        trainer.train()
        found |= {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    return {re.sub(r"^rewards/reward/", "rewards/{function}/", name) for name in found}


def test_grpo(tmp_path):
    runs = [helpers_grpo.build(tmp_path / str(n), **settings) for n, settings in enumerate(GRPO)]
    assert logged(*runs) == names("Every trainer") | names("GRPO")


def test_sft(tmp_path):
    model, tokenizer = helpers_grpo.tiny()
    data = Dataset.from_dict({"prompt": ["ab", "x:"] * 4, "completion": ["abc", "a longer answer"] * 4})
    args = DiffusionSFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", logging_steps=1, max_steps=1, eval_strategy="steps"
    )
    run = DiffusionSFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    assert logged(run) == names("Every trainer") | names("SFT")


def test_dpo(tmp_path):
    run = helpers_dpo.build(tmp_path, eval_strategy="steps", eval_dataset=helpers_dpo.pairs(1))
    assert logged(run) == names("Every trainer") | names("DPO")


def test_every_row_says_what_it_is_and_when_it_is_there():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    assert all(len(row) == 5 and row[1] and row[3] for row in rows)
