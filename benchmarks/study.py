"""The comparisons of d2 and PADRE on 4x4 Sudoku and Countdown with a tiny LLaDA, at equal counted operations.

    python benchmarks/study.py --seeds 0 1 2
    python benchmarks/study.py --draw

A base model is fine-tuned for each task and architecture (a masked denoiser, and an any-order model) and shared by all
methods and seeds. A method trains from it until its counted operations (rollouts and updates) reach the task's budget;
at a quarter, a half and all of it held-out puzzles are solved. A finished run is a file of JSON lines in
`benchmarks/study/`: its facts, one line a step, the held-out solve rates. What is there is not run again, so the
command can be stopped at any time; `--draw` draws the figures and prints the tables of docs/study.md from the files
alone. Runs at low priority.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from any_order_segments import AnyOrderSegments
from kept_logs import is_done, read_log, write_log
from over_seeds import Interval, difference, over_seeds
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_dllm.command import count
from trl_dllm.evaluation import complete
from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.likelihood import (
    BlockPseudoLikelihood,
    Elbo,
    Estimator,
    PseudoLikelihood,
    StepMerge,
    TrajectoryPseudoLikelihood,
)
from trl_dllm.noise import Purpose, hash64
from trl_dllm.reports.likelihood import exact_estimator, likelihood_report
from trl_dllm.reports.plots import label_ends, pyplot
from trl_dllm.scripts import grpo, init_tiny, sft
from trl_dllm.tasks import get_task


MARKS = (0.25, 0.5, 1.0)  # of the budget, at which held-out puzzles are solved
LOGGED = ("step", "flops", "reward", "reward_std", "entropy", "grad_norm")


@dataclass(frozen=True)
class StudyTask:
    """A task of the study: its recipes, and how its completions are decoded by all methods but JustGRPO."""

    name: str  # of its recipes too: tiny_llada/sft/NAME and tiny_llada/grpo/NAME, with _any_order behind it
    kwargs: dict[str, Any]
    length: int
    steps: int
    problems: int  # that are trained on
    sft_steps: tuple[int, int]  # of the denoiser and of the any-order model
    budget: float  # operations that each method may take
    rows: int  # completions a step, in groups of 8
    learning_rate: float
    sft_task: str | None = None  # whose demonstrations the bases see; None: the recipe's
    denoiser_second: bool = False  # the denoiser's SFT starts from the any-order base, which learns faster


TASKS = {
    task.name: task
    for task in (
        StudyTask(
            "sudoku",
            {"min_blanks": 6, "max_blanks": 10},
            length=17,
            steps=8,
            problems=4096,
            sft_steps=(750, 850),
            budget=4e11,
            rows=64,
            learning_rate=5e-4,
        ),
        StudyTask(
            "countdown",
            {"num_numbers": 3, "max_number": 9},
            length=8,
            steps=8,
            problems=1700,
            sft_steps=(1000, 1600),
            budget=2e11,
            rows=128,
            learning_rate=3e-4,
            sft_task="countdown_orders.TASK",
            denoiser_second=True,
        ),
    )
}


@dataclass(frozen=True)
class Method:
    """What a method changes of the task's recipe, which is d2-StepMerge on the denoiser or AnyOrder on the other."""

    name: str
    settings: dict[str, Any]
    any_order: bool = False
    left_to_right: bool = False

    @property
    def slug(self) -> str:
        text = self.name.lower().replace("⁺", "_plus").replace("n = ", "n").replace(",", "").replace("-", "_")
        return ("any_order_" if self.any_order else "") + text.replace("(", "").replace(")", "").replace(" ", "_")

    def overrides(self, task: StudyTask) -> dict[str, Any]:
        return self.settings | self.decoding(task)

    def decoding(self, task: StudyTask) -> dict[str, Any]:
        """How it draws completions in training, where that is not the task's way: one token a step."""
        order = {"remasking": "left_to_right", "block_length": 1, "diffusion_steps": task.length}
        return order if self.left_to_right else {}


