"""Every number of a paper's recipe has a reason: beside it, in its head, or in that of the recipe it refers to."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_dllm.recipe import RECIPES, find_recipe, recipe_paths


PUBLISHED = [name for name in recipe_paths() if not name.startswith(("tiny_", "smollm2/"))]  # which are ours
# How often a run saves, logs and evaluates, how long it lasts, how its batch is split and how data is cut: heads speak
# of batches, and a reader changes the rest.
RHYTHM = {
    *("max_steps", "num_train_epochs", "save_steps", "save_total_limit", "logging_steps", "eval_steps", "seed"),
    *("num_train_examples", "num_eval_examples", "gradient_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
}
WORDS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "eight": 8,
    "tenth": 0.1,
    "half": 0.5,
    "no": 0,
    "without": 0,
    "neither": 0,
}


def comments(path: Path) -> str:
    return " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))


def said(text: str) -> set[float]:
    """The numbers in a text, in digits, as percentages or in words."""
    numbers = {float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)}
    words = {value for word, value in WORDS.items() if re.search(rf"\b{word}\b", text, re.I)}
    return numbers | words | {float(number) / 100 for number in re.findall(r"(\d+(?:\.\d+)?) ?%", text)}


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def without_reason(path: Path) -> list[str]:
    head = comments(path)
    before = head.partition("Notice:")[0]
    others = {name for name in recipe_paths() if re.search(rf"\b{name}\b", before)}
    others |= {path for path in path.parent.glob("config_*.yaml") if re.search(rf"\b{path.stem[7:]}\b", before)}
    known = said(head + " ".join(comments(find_recipe(str(other))) for other in others))
    beside = set(re.findall(r"^(\w+): [^#\n]*#", path.read_text(), re.M))
    settings = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name not in RHYTHM | beside}
    return [f"{name}: {value}" for name, value in settings.items() if set(numbers(value)) - known]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_has_a_reason(name):
    assert without_reason(find_recipe(name)) == [], "say in the head, or in a comment beside it, whose number it is"


def test_a_number_without_one_is_found(tmp_path):
    path = tmp_path / "config_x.yaml"
    path.write_text("# Ours: beta 0.04, 15 % of the prompt, two draws.\nbeta: 0.04\nepsilon: 0.3  # a guess\n")
    assert without_reason(path) == []
    path.write_text(path.read_text() + "p_mask_prompt: 0.15\nestimator_kwargs: {num_samples: 2}\nlora_r: 7\n")
    assert without_reason(path) == ["lora_r: 7"]


def test_the_paper_index_explains_what_most_recipes_share():
    page = (RECIPES.parent / "docs" / "paper_index.md").read_text().partition("## Why each number")[2]
    explained = {name for row in re.findall(r"^\| (`[^|]*) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    shared = yaml.safe_load((RECIPES / "llada_8b/grpo/_base.yaml").read_text())
    where = {"model_name_or_path", "task", "dtype", "bf16", "attn_implementation", "use_peft"}
    where |= {"report_to", "resume_from_checkpoint"}
    assert shared.keys() - where == explained
