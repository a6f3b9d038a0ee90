"""d2's and PADRE's comparisons on SmolLM2-135M and movie reviews, at equal counted operations.

    make language
    python benchmarks/language.py --flops 6e13 --seeds 0 1 2
    python benchmarks/language.py --draw

For each model (any-order in blocks of 1 or of 8: AnyOrder, StepMerge, diffu-GRPO and DDPO; masked diffusion: PKL,
PKL-U and diffu-GRPO), with three-word prompts or none, SFT makes a base; each method trains from it until its counted
operations (rollouts, reference and updates) reach `--flops`, and is then sampled on held-out prompts. A finished run
is a file of JSON lines in `benchmarks/language/`: its facts, one line a step, the held-out measures. What is there is
not run again, an interrupted run resumes, so the command can be stopped at any time; `--draw` draws the figure from
the files alone. Runs at low priority.
"""

import argparse
import json
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept_logs import is_done, read_log, write_log
from over_seeds import difference, over_seeds
from transformers import TrainerCallback

from trl_dllm.command import count
from trl_dllm.reports.plots import label_ends, pyplot, trailing_mean
from trl_dllm.scripts import grpo, sft
from trl_dllm.scripts.language import examine, prepare, train
from trl_dllm.tasks import get_task


@dataclass(frozen=True)
class Model:
    """A base that SFT makes, and what its methods change in their recipes."""

    title: str
    sft: str
    sft_steps: int
    methods: tuple[str, ...]
    changes: tuple[str, ...] = ()


RECIPES = {  # of the methods
    "AnyOrder": "reviews",
    "StepMerge, N = 4": "reviews_step_merge",
    "diffu-GRPO": "reviews_diffu_grpo",
    "DDPO": "reviews_ddpo",
    "masked diffu-GRPO": "reviews_masked_diffu_grpo",
    "PKL, 8 positions": "reviews_masked_pkl",
    "PKL-U, 8 at once": "reviews_masked_pkl_u",
}
D2, PADRE = tuple(RECIPES)[:4], tuple(RECIPES)[4:]
OF_BLOCKS = ("--block_length", "8", "--learning_rate", "1e-4")
MODELS = {
    "blocks1": Model("any-order, blocks of 1", "smollm2/sft/reviews", 100, D2),
    "blocks8": Model("any-order, blocks of 8", "smollm2/sft/reviews_blocks", 1500, D2, OF_BLOCKS),
    "masked": Model("masked diffusion", "smollm2/sft/reviews_masked", 420, PADRE),
}
CLAIMS = (  # source, method, what it is compared with (None: the base), whether it is said to be the higher
    ("d2 Tab. 3", "AnyOrder", "StepMerge, N = 4", True),
    ("d2 Fig. 6", "AnyOrder", None, True),
    ("d2 Fig. 6", "AnyOrder", "diffu-GRPO", True),
    ("d2 Fig. 6", "diffu-GRPO", None, False),
    ("d2 Tab. 2", "AnyOrder", "DDPO", True),
    ("PADRE Tab. 1", "PKL, 8 positions", "masked diffu-GRPO", True),
    ("PADRE Tab. 1", "PKL-U, 8 at once", "masked diffu-GRPO", True),
    ("PADRE Tab. 1", "PKL, 8 positions", "PKL-U, 8 at once", True),
)
COLORS = dict(zip(D2 + PADRE, ("C0", "C1", "C2", "C3", "C2", "C4", "C5"), strict=True))
LOGGED = ("step", "flops", "flops_paper", "reward", "reward_std", "kl", "entropy", "grad_norm")
LENGTH = "completions/mean_length"


class StopAtFlops(TrainerCallback):
    """Ends a run once the operations that it has counted reach `budget`."""

    def __init__(self, budget: float):
        self.budget = budget

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (logs or {}).get("flops", 0) >= self.budget:
            control.should_training_stop = True
        return control


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, help="Operations that each method may take.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["blocks1"])
    parser.add_argument("--prompt_words", type=int, nargs="+", choices=[0, 3], default=[3, 0])
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--sft_steps", type=count, help="Of each base; default: 100, 1500 in blocks of 8, 420 masked.")
    parser.add_argument("--num_examples", type=count, default=64, help="Held-out prompts.")
    parser.add_argument("--model", type=Path, help="The model to start from; default: what make language converts.")
    parser.add_argument("--data_dir", type=Path, help="Where the texts are; default: what make language writes.")
    parser.add_argument("--runs", type=Path, default=Path("runs/language_comparison"), help="Models and checkpoints.")
    parser.add_argument("--logs", type=Path, default=Path(__file__).parent / "language", help="Kept logs.")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/language_vs_flops.png"))
    parser.add_argument("--threads", type=count, default=1, help="CPU threads.")
    parser.add_argument("--draw", action="store_true", help="Train nothing: draw the figure from the logs.")
    return parser


