"""Evaluate a model on a task, or score outputs that were stored before.

    trl-dllm eval --model_name_or_path runs/demo/grpo --task sudoku --max_new_tokens 17 --output_dir runs/eval
    trl-dllm eval --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --task gsm8k --protocol d1 --output_dir runs/gsm8k
    trl-dllm eval --task gsm8k --from_generations outputs.jsonl --parser d1 --output_dir runs/rescored

`--protocol d1` is d1's: zero-shot, greedy, blocks of 32, two tokens a step, whole canvas, lengths 128, 256 and 512.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from trl_dllm.command import Parser, count, run_script
from trl_dllm.evaluation import (
    GENERATIONS,
    check_stop_strings,
    evaluate,
    evaluation_fingerprint,
    open_evaluation,
    rescore,
)
from trl_dllm.fields import check_choice
from trl_dllm.generation import DecodingArguments
from trl_dllm.identity import model_identity
from trl_dllm.processes import on_main_process, say
from trl_dllm.reports.dry_run import dry_run_decoding
from trl_dllm.scripts.generate import generation_config, generation_parser, load_model
from trl_dllm.scripts.task_data import check_data_dir, check_task_kwargs, find_task, json_mapping


D1_LENGTHS = (128, 256, 512)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[generation_parser(model_required=False)],
    )
    parser.add_argument("--task", required=True, help="What to evaluate on: a name, or my_module.TASK.")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"], help="Split of the task.")
    parser.add_argument("--num_examples", type=count, help="Examples; default: all, 256 of generated tasks.")
    parser.add_argument("--task_kwargs", type=json_mapping, default={}, help="Further arguments of the task, as JSON.")
    parser.add_argument("--data_dir", help="Local folder with the task's data.")
    parser.add_argument("--output_dir", required=True, help="Where generations and summary are written.")
    parser.add_argument("--num_samples", type=count, default=1, help="Completions a row, for pass@k.")
    parser.add_argument("--parser", default="default", help="Which of the task's parsers scores: default or d1.")
    parser.add_argument("--prefill", default="", help="Beginning of each answer, such as '<reasoning>'.")
    parser.add_argument("--stop_strings", nargs="+", default=[], help="Each answer ends behind the first of these.")
    parser.add_argument("--protocol", choices=["free", "d1"], default="free", help="d1's settings, or the flags'.")
    parser.add_argument("--lengths", type=count, nargs="+", help="Canvas lengths of the d1 protocol.")
    parser.add_argument(
        "--from_generations", help="JSON lines of question, generations, ground_truth to score instead."
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    task, folder = find_task(args.task), Path(args.output_dir)
    check_choice("parser", args.parser, task.parsers)
    check_task_kwargs(task, args.task_kwargs)
    check_data_dir(args.data_dir)
    check_stop_strings(args.stop_strings)
    if args.from_generations:
        summary = rescore(task, args.from_generations, folder, args.parser)
        _print(task.name, summary, folder)
        for name, other in summary["other_parsers"].items():
            print(
                f"  the {name} parser: {other['correct']} of {summary['total']}; {other['differ']} answers differ",
                end="",
            )
            print(f", the first in row {other['first_difference']}" if other["differ"] else "")
        return summary
    if not args.model_name_or_path:
        raise ValueError("Name a model with --model_name_or_path, or stored outputs with --from_generations.")
    runs = {folder: args}
    if args.protocol == "d1":
        # Whatever the model was trained with, but for what it is: an any-order model stays one.
        free = {f.name: f.default for f in fields(DecodingArguments) if f.name not in ("decoding", "cache")}
        settings: dict[str, object] = {"block_length": 32, "tokens_per_step": 2, "diffusion_steps": None}
        settings |= {"temperature": 0.0, "stop_at_eos": False}
        given, lengths = {**free, **vars(args), **settings}, args.lengths or D1_LENGTHS
        runs = {folder / str(n): argparse.Namespace(**{**given, "max_new_tokens": n}) for n in lengths}
    configs = {path: generation_config(run) for path, run in runs.items()}  # before the model loads
    generated = args.task in ("sudoku", "countdown")
    examples = args.num_examples or (256 if generated else None)
    dataset = task.load(args.split, examples, seed=args.seed, data_dir=args.data_dir, **args.task_kwargs)
    if args.dry_run:
        rows = len(dataset) * args.num_samples
        for config in configs.values():
            facts = dry_run_decoding("eval", args.model_name_or_path, config, rows, args.batch_size, args.dtype)
        return facts
    task.parsers[args.parser]("", dataset[0])  # before an hour of decoding: may programs run, and is there a sandbox?
    settings = {"split": args.split, "task_kwargs": args.task_kwargs, "protocol": args.protocol}
    if args.stop_strings:
        settings["stop_strings"] = args.stop_strings
    facts = {
        "batch_size": args.batch_size,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "parser": args.parser,
        "prefill": args.prefill,
        "settings": settings,
        "machine": {"model": args.model_name_or_path, "adapter": args.adapter, "dtype": args.dtype},
    }
    # All folders are checked before the model loads, which takes none where all generations are there.
    identity = on_main_process(lambda: model_identity(args.model_name_or_path, adapter=args.adapter))
    for path, config in configs.items():
        open_evaluation(path, evaluation_fingerprint(identity, task, dataset, config, **facts))
    complete = all((path / GENERATIONS).exists() for path in configs)
    model, tokenizer = (None, None) if complete else load_model(args)
    for path, config in configs.items():
        more = {"identity": identity, "stop_strings": args.stop_strings}
        summary = evaluate(model, tokenizer, task, dataset, config, path, **more, **facts)

        _print(task.name, summary, path)
    return summary


def _print(name: str, summary: dict, folder: Path) -> None:
    say(
        f"{name}: {summary['solve_rate']:.1%} solved (95 % interval {summary['low']:.1%} to {summary['high']:.1%}), "
        f"{summary['correct']} of {summary['total']} right; settings in {folder / 'summary.json'}"
    )
    if summary.get("judged_inside"):
        tests = summary["judged_inside"] + summary["judged_outside"]
        say(f"  {summary['judged_inside']} of {tests} tests ran in the program's own process, where it can fool them")


if __name__ == "__main__":
    run_script("trl-dllm eval", make_parser, main, sys.argv[1:])
