"""Running a task on a model: batched, resumable, every generation kept."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .generation import DiffusionGenerationConfig, generate
from .models import MaskedDiffusionSpec
from .noise import Purpose, hash64
from .tasks import Task


GENERATIONS = "generations.jsonl"
SUMMARY = "summary.json"


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson's score interval)."""
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def tokenize_prompts(tokenizer, prompts: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids (B, P) and mask (B, P) of text or conversational prompts, tokenized as TRL does in training."""
    if prompts and not isinstance(prompts[0], str):
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
            for prompt in prompts
        ]
    else:
        ids = [tokenizer(text=prompt)["input_ids"] for prompt in prompts]
    width = max((len(row) for row in ids), default=0)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], dtype=torch.bool)
    return padded.view(len(ids), width), mask.view(len(ids), width)


def evaluate(
    model,
    tokenizer,
    task: Task,
    dataset,
    config: DiffusionGenerationConfig,
    output_dir: str | Path,
    batch_size: int = 32,
    seed: int = 0,
    settings: dict | None = None,
) -> dict:
    """Draw one completion a row of `dataset`, score it, and summarise.

    Every generation is appended to `generations.jsonl` as soon as its batch is done. An evaluation that was
    interrupted goes on behind its last whole batch and ends with the same file as an undisturbed one; one with other
    settings is refused.

    Args:
        config (`DiffusionGenerationConfig`): decoding settings.
        output_dir (`str`): where `generations.jsonl` and `summary.json` are written.
        seed (`int`): rows draw from hashes of it and their number.
        settings (`dict`, *optional*): further facts for the summary (model name, split, …).

    Returns:
        The summary: `solve_rate` with its 95 % interval `low`, `high`, `n`, and all settings.

    Raises:
        ValueError: `output_dir` holds an evaluation with other settings.
    """
    from tqdm import tqdm

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **(settings or {}),
        "task": task.name,
        "n": len(dataset),
        "batch_size": batch_size,
        "seed": seed,
        "generation": asdict(config),
    }
    done = _resume(folder, settings, batch_size)
    start, spec = time.time(), MaskedDiffusionSpec.from_model(model, tokenizer)
    device = next(model.parameters()).device
    with (folder / GENERATIONS).open("a") as file:
        progress = tqdm(total=len(dataset), initial=done, desc=f"evaluating {task.name}", unit="row")
        for first in range(done, len(dataset), batch_size):
            rows = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
            ids, mask = tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
            numbers = torch.arange(first, first + len(rows), device=device)
            rollout = generate(
                model, ids.to(device), mask.to(device), config, hash64(seed, Purpose.EVALUATION, numbers), spec
            )
            completions = [
                row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.counted, strict=True)
            ]
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            for number, row, text, steps in zip(
                range(first, first + len(rows)), rows, texts, rollout.num_steps, strict=True
            ):
                record = {"row": number, "prompt": row["prompt"], "completion": text, **task.score(text, row)}
                file.write(json.dumps({**record, "steps": int(steps)}) + "\n")
            file.flush()
            progress.update(len(rows))
        progress.close()
    records = [json.loads(line) for line in (folder / GENERATIONS).read_text().splitlines()]
    correct = sum(bool(record["correct"]) for record in records)
    low, high = wilson_interval(correct, len(records))
    summary = {
        "solve_rate": correct / max(1, len(records)),
        "low": low,
        "high": high,
        "correct": correct,
        "total": len(records),
        "seconds": round(time.time() - start, 1),
        **settings,
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _resume(folder: Path, settings: dict, batch_size: int) -> int:
    """Rows already evaluated; drops what an interruption left of a batch, so that batches are cut as before."""
    marker, generations = folder / "settings.json", folder / GENERATIONS
    settings = json.loads(json.dumps(settings))
    if marker.exists() and generations.exists():
        before = json.loads(marker.read_text())
        if before != settings:
            changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            raise ValueError(
                f"output_dir={str(folder)!r} holds an evaluation with other settings ({', '.join(changed)} differ). "
                "Choose another folder, or delete that one."
            )
        lines = [line for line in generations.read_text().splitlines(keepends=True) if line.endswith("\n")]
        whole = len(lines) if len(lines) >= settings["n"] else len(lines) // batch_size * batch_size
        generations.write_text("".join(lines[:whole]))
        return whole
    marker.write_text(json.dumps(settings, indent=2) + "\n")
    generations.write_text("")
    return 0