_SEGMENTS = "any_order_segments.AnyOrderSegments"
_DDPO = {"scale_rewards": "group", "epsilon": 1e9, "loss_tokens": "canvas"}
METHODS = [
    Method("diffu-GRPO", {"estimator": "mean_field"}),
    Method("StepMerge, N = 2", {"estimator": "step_merge", "num_segments": 2}),
    Method("StepMerge, N = 4", {"estimator": "step_merge", "num_segments": 4}),
    Method("StepMerge, N = 8", {"estimator": "step_merge", "num_segments": 8}),
    Method("PKL", {"estimator": "pkl", "estimator_kwargs": {"num_positions": 4}}),
    Method("PKL⁺", {"estimator": "pkl", "estimator_kwargs": {"num_positions": 4}, "p_mask_prompt": 0.15}),
    Method("PKL-U", {"estimator": "pkl_u", "estimator_kwargs": {"block_size": 4, "num_views": 1}}),
    Method("PKL-T", {"estimator": "pkl_t"}),
    Method("diffu-GRPO⁺", {"estimator": "mean_field", "p_mask_prompt": 0.15}),
    Method("DDPO", {"estimator": "exact_trajectory", **_DDPO}),
    Method("wd1", {"estimator": "mean_field", "loss_type": "wd1"}),
    Method(
        "ELBO",
        {"estimator": "elbo", "estimator_kwargs": {"num_samples": 4}, "importance_sampling_level": "sequence"},
    ),
    Method("JustGRPO", {"estimator": "exact_trajectory", "scale_rewards": "group"}, left_to_right=True),
    Method("AnyOrder", {"estimator": "any_order"}, any_order=True),
    Method("diffu-GRPO", {"estimator": _SEGMENTS, "estimator_kwargs": {"num_segments": 1}}, any_order=True),
    Method("StepMerge, N = 4", {"estimator": _SEGMENTS, "estimator_kwargs": {"num_segments": 4}}, any_order=True),
    Method("DDPO", {"estimator": _SEGMENTS, "estimator_kwargs": {"num_segments": 8}, **_DDPO}, any_order=True),
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=sorted({m.slug for m in METHODS}), help="Default: all.")
    parser.add_argument("--scale", type=float, default=1.0, help="Factor on the tasks' budgets.")
    parser.add_argument("--learning_rate", type=float, help="Of every method; default: the task's.")
    parser.add_argument("--rows", type=count, help="Completions a step, in groups of 8; default: the task's.")
    parser.add_argument("--num_examples", type=count, default=500, help="Held-out puzzles.")
    parser.add_argument("--sft_steps", type=count, help="Of the bases; default: the task's.")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="Models.")
    parser.add_argument("--logs", type=Path, default=Path(__file__).parent / "study", help="Kept logs.")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--draw", action="store_true", help="Train nothing: figures and tables from the logs.")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def decoding(task: StudyTask, any_order: bool, **changes: Any) -> DiffusionGenerationConfig:
    """How completions are drawn for the solve rates: as in training, at temperature 1."""
    more = {"decoding": "any_order", "cache": "exact"} if any_order else {}
    settings = {"block_length": task.length, "diffusion_steps": task.steps, **more, **changes}
    return DiffusionGenerationConfig(max_new_tokens=task.length, temperature=1.0, stop_at_eos=False, **settings)


def held_out(task: StudyTask, number: int):
    """Puzzles that no training has seen: of the test split, and where that is too small of validation as well."""
    from datasets import concatenate_datasets

    load = get_task(task.name).load
    if task.name == "sudoku":
        return load("test", number, **task.kwargs)
    splits = [load("test", 200, **task.kwargs), load("validation", 170, **task.kwargs)]
    return concatenate_datasets(splits).select(range(min(number, 370)))


def solve_rate(model, tokenizer, task: StudyTask, rows, config, samples: int = 1) -> dict[str, Any]:
    """Solved and drawn completions of `rows`, `samples` of each, whose draws are the same for every model."""
    prompts = list(rows["prompt"]) * samples
    seeds, solved = hash64(Purpose.EVALUATION, torch.arange(len(prompts))), 0
    score, training = get_task(task.name).score, model.training
    model.eval()
    for start in range(0, len(prompts), 256):
        part = slice(start, start + 256)
        texts, _ = complete(model, tokenizer, prompts[part], config, seeds[part])
        pairs = zip(texts, range(start, len(prompts)), strict=False)
        solved += sum(score(text, rows[index % len(rows)])["correct"] for text, index in pairs)
    model.train(training)
    return {"solved": solved, "n": len(prompts)}


