"""d2-AnyOrder, d2-StepMerge and diffu-GRPO on the same any-order model, against floating-point operations.

    python benchmarks/any_order_comparison.py --seeds 0 1 2 --figure docs/figures/any_order_vs_flops.png

For each seed a tiny any-order model is fine-tuned on 4x4 Sudoku until it solves a third of some validation puzzles,
and then trained with each method from that checkpoint. Prints the held-out solve rates before and after with their 95
% intervals, and draws the training reward against the operations counted. What is finished is kept: the command goes
on where it was. About four minutes a seed on one core.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trl_dllm.scripts import eval as evaluation
from trl_dllm.scripts import grpo, init_tiny, sft
from trl_dllm.scripts.demo import BLANKS, SAMPLING, StopAtSolveRate


RECIPES = Path(__file__).parents[1] / "recipes" / "tiny_llada"
METHODS = {
    "AnyOrder": "config_sudoku_any_order.yaml",
    "StepMerge, N = 4": "config_sudoku_any_order_step_merge.yaml",
    "diffu-GRPO": "config_sudoku_any_order_diffu_grpo.yaml",
}


def train(script, recipe: str, model: Path, folder: Path, seed: int, *overrides: str, **kwargs):
    argv = ["--config", str(RECIPES / recipe), "--seed", str(seed), "--disable_tqdm", "true"]
    argv += ["--model_name_or_path", str(model), "--output_dir", str(folder), "--save_strategy", "no", *overrides]
    return script.main(*script.make_parser().parse_args_and_config(argv), **kwargs)


def solve_rate(model: Path, folder: Path, seed: int) -> dict:
    argv = ["--task", "sudoku", "--task_kwargs", json.dumps(BLANKS), "--num_examples", "1000", "--batch_size", "250"]
    argv += [word for key, value in SAMPLING.items() for word in (f"--{key}", str(value))]
    argv += ["--model_name_or_path", str(model), "--output_dir", str(folder), "--seed", str(seed)]
    return evaluation.main(
        evaluation.make_parser().parse_args([*argv, "--no_stop_at_eos", "--decoding", "any_order", "--cache", "exact"])
    )


def run(seed: int, folder: Path) -> dict:
    """The results of a seed: solve rates, and (operations, reward) of each method's steps."""
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    base = folder / "sft"
    if "before" not in found:
        init_tiny.main(init_tiny.make_parser().parse_args([str(folder / "init"), "--seed", str(seed)]))
        tokenizer = AutoTokenizer.from_pretrained(folder / "init")
        stop = StopAtSolveRate(1 / 3, tokenizer, decoding="any_order", cache="exact")
        recipe = "sft/config_sudoku_any_order.yaml"
        train(sft, recipe, folder / "init", base, seed, "--max_steps", "2000", callbacks=[stop])
        found["before"] = solve_rate(base, folder / "before", seed)
        results.write_text(json.dumps(found, indent=2))
    for name, recipe in METHODS.items():
        if name in found:
            continue
        trainer = train(grpo, f"grpo/{recipe}", base, folder / recipe.removesuffix(".yaml"), seed)
        history = [entry for entry in trainer.state.log_history if "reward" in entry]
        after = solve_rate(folder / recipe.removesuffix(".yaml"), folder / f"after_{recipe}", seed)
        found[name] = {
            "after": after,
            "flops": [entry["flops"] for entry in history],
            "reward": [entry["reward"] for entry in history],
        }
        results.write_text(json.dumps(found, indent=2))
    return found


def draw(results: dict[int, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), dpi=150)
    for color, name in zip(("tab:blue", "tab:orange", "tab:green"), METHODS, strict=True):
        for seed, found in results.items():
            reward, window = found[name]["reward"], 7
            smooth = [sum(reward[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(reward))]
            label = name if seed == min(results) else None
            axes.plot(found[name]["flops"], smooth, color=color, alpha=0.8, linewidth=1.2, label=label)
    axes.set(
        xlabel="floating-point operations (counted)",
        ylabel="training reward (mean of the last 7 steps)",
        title=f"Any-order 4x4 Sudoku, {len(results)} seeds",
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/any_order_comparison"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/any_order_vs_flops.png"))
    args = parser.parse_args()
    results = {seed: run(seed, args.output_dir / f"seed{seed}") for seed in args.seeds}
    draw(results, args.figure)
    print(f"\n{'seed':>4}  {'':<18}{'solved':>8}   95 % interval    operations")
    for seed, found in results.items():
        rows = {"before": (found["before"], 0), **{m: (found[m]["after"], found[m]["flops"][-1]) for m in METHODS}}
        for name, (rate, flops) in rows.items():
            interval = f"{rate['low']:.1%} to {rate['high']:.1%}"
            print(f"{seed:>4}  {name:<18}{rate['solve_rate']:>8.1%}   {interval:<16} {flops:.2e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
