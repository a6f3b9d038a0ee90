"""What a training command shows in the terminal: a short line a log, and at the end what came of it and where it is.

A log has some forty entries. The terminal shows the five that say whether a run is well, and what it costs:

- GRPO: the reward and its spread (no spread, no gradient); the KL to the reference, or the entropy where none is
  computed (drift, collapse); the length of completions (which a policy that games its reward gives away first); the
  gradient's norm; seconds a step.
- DPO: loss, accuracy and margin of the implicit rewards; the gradient's norm; seconds a step.
- SFT: loss, entropy, learning rate, the gradient's norm; seconds a step.

All the others are in `trainer_state.json`, and with every integration of `report_to`. `print_all_metrics: true` prints
transformers' own lines, as a trainer does that is used from Python: its callbacks are its user's.
"""

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback, ProgressCallback, TrainerState

from trl_dllm.models import unwrap
from trl_dllm.reports.curves import best_of, draw_rows, make_rows, say_amount
from trl_dllm.reports.run_logs import AXES, METRICS, STATE, Run, group_runs


# The column that tells the kind of run -> (name, columns of which the first that was logged is shown).
_NUMBERS = {
    "reward": (
        ("reward", "reward"),
        ("kl", "kl"),
        ("entropy", "entropy"),
        ("length", "completions/mean_length"),
        ("grad norm", "grad_norm"),
    ),
    "rewards/accuracies": (
        ("loss", "loss"),
        ("accuracy", "rewards/accuracies"),
        ("margin", "rewards/margins"),
        ("grad norm", "grad_norm"),
    ),
    "loss": (("loss", "loss"), ("entropy", "entropy"), ("lr", "learning_rate"), ("grad norm", "grad_norm")),
}

_CURVE = 10  # logged values that are a curve


class _StepLines:
    """Prints a log as a line. It stands before the callback that does everything else."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._start, self._seconds = time.perf_counter(), []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds.append(time.perf_counter() - self._start)
        return super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        seconds, self._seconds = self._seconds, []
        line = log_line(logs or {}, state, sum(seconds) / len(seconds) if seconds else None)
        if line and state.is_world_process_zero:
            self.write(line)


class StepLinesOfBar(_StepLines, ProgressCallback):
    """With transformers' progress bar, above which the lines stand."""

    def write(self, line: str) -> None:
        (self.training_bar.write if self.training_bar is not None else print)(line)


class StepLines(_StepLines, PrinterCallback):
    """Without a bar: `disable_tqdm: true`."""

    def write(self, line: str) -> None:
        print(line, flush=True)


def shorten_log(trainer) -> None:
    """Put a line a log in the place of what transformers prints by itself; what a user has added stays."""
    callbacks = trainer.callback_handler.callbacks
    for i, callback in enumerate(callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            callbacks[i] = StepLinesOfBar() if type(callback) is ProgressCallback else StepLines()


def log_line(logs: Mapping[str, Any], state: TrainerState, seconds: float | None = None) -> str | None:
    """The line of a log: its step and five numbers; None for the totals at the end, which `summary` says.

    A log with none of them, which a user's callback has made, is shown whole.

    Args:
        seconds (`float`, *optional*): a step, since the last log.
    """
    if "train_runtime" in logs:
        return None
    held_out = any(name.startswith("eval_") for name in logs)
    prefix = "eval_" if held_out else ""
    kind = next((kind for kind in _NUMBERS if prefix + kind in logs), None)
    shown = [(name, logs[prefix + column]) for name, column in _NUMBERS.get(kind or "", ()) if prefix + column in logs]
    if kind == "reward" and "kl" in dict(shown):
        shown = [(name, value) for name, value in shown if name != "entropy"]
    parts = [f"{name} {_number(value)}" for name, value in shown or logs.items() if name != "epoch"]
    if kind == "reward" and prefix + "reward_std" in logs:
        parts[0] += f" ± {_number(logs[prefix + 'reward_std'])}"
    if held_out and "eval_runtime" in logs:
        parts.append(f"{logs['eval_runtime']:.3g} s")
    elif seconds is not None and not held_out:
        parts.append(f"{seconds:.3g} s/step")
    width = len(str(state.max_steps))
    head = f"step {state.global_step:>{width}}/{state.max_steps}" + "  held out" * held_out
    return "  ".join([head, *parts])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–" if value is None else str(value)


def print_summary(trainer, script_args) -> None:
    """Say, on the first process, what came of a run, where it is and what to do next; and draw its curves."""
    if not trainer.is_world_process_zero():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, console = summary(trainer, script_args), Console()
    if not console.is_terminal:  # a file, or a scheduler's log: whole paths and commands, however long they are
        width = max(len(name) for name, _ in rows) + 2
        print("\n" + "\n".join(f"{name:<{width}}{text}" for name, text in rows), flush=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text, overflow="fold"))
    console.print("", table)