def log_path(logs: Path, facts: dict[str, Any]) -> Path:
    method = facts["recipe"].partition("reviews")[2].removeprefix("_masked").strip("_") or "any_order"
    return logs / f"{facts['model']}_words{facts['prompt_words']}_{method}_seed{facts['seed']}.jsonl"


def run(args: argparse.Namespace) -> None:
    """Train what is not there yet: seed by seed, so that the first seed of every method comes first."""
    model, data_dir = prepare(Path("runs/language"), args.model, args.data_dir)
    for seed in args.seeds:
        for name in args.models:
            for words in args.prompt_words:
                _run_arm(args, model, data_dir, name, words, seed)


def _run_arm(args: argparse.Namespace, start: Path, data_dir: Path, model: str, words: int, seed: int) -> None:
    arm = MODELS[model]
    sft_steps = args.sft_steps or arm.sft_steps
    folder = args.runs / f"{model}_words{words}"
    of_task = ["--task_kwargs", json.dumps({"prompt_words": words})]
    rows = get_task("reviews").load("test", args.num_examples, data_dir=str(data_dir), prompt_words=words)
    for name in [method for method in arm.methods if method in args.methods]:
        recipe = f"smollm2/grpo/{RECIPES[name]}"
        facts = {"method": name, "recipe": recipe, "model": model, "prompt_words": words, "seed": seed}
        facts |= {"flops_budget": args.flops, "sft_steps": sft_steps}
        path = log_path(args.logs, facts)
        if is_done(path, facts):
            continue
        # One base for all seeds: what differs between them is RL alone.
        base, steps = folder / "sft", ["--max_steps", str(sft_steps)]
        train(sft, arm.sft, start, data_dir, base, 0, *steps, *of_task, callbacks=[])
        began, output = time.time(), folder / path.stem
        more = [*arm.changes, *of_task, "--max_steps", "100000"]
        history = train(grpo, recipe, base, data_dir, output, seed, *more, callbacks=[StopAtFlops(args.flops)])
        before = examine(base, base, folder / "before", rows, seed=0, decoded_as=output)
        after = examine(output, base, folder / f"{path.stem}_after", rows, seed=0)
        samples = [json.loads(line) for line in (folder / f"{path.stem}_after" / "samples.jsonl").open()]
        steps = [
            {**{key: entry[key] for key in LOGGED if key in entry}, "length": entry[LENGTH]}
            for entry in history
            if "reward" in entry
        ]
        end = {
            "before": _measures(before),
            "after": _measures(after),
            "samples": samples[:10],
            "seconds_of_last_session": round(time.time() - began, 1),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        }
        write_log(path, facts, steps, end)
        for checkpoint in output.glob("checkpoint-*"):  # 0.8 GB each, which nothing will resume
            shutil.rmtree(checkpoint)


def _measures(summary: dict) -> dict:
    return {key: value for key, value in summary.items() if key != "of"}


def _error(measures: dict) -> float:
    """Standard error of a score over its completions."""
    return (measures["high"] - measures["low"]) / (2 * 1.96)


def _scores(runs: list[tuple], when: str = "after") -> dict[int, tuple[float, float]]:
    """By seed, the held-out score of one method's runs and its standard error."""
    return {facts["seed"]: (end[when]["mean"], _error(end[when])) for facts, _, end in runs}


def pooled(runs: list[tuple]) -> dict[str, float]:
    """Held-out measures at the end of one method's seeds: means, and the score's interval over seeds."""
    ends = [end["after"] for _, _, end in runs]
    mean = {key: sum(each[key] for each in ends) / len(ends) for key in ends[0]}
    values, errors = zip(*_scores(runs).values(), strict=True)
    score = over_seeds(values, errors)
    return {**mean, "low": score.low, "high": score.high}


def interval(measures: dict) -> str:
    return f"{measures['mean']:.2f} ({measures['low']:.2f} to {measures['high']:.2f})"