class Examine(TrainerCallback):
    """Solves held-out puzzles at the marks of a budget of operations, and ends the run at the last."""

    def __init__(self, budget: float, examine: Callable[[Any], dict]):
        self.marks, self.budget, self.examine = [mark * budget for mark in MARKS], budget, examine
        self.found: list[dict] = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        flops = (logs or {}).get("flops", 0)
        passed = [mark for mark in self.marks if mark <= flops]
        if passed:
            self.marks, found = self.marks[len(passed) :], self.examine(model)
            self.found.extend({"mark": mark / self.budget, "flops": flops, **found} for mark in passed)
        if not self.marks:
            control.should_training_stop = True
        return control


def train(script, recipe: str, model: Path, output: Path, seed: int, settings: dict[str, Any], callbacks: list):
    argv = ["--config", f"tiny_llada/{recipe}", "--model_name_or_path", str(model), "--output_dir", str(output)]
    argv += ["--seed", str(seed), "--disable_tqdm", "true", "--save_strategy", "no"]
    for key, value in settings.items():
        argv += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return script.main(*script.make_parser().parse_args_and_config(argv), callbacks=callbacks)


def base_model(args: argparse.Namespace, task: StudyTask, any_order: bool) -> Path:
    """The SFT model of a task and an architecture: seed 0's, whatever the runs' seeds."""
    folder = args.runs / f"{task.name}_{'any_order' if any_order else 'denoiser'}"
    done = folder / "sft.json"
    if not done.exists():
        start = folder / "init"
        if task.denoiser_second and not any_order:
            start = base_model(args, task, any_order=True)
        else:
            init_tiny.main(init_tiny.make_parser().parse_args([str(start), "--seed", "0"]))
        settings = {"max_steps": args.sft_steps or task.sft_steps[any_order], "resume_from_checkpoint": "false"}
        settings |= {"task": task.sft_task} if task.sft_task else {}
        recipe = f"sft/{task.name}{'_any_order' * any_order}"
        trainer = train(sft, recipe, start, folder / "sft", 0, settings, [])
        done.write_text(json.dumps({"sft_steps": trainer.state.global_step}))
    return folder / "sft"


def solved_before(base: Path, examine: Callable[[Any], dict], decoder: str, number: int) -> dict:
    """What `examine` finds of the base, kept beside it."""
    kept = base.parent / f"before_{decoder}_{number}.json"
    if not kept.exists():
        kept.write_text(json.dumps(examine(AutoModelForCausalLM.from_pretrained(base))))
    return json.loads(kept.read_text())


def log_path(logs: Path, facts: dict[str, Any]) -> Path:
    return logs / f"{facts['task']}_{facts['slug']}_seed{facts['seed']}.jsonl"


def run(args: argparse.Namespace) -> None:
    """Train what is not there yet: seed by seed, so that the first seed of every method comes first."""
    args.logs.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in METHODS:
            for name in args.tasks:
                if args.methods is None or method.slug in args.methods:
                    run_one(args, TASKS[name], method, seed)
    likelihoods(args)