def summary(trainer, script_args) -> list[tuple[str, str]]:
    """The lines of `print_summary`, each with its name."""
    state, folder = trainer.state, Path(trainer.args.output_dir)
    run = Run(folder, state.log_history, folder.name, trainer.fingerprint)
    column = next((name for name in METRICS if len(run.points(name)[0])), None)
    axes = [axis for axis in AXES if run.knows(axis)]
    end = np.array([float(state.global_step)])
    done, *costs = (say_amount(axis, float(run.at(axis, end)[0])) for axis in axes)
    rows = [("trained", ", ".join([f"{done} of {state.max_steps}", *costs]))]
    if column is not None:
        _, values = run.points(column)
        width = min(5, (len(values) + 1) // 2)
        start, last = (f"{part.mean():.3g}" for part in (values[:width], values[-width:]))
        of = f"means of the first and the last {width} logged" if width > 1 else "first and last logged"
        rows.append((column, f"{start} → {last} ({of})"))
        steps, values = run.points(f"eval_{column}")
        if len(steps):
            said = [f"{value:.3g} (step {step:.0f})" for step, value in zip(steps, values, strict=True)]
            rows.append((f"held-out {column}", f"{said[0]} → {said[-1]}; best {said[best_of(column, values)]}"))
        rows.append(("best checkpoint", _best_checkpoint(trainer, run, column)))
    rows += [("model", str(folder)), ("log", str(folder / STATE))]
    if column is not None and len(run.points(column)[0]) >= _CURVE:
        rows.append(("figure", _draw(run, column, axes)))
    model = shlex.quote(str(folder))
    if hasattr(unwrap(trainer.model), "peft_config"):
        base = next(iter(unwrap(trainer.model).peft_config.values())).base_model_name_or_path
        model = f"{shlex.quote(str(base))} --adapter {model}"
    if script_args.task is not None:
        kwargs = f" --task_kwargs {shlex.quote(json.dumps(script_args.task_kwargs))}" * bool(script_args.task_kwargs)
        kwargs += f" --data_dir {shlex.quote(script_args.data_dir)}" if script_args.data_dir else ""
        out = shlex.quote(str(folder / "eval"))
        rows.append(
            (
                "next",
                f"trl-dllm eval --model_name_or_path {model} --task {script_args.task}{kwargs} --output_dir {out}",
            )
        )
    generate = f'trl-dllm generate --model_name_or_path {model} --prompt "…"'
    return [*rows, ("next" if script_args.task is None else "", generate)]


def _best_checkpoint(trainer, run: Run, column: str) -> str:
    """The checkpoint with the best held-out value, and how that is known."""
    state, args = trainer.state, trainer.args
    if state.best_model_checkpoint is not None:
        loaded = "; it was loaded at the end, and is the model" if args.load_best_model_at_end else ""
        return f"{state.best_model_checkpoint} ({args.metric_for_best_model} {state.best_metric:.3g}{loaded})"
    steps, values = run.points(f"eval_{column}")
    if not len(steps):
        return "unknown: nothing was evaluated (eval_strategy: steps)"
    saved = [i for i, step in enumerate(steps) if (run.folder / f"checkpoint-{step:.0f}").is_dir()]
    if not saved:
        return "unknown: none is of an evaluated step (save_steps: a multiple of eval_steps, and save_total_limit)"
    best = saved[best_of(column, values[saved])]
    return f"{run.folder / f'checkpoint-{steps[best]:.0f}'} (held-out {column} {values[best]:.3g})"


def _draw(run: Run, column: str, axes: list[str]) -> str:
    """Draw the run's curves into its folder, as `trl-dllm report curves` does, and say where."""
    title = f"{run.folder}: {column}"
    try:
        return str(
            draw_rows(make_rows(group_runs([run]), column, axes, 5), column, 5, run.folder / "curves.png", title)
        )
    except ImportError as error:
        return f"none: {error}"