def _of(runs: list[tuple], **facts: Any) -> list[tuple]:
    return [run for run in runs if facts.items() <= run[0].items()]


def print_claims(runs: list[tuple], arms: list[tuple[str, int]]) -> None:
    """What the papers say, by the differences of held-out scores."""
    print("\n| claim | model | prompts | difference in score | |\n|---|---|---|---|---|")
    for source, one, other, more in CLAIMS:
        for model, words in arms:
            arm = _of(runs, model=model, prompt_words=words)
            ours = _of(arm, method=one)
            theirs = _scores(_of(arm, method=other)) if other else _scores(ours, "before")
            if found := difference(_scores(ours), theirs, one_base=other is None):
                said = f"{one} {'above' if more else 'no higher than'} {other or 'the base'}"
                verdict = found.verdict(more)
                print(f"| {source}: {said} | {MODELS[model].title} | {words or 'none'} | {found.text()} | {verdict} |")


def draw(logs: Path, figure_path: Path) -> list[tuple]:
    """Draw all finished runs, an arm a panel, and print their held-out measures.

    Returns the table's rows: model, prompt words, method, seeds, and mean held-out score before and after.
    """
    runs = [read_log(path) for path in sorted(logs.glob("*.jsonl"))]
    if not runs:
        raise ValueError(f"{logs} holds no log. Train first: python benchmarks/language.py --flops 6e13")
    arms = [(model, words) for model in MODELS for words in (3, 0) if _of(runs, model=model, prompt_words=words)]
    columns, rows = min(2, len(arms)), math.ceil(len(arms) / 2)
    size = (6.2 * columns, 3.8 * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, dpi=130, squeeze=False, sharey=True)
    for ax in axes.flat[len(arms) :]:
        ax.remove()
    table = []
    print("| model | prompts | method | seeds | steps | before | after | of each seed | distinct-2 | nats |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    panels = []
    for ax, (model, words) in zip(axes.flat, arms, strict=False):
        ends = []
        for name in MODELS[model].methods:
            found = _of(runs, model=model, prompt_words=words, method=name)
            if not found:
                continue
            lines = []
            for _, steps, _ in found:
                flops, reward = (np.array([step[key] for step in steps]) for key in ("flops", "reward"))
                lines.append((flops / 1e12, trailing_mean(reward, 5)))
                ax.plot(*lines[-1], color=COLORS[name], alpha=0.35, linewidth=1)
            grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines))
            mean = np.mean([np.interp(grid, *line) for line in lines], axis=0)
            ax.plot(grid, mean, color=COLORS[name], linewidth=2)
            ends.append((grid[-1], mean[-1], name.removeprefix("masked "), COLORS[name]))
            before, end = found[0][2]["before"], pooled(found)
            taken = sum(len(steps) for _, steps, _ in found) / len(found)
            table.append((model, words, name, len(found), before["mean"], end["mean"]))
            each = ", ".join(f"{one['after']['mean']:.2f}" for _, _, one in found)
            print(
                f"| {MODELS[model].title} | {words or 'none'} | {name} | {len(found)} | {taken:.0f} "
                f"| {interval(before)} | {interval(end)} | {each} "
                f"| {end['distinct_2']:.2f} | {before['cross_entropy']:.2f} to {end['cross_entropy']:.2f} |"
            )
        ax.set(xlabel="TFLOPs (counted)", xlim=(0, None))
        ax.set_title(f"{MODELS[model].title}, {f'{words}-word prompts' if words else 'no prompts'}", fontsize=10)
        ax.grid(alpha=0.3)
        panels.append((ax, ends))
    print_claims(runs, arms)
    for ax in axes[:, 0]:
        ax.set_ylabel("training reward (VADER), mean of the last 5 steps", fontsize=8)
    figure.tight_layout()
    figure.subplots_adjust(wspace=0.4, right=0.86)
    for ax, ends in panels:
        label_ends(ax, ends)
    figure_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(figure_path)
    pyplot().close(figure)
    return table


def main(args: argparse.Namespace) -> list[tuple]:
    if not args.draw:
        if not args.flops or args.flops <= 0:
            raise ValueError(f"--flops={args.flops} must be a positive number of operations, such as 6e13; or --draw.")
        torch.set_num_threads(args.threads)
        run(args)
    return draw(args.logs, args.figure)


if __name__ == "__main__":
    os.nice(10)
    main(make_parser().parse_args())