def run_one(args: argparse.Namespace, task: StudyTask, method: Method, seed: int) -> None:
    overrides = method.overrides(task)
    facts: dict[str, Any] = {"task": task.name, "method": method.name, "slug": method.slug, "seed": seed}
    facts |= {"recipe": f"tiny_llada/grpo/{task.name}{'_any_order' * method.any_order}", "overrides": overrides}
    common: dict[str, Any] = {"learning_rate": args.learning_rate or task.learning_rate}
    common["per_device_train_batch_size"] = args.rows or task.rows
    common |= {"lr_scheduler_type": "constant_with_warmup", "num_train_examples": task.problems}
    common["warmup_steps"] = 2
    facts |= {"common": common, "flops_budget": task.budget * args.scale}
    path = log_path(args.logs, facts)
    if is_done(path, facts):
        return
    base = base_model(args, task, method.any_order)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), held_out(task, args.num_examples)
    samples = -(-args.num_examples // len(rows))
    shared = decoding(task, method.any_order)
    own = method.decoding(task)

    def examine(model) -> dict[str, Any]:
        found = solve_rate(model, tokenizer, task, rows, shared, samples)
        if own:  # as it is decoded in training
            config = decoding(task, method.any_order, **own)
            found["own"] = solve_rate(model, tokenizer, task, rows, config, samples)
        return found

    before = solved_before(base, examine, "own" if own else "shared", args.num_examples)
    start, watch = time.time(), Examine(facts["flops_budget"], examine)
    settings = {**common, "max_steps": 100000, **overrides}
    settings["resume_from_checkpoint"] = "false"
    output = args.runs / path.stem
    trainer = train(grpo, f"grpo/{facts['recipe'].rsplit('/', 1)[1]}", base, output, seed, settings, [watch])
    shutil.rmtree(output, ignore_errors=True)
    steps = [
        {key: float(f"{entry[key]:.5g}") for key in LOGGED if key in entry}
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    end = {
        "before": before,
        "marks": watch.found,
        "seconds": round(time.time() - start, 1),
        "base": json.loads((base.parent / "sft.json").read_text()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    write_log(path, facts, steps, end)
    print(f"{path.stem}: {[round(m['solved'] / m['n'], 3) for m in watch.found]}, {end['seconds']} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods of the bases


def likelihoods(args: argparse.Namespace) -> None:
    """Write how far the estimators are from the exact likelihood of the bases' own trajectories (d2 Fig. 5)."""
    for name in args.tasks:
        task = TASKS[name]
        for any_order in (False, True):
            path = args.logs / f"likelihood_{name}_{'any_order' if any_order else 'denoiser'}.json"
            if path.exists():
                continue
            base = base_model(args, task, any_order)
            model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
            prompts = list(held_out(task, args.num_examples)["prompt"])
            seeds = hash64(Purpose.EVALUATION, torch.arange(len(prompts)))
            _, rollout = complete(model, tokenizer, prompts, decoding(task, any_order), seeds)
            cuts: dict[str, Estimator] = {
                f"StepMerge, N = {n}": AnyOrderSegments(n) if any_order else StepMerge(n)
                for n in range(1, task.steps + 1)
            }
            others: dict[str, Estimator] = {
                "PKL": PseudoLikelihood(),
                "PKL-U": BlockPseudoLikelihood(4, "partition", "isolated" if any_order else "full"),
                "PKL-T": TrajectoryPseudoLikelihood(),
                "ELBO": Elbo(4),
            }
            lines = likelihood_report(
                model,
                rollout,
                cuts | others,
                exact_estimator("any_order" if any_order else "denoising"),
                batch_size=256,
            )
            keep = ("name", "logp", "divergence", "kl", "kl_error", "flops")
            found = [{key: asdict(line)[key] for key in keep} for line in lines]
            path.write_text(json.dumps({"rows": len(prompts), "lines": found}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# What the logs say


class Results:
    """All finished runs of a folder."""

    def __init__(self, logs: Path):
        self.runs: dict[tuple[str, str], dict[int, tuple]] = {}
        for path in sorted(logs.glob("*.jsonl")):
            facts, steps, end = read_log(path)
            self.runs.setdefault((facts["task"], facts["slug"]), {})[facts["seed"]] = (facts, steps, end)
        if not self.runs:
            raise ValueError(f"{logs} holds no log. Train first: python benchmarks/study.py")
        self.likelihoods = {
            path.stem.removeprefix("likelihood_"): json.loads(path.read_text())
            for task in TASKS
            for path in sorted(logs.glob(f"likelihood_{task}_*.json"), reverse=True)
        }

    def of(self, task: str, method: Method) -> dict[int, tuple]:
        return self.runs.get((task, method.slug), {})

    def rates(self, task: str, method: Method, mark: float, of: str | None = None) -> dict[int, tuple[float, float]]:
        """Solve rate and standard error at a mark of the budget (0: the base's), by seed."""
        rates = {}
        for seed, (_, _, end) in self.of(task, method).items():
            found = end["before"] if mark == 0 else next(m for m in reversed(end["marks"]) if m["mark"] <= mark)
            found = found[of] if of else found
            rate = found["solved"] / found["n"]
            rates[seed] = (rate, math.sqrt(rate * (1 - rate) / found["n"]))
        return rates

    def rate(self, task: str, method: Method, mark: float, of: str | None = None) -> Interval | None:
        rates = self.rates(task, method, mark, of)
        return over_seeds([rate for rate, _ in rates.values()], [e for _, e in rates.values()]) if rates else None

    def difference(self, task: str, one: Method, other: Method, mark: float, other_mark: float | None = None):
        """Solve rate of `one` minus that of `other`, seed by seed; None without a common seed."""
        theirs = self.rates(task, other, mark if other_mark is None else other_mark)
        return difference(self.rates(task, one, mark), theirs, one_base=other_mark == 0)

    def flops_a_step(self, task: str, method: Method) -> float:
        return statistics.fmean(steps[-1]["flops"] / len(steps) for _, steps, _ in self.of(task, method).values())

    def curve(self, task: str, method: Method, points: int = 60, window: float = 0.1) -> tuple[list, list, list, list]:
        """Training reward against operations, each point a mean over a tenth of the budget: (at, mean, low, high)
        over seeds."""
        runs = self.of(task, method).values()
        budget = min(facts["flops_budget"] for facts, _, _ in runs)
        at, mean, low, high = [], [], [], []
        for i in range(1, points + 1):
            end = i * budget / points
            values = []
            for _, steps, _ in runs:
                near = [s["reward"] for s in steps if end - window * budget < s["flops"] <= end]
                if near:
                    values.append(statistics.fmean(near))
            if len(values) == len(runs):
                at.append(end)
                mean.append(statistics.fmean(values))
                low.append(min(values))
                high.append(max(values))
        return at, mean, low, high


# ---------------------------------------------------------------------------------------------------------------------
# Claims

METHODS_BY_SLUG = {method.slug: method for method in METHODS}
STEP_MERGE = "stepmerge_n4"  # chosen before any run: d2's N / T lies between this and N = 2


@dataclass(frozen=True)
class Claim:
    """`one` solves more than `other` at a mark of the budget; without `other`, more than the base did."""

    source: str
    text: str
    one: str
    other: str | None = None
    mark: float = 1.0
    more: bool = True  # False: it solves fewer


CLAIMS = [
    Claim("d2 Fig. 6", "AnyOrder improves an any-order model", "any_order_anyorder"),
    Claim("d2 Fig. 6", "diffu-GRPO gains nothing on it", "any_order_diffu_grpo", more=False),
    Claim("d2 Fig. 6", "AnyOrder beats diffu-GRPO on it", "any_order_anyorder", "any_order_diffu_grpo"),
    Claim("d2 Fig. 7", "StepMerge (N = 4) beats diffu-GRPO", STEP_MERGE, "diffu_grpo"),
    Claim("d2 Fig. 8", "a small N falls short: N = 4 beats N = 2", STEP_MERGE, "stepmerge_n2"),
    Claim(
        "d2 Fig. 8", "a large N is slower: N = 4 beats N = T = 8 at half the budget", STEP_MERGE, "stepmerge_n8", 0.5
    ),
    Claim("d2 Tab. 2", "AnyOrder beats DDPO on an any-order model", "any_order_anyorder", "any_order_ddpo"),
    Claim("d2 Tab. 3", "AnyOrder beats StepMerge on it", "any_order_anyorder", "any_order_stepmerge_n4"),
    Claim("d2 Tab. 4", "StepMerge beats wd1", STEP_MERGE, "wd1"),
    Claim("PADRE Fig. 4", "at few operations (a quarter) d1 leads PKL", "diffu_grpo", "pkl", 0.25),
    Claim("PADRE Fig. 4", "with all of them PKL leads d1", "pkl", "diffu_grpo"),
    Claim("PADRE Tab. 1", "PKL⁺ beats PKL: masking prompts helps", "pkl_plus", "pkl"),
    Claim("PADRE Tab. 1", "PKL beats PKL-U", "pkl", "pkl_u"),
    Claim("PADRE Tab. 1", "PKL beats PKL-T", "pkl", "pkl_t"),
    Claim("PADRE Tab. 1", "PKL-U beats d1", "pkl_u", "diffu_grpo"),
    Claim("PADRE Tab. 1", "PKL-T beats d1", "pkl_t", "diffu_grpo"),
    Claim("PADRE Tab. 1", "PKL⁺ beats d1", "pkl_plus", "diffu_grpo"),
    Claim("PADRE Tab. 1", "PKL⁺ beats wd1", "pkl_plus", "wd1"),
]


def judge(results: Results, claim: Claim, task: str) -> str:
    """The measured difference in points of solve rate, its interval and what it says of the claim."""
    one = METHODS_BY_SLUG[claim.one]
    if claim.other is None:
        found = results.difference(task, one, one, claim.mark, other_mark=0)
    else:
        found = results.difference(task, one, METHODS_BY_SLUG[claim.other], claim.mark)
    return f"{found.text(100, 1)}: **{found.verdict(claim.more)}**" if found else "not run"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def judge_likelihoods(results: Results, task: str) -> dict[tuple[str, str], str]:
    """What the papers say of likelihoods and costs, measured on the denoiser: (source, claim) to verdict."""
    kept = results.likelihoods.get(f"{task}_denoiser")
    found = {}
    if kept:
        lines = {line["name"]: line for line in kept["lines"]}
        d1, exact = lines["StepMerge, N = 1"], lines[f"StepMerge, N = {TASKS[task].steps}"]
        errors = [lines[f"StepMerge, N = {n}"]["divergence"] for n in (1, 2, 4)]
        falls = all(one > other for one, other in pairwise(errors))
        found["d2 Fig. 5", "D_N falls with N (N = 1, 2, 4; nats a completion)"] = (
            f"{', '.join(f'{value:.2f}' for value in errors)}: **{'borne out' if falls else 'contradicted'}**"
        )
        ao = lines["PKL-T"]
        far = abs(ao["logp"] - exact["logp"]) > abs(d1["logp"] - exact["logp"])
        found["d2 Tab. 1", "AnyOrder is far off on a plain denoiser (log-prob a token: exact, AnyOrder, d1)"] = (
            f"{exact['logp']:.2f}, {ao['logp']:.2f}, {d1['logp']:.2f}: **{'borne out' if far else 'contradicted'}**"
        )

        def gap(one: dict, other: dict) -> str:
            mean, half = one["kl"] - other["kl"], 1.96 * math.hypot(one["kl_error"], other["kl_error"])
            verdict = Interval(mean, mean - half, mean + half, (mean,)).verdict()
            return f"{mean:+.3f} ± {half:.3f}: **{verdict}**"

        for text, one, other in (
            ("PKL is closer than d1 (KL of d1 - PKL, nats a token)", d1, lines["PKL"]),
            ("PKL-U is closer than d1 (d1 - PKL-U)", d1, lines["PKL-U"]),
            ("PKL-T is closer than d1 (d1 - PKL-T)", d1, lines["PKL-T"]),
            ("PKL-U is less close than PKL (PKL-U - PKL)", lines["PKL-U"], lines["PKL"]),
        ):
            found["PADRE Fig. 2", text] = gap(one, other)
    for slug in ("pkl_u", "pkl_t"):
        method, d1_method = METHODS_BY_SLUG[slug], METHODS_BY_SLUG["diffu_grpo"]
        if results.of(task, method) and results.of(task, d1_method):
            ratio = results.flops_a_step(task, method) / results.flops_a_step(task, d1_method)
            said = "borne out" if abs(ratio - 1) < 0.2 else "contradicted"
            found["PADRE App. 10", f"a step of {method.name} costs what one of d1 does (operations)"] = (
                f"{ratio:.2f} times: **{said}**"
            )
    return found


def claims_table(results: Results, tasks: list[str]) -> str:
    rows = [[c.source, c.text, *(judge(results, c, task) for task in tasks)] for c in CLAIMS]
    others = [judge_likelihoods(results, task) for task in tasks]
    for source, text in dict.fromkeys(key for found in others for key in found):
        rows.append([source, text, *(found.get((source, text), "not run") for found in others)])
    rows.sort(key=lambda row: (row[0].startswith("PADRE"), row[0].split()[1] == "Tab.", row[0]))
    return table(["source", "claim", *(task.capitalize() for task in tasks)], rows)


def likelihood_table(results: Results) -> str:
    """KL of each estimator from the exact conditionals, on each base's own completions."""
    bases = {name: {line["name"]: line for line in kept["lines"]} for name, kept in results.likelihoods.items()}
    names = [name for name in next(iter(bases.values())) if name.split()[-1] not in ("3", "5", "6", "7")]
    rows = [
        [name, *(f"{lines[name]['kl']:.3f} ± {1.96 * lines[name]['kl_error']:.3f}" for lines in bases.values())]
        for name in names
    ]
    return table(["estimator", *(name.replace("_", ", ", 1).replace("_", "-") for name in bases)], rows)


def rates_table(results: Results, task: str) -> str:
    header = [
        "base",
        "method",
        "seeds",
        *(f"at {mark:g}" for mark in (0, *MARKS)),
        "lost since its best",
        "steps",
        "GFLOP a step",
    ]
    rows = []
    for method in METHODS:
        runs = results.of(task, method)
        if not runs:
            continue
        found = [results.rate(task, method, mark) for mark in (0, *MARKS)]
        rates = [f"{100 * i.mean:.1f}" for i in found[:-1] if i]
        last = found[-1]
        assert last
        low, high = 100 * max(0.0, last.low), 100 * min(1.0, last.high)
        rates.append(f"{100 * last.mean:.1f} ({low:.1f} to {high:.1f})")
        lost = statistics.fmean(
            max(m["solved"] / m["n"] for m in (end["before"], *end["marks"]))
            - end["marks"][-1]["solved"] / end["marks"][-1]["n"]
            for _, _, end in runs.values()
        )
        steps = statistics.fmean(len(steps) for _, steps, _ in runs.values())
        base = "any-order" if method.any_order else "denoiser"
        cost = f"{results.flops_a_step(task, method) / 1e9:.1f}"
        rows.append([base, method.name, str(len(runs)), *rates, f"{100 * lost:.1f}", f"{steps:.0f}", cost])
    return table(header, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

# Colours by role, the same in every panel.
COLORS = {
    "diffu_grpo": "#444444",
    "diffu_grpo_plus": "#999999",
    "stepmerge_n2": "#9ecae1",
    "stepmerge_n4": "#2171b5",
    "stepmerge_n8": "#08306b",
    "pkl": "#d94801",
    "pkl_plus": "#fd8d3c",
    "pkl_u": "#a63603",
    "pkl_t": "#7a0177",
    "ddpo": "#006d2c",
    "wd1": "#b8860b",
    "elbo": "#c51b8a",
    "justgrpo": "#41ab5d",
    "any_order_anyorder": "#7a0177",
    "any_order_diffu_grpo": "#444444",
    "any_order_stepmerge_n4": "#2171b5",
    "any_order_ddpo": "#006d2c",
}
PANELS = {
    "d2: StepMerge and N": ["diffu_grpo", "stepmerge_n2", "stepmerge_n4", "stepmerge_n8"],
    "PADRE: pseudo-likelihoods": ["diffu_grpo", "pkl", "pkl_plus", "pkl_u", "pkl_t"],
    "the others": ["diffu_grpo_plus", "ddpo", "wd1", "elbo", "justgrpo"],
    "d2: an any-order model": [
        "any_order_anyorder",
        "any_order_diffu_grpo",
        "any_order_stepmerge_n4",
        "any_order_ddpo",
    ],
}


def draw_curves(results: Results, task: str, path: Path) -> None:
    """Training reward against operations, four panels; each line is named at its end."""
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6.4), dpi=130, sharex=True, sharey=True)
    budget, named = 0.0, []
    for ax, (title, slugs) in zip(axes.flat, PANELS.items(), strict=True):
        named.append((ax, ends := []))
        for slug in slugs:
            method = METHODS_BY_SLUG[slug]
            if not results.of(task, method):
                continue
            at, mean, low, high = results.curve(task, method)
            at = [flops / 1e9 for flops in at]
            budget = max(budget, at[-1])
            ax.plot(at, mean, color=COLORS[slug], linewidth=1.6)
            ax.fill_between(at, low, high, color=COLORS[slug], alpha=0.15, linewidth=0)
            ends.append((at[-1], mean[-1], method.name, COLORS[slug]))
        ax.set_title(title, fontsize=10, loc="left")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_xlim(0, budget)
    for ax in axes[1]:
        ax.set_xlabel("counted operations, GFLOP", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("training reward", fontsize=9)
    seeds = [str(n) for n in sorted({len(runs) for (of, _), runs in results.runs.items() if of == task})]
    figure.suptitle(
        f"{task.capitalize()}: mean and range of {' to '.join(seeds[:1] + seeds[1:][-1:])} seeds", fontsize=11
    )
    figure.tight_layout()
    figure.subplots_adjust(wspace=0.45, right=0.84)
    for ax, ends in named:
        label_ends(ax, ends, 8.5)
    figure.savefig(path)
    pyplot().close(figure)


def draw_rates(results: Results, tasks: list[str], path: Path) -> None:
    """Held-out solve rates at the end: each seed's, and the mean with its interval."""
    figure, axes = pyplot().subplots(
        1, len(tasks), figsize=(4.6 * len(tasks), 5.2), dpi=130, sharey=True, squeeze=False
    )
    rows = {method.slug: -i - (0.6 if method.any_order else 0) for i, method in enumerate(METHODS)}
    for ax, task in zip(axes[0], tasks, strict=True):
        for method in METHODS:
            rates, color = results.rates(task, method, 1.0), COLORS[method.slug]
            found = results.rate(task, method, 1.0)
            if not found:
                continue
            y = rows[method.slug]
            ax.plot([100 * max(0.0, found.low), 100 * min(1.0, found.high)], [y, y], color=color, linewidth=1.4)
            ax.plot(
                [100 * rate for rate, _ in rates.values()],
                [y] * len(rates),
                "o",
                color=color,
                markersize=3.5,
                alpha=0.55,
            )
            ax.plot(100 * found.mean, y, "|", color=color, markersize=13, markeredgewidth=2.2)
            base = results.rate(task, method, 0)
            ax.plot([100 * base.mean] * 2, [y - 0.45, y + 0.45], color="black", linewidth=0.8, linestyle=":")
        ax.set_title(f"{task.capitalize()}", fontsize=10, loc="left")
        ax.set_xlabel("held-out puzzles solved, %   (dotted: before)", fontsize=9)
        ax.set_xlim(0, None)
        ax.grid(alpha=0.25, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(list(rows.values()), [m.name + " (any-order)" * m.any_order for m in METHODS], fontsize=8.5)
    figure.tight_layout()
    figure.savefig(path)
    pyplot().close(figure)


def draw_likelihoods(results: Results, path: Path) -> None:
    """KL(exact ‖ estimate) of each estimator on the bases' own completions, and of StepMerge over N."""
    names = list(results.likelihoods)
    figure, axes = pyplot().subplots(
        1, len(names), figsize=(3.1 * len(names), 3.4), dpi=130, sharey=False, squeeze=False
    )
    named = []
    for ax, name in zip(axes[0], names, strict=True):
        lines = {line["name"]: line for line in results.likelihoods[name]["lines"]}
        cuts = [line for key, line in lines.items() if key.startswith("StepMerge")]
        n = [int(line["name"].rsplit(" ", 1)[1]) for line in cuts]
        kls, errors = [line["kl"] for line in cuts], [1.96 * line["kl_error"] for line in cuts]
        ax.errorbar(n, kls, errors, color=COLORS["stepmerge_n4"], marker="o", markersize=3)
        ends = [(n[-1], kls[-1], "StepMerge", COLORS["stepmerge_n4"])]
        for key, slug in (("PKL", "pkl"), ("PKL-U", "pkl_u"), ("PKL-T", "pkl_t")):
            ends.append((n[-1], lines[key]["kl"], key, COLORS[slug]))
            ax.plot([1, n[-1]], [lines[key]["kl"]] * 2, color=COLORS[slug], linewidth=1.2, linestyle="--")
        named.append((ax, ends))
        top = max(*kls, *(height for _, height, *_ in ends))
        ax.set_ylim(-0.03 * top, 1.15 * top)
        task, _, base = name.partition("_")
        ax.set_title(f"{task.capitalize()}, {base.replace('_', '-')}", fontsize=9, loc="left")
        ax.set_xlabel("N of StepMerge (1: d1)", fontsize=9)
        ax.set_xticks(n)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("KL(exact ‖ estimate), nats a token", fontsize=9)
    figure.tight_layout()
    figure.subplots_adjust(wspace=0.8, right=0.92)
    for ax, ends in named:
        label_ends(ax, ends)
    figure.savefig(path)
    pyplot().close(figure)


def tables(results: Results, tasks: list[str]) -> dict[str, str]:
    """The tables of docs/study.md by name."""
    tasks = [task for task in tasks if any(of == task for of, _ in results.runs)]
    found = {"claims": claims_table(results, tasks), **{task: rates_table(results, task) for task in tasks}}
    return found | ({"likelihood": likelihood_table(results)} if results.likelihoods else {})


def draw(args: argparse.Namespace) -> dict[str, str]:
    """Draw the figures, and print and return the tables."""
    results = Results(args.logs)
    found = tables(results, args.tasks)
    tasks = [task for task in args.tasks if task in found]
    args.figures.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        draw_curves(results, task, args.figures / f"study_{task}.png")
    draw_rates(results, tasks, args.figures / "study_held_out.png")
    if results.likelihoods:
        draw_likelihoods(results, args.figures / "study_likelihood.png")
    for name, text in found.items():
        print(f"\n{name}\n\n{text}")
    return found


def main(args: argparse.Namespace) -> dict[str, str]:
    if not args.draw:
        run(args)
    return draw(args)


if __name__ == "__main__":
    os.nice(5)
    torch.set_num_threads(1)
    main(make_parser().parse_args())
