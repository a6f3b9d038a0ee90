"""Completions of training as files: all of them as JSON lines, and some of them as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..rollout import Rollout
from ..step_maps import write_rollout
from ..trace import Traced, page_data, write_page


ROLLOUTS = "_rollouts"  # whose name keeps it from the Hub
TRACES = "traces"
_SHOWN = 8  # completions of a page


def save_completions(
    trainer, rollout: Rollout, rewards: Tensor, rows: Sequence[Mapping[str, Any]], advantages: Tensor
) -> None:
    """Write a generation batch of training where `save_rollouts` and `trace_steps` say so.

    Args:
        trainer (`DiffusionGRPOTrainer`): whose batch it is.
        rollout (`Rollout`): B rows of this process.
        rewards (`Tensor` of shape (processes · B, functions)): NaN for none.
        rows (`list[dict]`): the data set's columns of each row.
        advantages (`Tensor` of shape (B,)): of this process's rows.
    """
    if not trainer.model.training:
        return
    step, number = trainer._generation_round[0]
    if trainer.args.save_rollouts:
        _save_rollout(trainer, rollout, _by_name(trainer, rewards, len(rollout)), step, number)
    if number == 0 and trainer.accelerator.is_main_process and _is_due(trainer, step):
        some = rollout[:_SHOWN]
        values = [
            {**named, "advantage": advantage}
            for named, advantage in zip(_by_name(trainer, rewards, len(some)), advantages.tolist(), strict=False)
        ]
        facts = {"step": step, "seed": trainer.args.seed, **trainer.known_decoding()}
        model = Traced(
            name=f"step {step}",
            rollout=some,
            tokenizer=trainer._tokenizer,
            block_length=trainer.sampling.block_length,
            facts={name: value for name, value in facts.items() if value is not None},
            rewards=values,
            layout=trainer.layout,
            rows=rows[:_SHOWN],
        )
        data = page_data(f"How completions were filled in at step {step} of training", [model])
        write_page(trainer._output_dir / TRACES / f"step-{step}.html", data)


def newest_trace(folder: Path) -> Path | None:
    """The page of the latest step in an output_dir, relative to it; None if there is none."""
    found = {path: path.stem.removeprefix("step-") for path in (folder / TRACES).glob("step-*.html")}
    steps = {path: int(step) for path, step in found.items() if step.isdecimal()}
    return max(steps, key=steps.__getitem__).relative_to(folder) if steps else None


def _is_due(trainer, step: int) -> bool:
    """Whether this generation batch is the first one at or behind a multiple of `trace_steps`."""
    every = trainer.args.trace_steps
    return every is not None and step % every < -(-trainer._cycle // trainer.args.gradient_accumulation_steps)


def _by_name(trainer, rewards: Tensor, rows: int) -> list[dict[str, float | None]]:
    """The rewards of this process's first rows, by their functions' names."""
    own = rewards.chunk(trainer.accelerator.num_processes)[trainer.accelerator.process_index][:rows].tolist()
    return [
        {name: None if value != value else value for name, value in zip(trainer.reward_func_names, row, strict=True)}
        for row in own
    ]


def _save_rollout(trainer, rollout: Rollout, rewards: list[dict[str, float | None]], step: int, number: int) -> None:
    """A file a process. Its name is the optimizer step, the generation batch within that step and the process: drawn
    again, it is written again.
    """
    name = f"step-{step:06d}-{number}-{trainer.accelerator.process_index}.jsonl"
    facts = {"global_step": step, "decoding": trainer.args.decoding, "block_length": trainer.sampling.block_length}
    write_rollout(trainer._output_dir / ROLLOUTS / name, rollout, trainer._tokenizer, rewards=rewards, **facts)
