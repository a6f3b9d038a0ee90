"""Running a task on a model: batched, resumable, on any number of processes, every generation kept."""

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .fingerprint import FINGERPRINT, Difference, Fingerprint, differences, in_a_line, refuse
from .generation import DiffusionGenerationConfig, generate
from .identity import dataset_hash, hash_files, module_identity
from .models import MaskedDiffusionSpec, unwrap
from .models.spec import check_positions
from .noise import Purpose, hash64
from .processes import on_main_process, process_state, say
from .rollout import Rollout, left_pad
from .tasks import Task


GENERATIONS = "generations.jsonl"
SUMMARY = "summary.json"
PARTS = "parts"  # one file a finished batch, until all are there

# Facts of the machine that files of batches depend on: which rows are in one, and how a forward rounds.
_NUMERICS = ("batch_size", "dtype")


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson's score interval)."""
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(correct: list[int], samples: int, k: int) -> dict[str, float]:
    """Unbiased pass@k with a 95 % interval over rows, of rows with `correct` right answers among `samples` each.

    One sample a row gets Wilson's interval; more get the normal one from the spread between rows.
    """
    rates = [1 - math.comb(samples - right, k) / math.comb(samples, k) for right in correct]
    mean = sum(rates) / max(1, len(rates))
    if samples == 1:
        low, high = wilson_interval(sum(correct), len(correct))
    else:
        spread = sum((rate - mean) ** 2 for rate in rates) / max(1, len(rates) - 1)
        half = 1.959964 * math.sqrt(spread / max(1, len(rates)))
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"value": mean, "low": low, "high": high}


def tokenize_prompts(tokenizer, prompts: list, prefill: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids (B, P) and mask (B, P) of text or conversational prompts, tokenized as TRL does in training.

    `prefill` is put behind each prompt, as the beginning of the answer.
    """
    if prompts and not isinstance(prompts[0], str):
        rows = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
            for prompt in prompts
        ]
    else:
        rows = [tokenizer(text=prompt)["input_ids"] for prompt in prompts]
    start = tokenizer(text=prefill, add_special_tokens=False)["input_ids"] if prefill else []
    rows = [[*row, *start] for row in rows]
    return left_pad(rows, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def complete(
    model,
    tokenizer,
    prompts: list,
    config: DiffusionGenerationConfig,
    seeds: torch.Tensor,
    prefill: str = "",
    stop_strings: Sequence[str] = (),
    **kwargs,
) -> tuple[list[str], Rollout]:
    """Complete text or conversational prompts: texts up to the first EOS, and the rollout that they come from.

    Args:
        seeds (`Tensor` of shape (B,), int64): the rows' own.
        stop_strings (`Sequence[str]`): a text ends behind the first of these, and its row is not decoded beyond the
            block in which it stands.
        **kwargs: for `generate`.
    """

    def found(text: str) -> int | None:
        """Where the text ends, behind the first stop string."""
        ends = [text.index(stop) + len(stop) for stop in stop_strings if stop in text]
        return min(ends, default=None)

    if stop_strings:
        kwargs["stop"] = lambda ids: found(tokenizer.decode(ids, skip_special_tokens=True)) is not None
    device = next(model.parameters()).device
    ids, mask = tokenize_prompts(tokenizer, prompts, prefill)
    rollout = generate(model, ids.to(device), mask.to(device), config, seeds.to(device), **kwargs)
    completions = [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.counted, strict=True)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [text[: found(text)] for text in texts], rollout


def evaluation_fingerprint(
    identity: Mapping,
    task: Task,
    dataset,
    config: DiffusionGenerationConfig,
    batch_size: int = 32,
    seed: int = 0,
    num_samples: int = 1,
    parser: str = "default",
    prefill: str = "",
    settings: Mapping | None = None,
    machine: Mapping | None = None,
) -> Fingerprint:
    """What an evaluation belongs to: the model by its content, the rows, decoding, draws and scoring.

    Args:
        identity (`dict`): from `model_identity` or `module_identity`.
        settings, machine and the others: as in `evaluate`.
    """
    meaning = {
        "command": "eval",
        **(settings or {}),
        **identity,
        "task": task.name,
        "n": len(dataset),
        "rows": dataset_hash(dataset),
        "num_samples": num_samples,
        "seed": seed,
        "parser": parser,
        "prefill": prefill,
        "generation": asdict(config),
    }
    return Fingerprint(meaning, machine={**(machine or {}), "batch_size": batch_size})


def evaluate(
    model,
    tokenizer,
    task: Task,
    dataset,
    config: DiffusionGenerationConfig,
    output_dir: str | Path,
    batch_size: int = 32,
    seed: int = 0,
    num_samples: int = 1,
    parser: str = "default",
    prefill: str = "",
    settings: Mapping | None = None,
    machine: Mapping | None = None,
    identity: Mapping | None = None,
    stop_strings: Sequence[str] = (),
) -> dict:
    """Draw completions of each row of `dataset`, score them, and summarise.

    Each finished batch is a file of its own until all are there, so an evaluation that was killed goes on where it was
    and ends with the same `generations.jsonl` as an undisturbed one; one of another model, of other rows or with other
    settings is refused. Under `accelerate launch` the batches are dealt out to the processes, which changes no draw.

    Args:
        model: a masked diffusion model; not touched where all generations are there and `identity` is given.
        config (`DiffusionGenerationConfig`): decoding settings.
        output_dir (`str`): where `generations.jsonl`, `summary.json` and `fingerprint.json` are written.
        seed (`int`): a completion draws from a hash of it, its row's number and its sample's.
        num_samples (`int`): completions a row; pass@k is given for the powers of two up to it.
        parser (`str`): which of the task's parsers scores.
        prefill (`str`): beginning of each answer, put behind the prompt and scored with it.
        settings (`dict`, *optional*): further facts that the result depends on (split, …).
        machine (`dict`, *optional*): further facts for the summary that it does not depend on (the model's path, …).
        identity (`dict`, *optional*): the model's and the tokenizer's, from `model_identity`; None reads every
            parameter once.
        stop_strings (`Sequence[str]`): each answer ends behind the first of these, see `complete`.

    Returns:
        The summary: `solve_rate` (pass@1) with its 95 % interval `low`, `high`, `n` rows, `correct` of `total`
        completions, `pass_at_k`, and all facts.

    Raises:
        ValueError: an unknown parser, or an `output_dir` that holds another evaluation; it names what differs.
    """
    from tqdm import tqdm

    state, folder, start = process_state(), Path(output_dir), time.time()
    score = _parser(task, parser)
    identity = identity or on_main_process(lambda: module_identity(model, tokenizer))
    if stop_strings:
        settings = {**(settings or {}), "stop_strings": list(stop_strings)}
    facts = (batch_size, seed, num_samples, parser, prefill, settings, machine)
    asked = evaluation_fingerprint(identity, task, dataset, config, *facts)
    fingerprint = open_evaluation(folder, asked)
    if changed := _changed_numerics(fingerprint, asked):
        say(f"{folder}: the generations are there already; {in_a_line(changed)} changes none of them.")
    draws = [(row, sample) for row in range(len(dataset)) for sample in range(num_samples)]
    batches = [draws[i : i + batch_size] for i in range(0, len(draws), batch_size)]
    todo = [] if (folder / GENERATIONS).exists() else range(state.process_index, len(batches), state.num_processes)
    spec = MaskedDiffusionSpec.from_model(model, tokenizer) if todo else None
    if todo:  # before hours have gone into the rows before one that is too long
        tokens = tokenize_prompts(tokenizer, [row["prompt"] for row in dataset], prefill)[1].sum(dim=1).tolist()
        for row, length in enumerate(tokens):
            check_positions(unwrap(model).config, length, config.max_new_tokens, "max_new_tokens", f"row {row}: ")
    progress = tqdm(todo, desc=f"evaluating {task.name}", unit="batch", disable=not state.is_main_process)
    for number in progress:
        part = folder / PARTS / f"{number:06d}.jsonl"
        if part.exists():
            continue
        rows = [dataset[row] for row, _ in batches[number]]
        keys = torch.tensor(batches[number])
        seeds = hash64(seed, Purpose.EVALUATION, keys[:, 0], keys[:, 1])
        prompts = [row["prompt"] for row in rows]
        texts, rollout = complete(model, tokenizer, prompts, config, seeds, prefill, stop_strings, spec=spec)
        lines = []
        for (row, sample), columns, text, steps in zip(batches[number], rows, texts, rollout.num_steps, strict=True):
            record = {"row": row, "sample": sample, "prompt": columns["prompt"], "completion": prefill + text}
            lines.append({**record, **score(prefill + text, columns), "steps": int(steps)})
        _write(part, lines)
    state.wait_for_everyone()
    if state.is_main_process and not (folder / GENERATIONS).exists():
        parts = [folder / PARTS / f"{number:06d}.jsonl" for number in range(len(batches))]
        _write(folder / GENERATIONS, [line for part in parts for line in _read(part)])
        shutil.rmtree(folder / PARTS)  # with what a killed process may have left half-written
    state.wait_for_everyone()
    summary = {
        **summarise(_read(folder / GENERATIONS), num_samples),
        "seconds": round(time.time() - start, 1),
        **fingerprint.meaning,
        **fingerprint.machine,
    }
    if state.is_main_process:
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def open_evaluation(folder: Path, fingerprint: Fingerprint) -> Fingerprint:
    """Make a folder ready for an evaluation, or check that what it holds belongs to the same one.

    Returns the fingerprint of the generations: the stored one where they are all there.

    Raises:
        ValueError: on every process, a folder that holds another evaluation or one that belongs to nothing known.
    """
    return on_main_process(lambda: _open(folder, fingerprint))


def _open(folder: Path, fingerprint: Fingerprint) -> Fingerprint:
    stored = _stored(folder, fingerprint)
    if stored is not None:
        if (folder / GENERATIONS).exists():
            return stored
        changed = _changed_numerics(stored, fingerprint)
        if changed and (folder / PARTS).exists():
            warnings.warn(f"{folder}: {in_a_line(changed)}, so its unfinished generations are drawn anew.")
            shutil.rmtree(folder / PARTS)
    fingerprint.write(folder)
    (folder / PARTS).mkdir(exist_ok=True)
    return fingerprint


def _changed_numerics(stored: Fingerprint, now: Fingerprint) -> list[Difference]:
    return [fact for fact in differences(stored.machine, now.machine) if fact[0] in _NUMERICS]


def _stored(folder: Path, fingerprint: Fingerprint) -> Fingerprint | None:
    """The fingerprint that a folder has, if any, which must say the same."""
    stored = Fingerprint.read(folder)
    what, remedies = f"output_dir={str(folder)!r} holds", "Nothing was changed. Choose another, or delete that folder."
    if stored is not None:
        refuse(f"{what} an evaluation", differences(stored.meaning, fingerprint.meaning), remedies)
    elif (folder / GENERATIONS).exists() or (folder / PARTS).exists():
        raise ValueError(f"{what} generations without a {FINGERPRINT}: whose they are is not known. {remedies}")
    return stored


def rescore(task: Task, stored: str | Path, output_dir: str | Path, parser: str = "default") -> dict:
    """Score outputs that were stored before, as JSON lines of `question`, `generations` and `ground_truth`.

    Returns the summary, also written to `output_dir`: `correct` of `total` (blanks, for Sudoku), the interval, and
    `other_parsers`, what the task's other parsers find in the same outputs.

    Raises:
        ValueError: a parser that the task does not have, a task without a form of stored outputs, or an `output_dir`
            that holds generations of another source.
    """
    score, folder = _parser(task, parser), Path(output_dir)
    if task.stored_row is None:
        raise ValueError(f"task={task.name!r} has no form of stored outputs to read.")
    fingerprint = Fingerprint(
        {"command": "eval --from_generations", "task": task.name, "stored": hash_files([Path(stored)])[Path(stored)]}
    )
    _stored(folder, fingerprint)
    fingerprint.write(folder)
    records, columns = [], []
    for number, stored_record in enumerate(_read(Path(stored))):
        try:
            row, text = task.stored_row(stored_record), stored_record["generations"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{stored}, line {number + 1}, has no {error}: a line is a mapping of question, generations and "
                "ground_truth."
            ) from error
        columns.append(row)
        text = text[0] if isinstance(text, list) else text
        records.append({"row": number, "completion": text, **score(text, row)})
    _write(folder / GENERATIONS, records)
    summary = {**summarise(records, 1), "task": task.name, "parser": parser, "from_generations": str(stored)}
    summary["other_parsers"] = {}
    for name, other in task.parsers.items():
        if name == parser:
            continue
        rows = [
            {**other(record["completion"], row), "row": i}
            for i, (record, row) in enumerate(zip(records, columns, strict=True))
        ]
        differ = [i for i, (a, b) in enumerate(zip(records, rows, strict=True)) if a["correct"] != b["correct"]]
        first = differ[0] if differ else None
        summary["other_parsers"][name] = {
            "correct": summarise(rows, 1)["correct"],
            "differ": len(differ),
            "first_difference": first,
        }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(records: Sequence[Mapping], num_samples: int) -> dict:
    """
    Solve rate, interval and pass@k of scored completions.

    A task with cells (Sudoku) gives cells as total; one that runs programs says how many of its tests were
    `judged_outside` the program's process and how many `judged_inside`, where a program can fool them.
    """
    right: dict[int, int] = {}
    for record in records:
        right[record["row"]] = right.get(record["row"], 0) + bool(record["correct"])
    powers = [2**i for i in range(num_samples.bit_length())]
    passes = {k: pass_at_k(list(right.values()), num_samples, k) for k in powers}
    cells = all("cells_total" in record for record in records) and bool(records)
    return {
        "solve_rate": passes[1]["value"],
        "low": passes[1]["low"],
        "high": passes[1]["high"],
        "correct": sum(record["cells_correct"] if cells else bool(record["correct"]) for record in records),
        "total": sum(record["cells_total"] for record in records) if cells else len(records),
        "pass_at_k": {str(k): value for k, value in passes.items()},
        **{
            key: sum(record[key] for record in records)
            for key in ("judged_outside", "judged_inside")
            if records and all(key in record for record in records)
        },
    }


def _parser(task: Task, name: str):
    if name not in task.parsers:
        raise ValueError(f"parser={name!r}: task {task.name!r} has {', '.join(task.parsers)}.")
    return task.parsers[name]


def _read(path: Path) -> list[dict]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}.") from error
    return records


def _write(path: Path, records: list[dict]) -> None:
    """All of a file or none of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)
