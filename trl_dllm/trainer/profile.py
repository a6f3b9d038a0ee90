"""Where the time of GRPO's training goes: `profile/{part}_seconds` in the log.

The parts of an optimizer step, which sum to its wall time:

- `sampling`: drawing the completions, with the weights gathered for it; or the call of a `rollout_func`;
- `old`, `reference`: the passes that score other policies than the one that is trained (a KL over the whole vocabulary
  runs its reference beside the policy, in `forward`);
- `forward`: scoring views in the update; `backward`: back-propagating them, with what is recomputed and sent between
  processes for it (and DeepSpeed's optimizer step, which it takes in there);
- `rest`: rewards, losses, planning and metrics, the optimizer, reading data, logging. Not evaluation and saving.

On CUDA the marks are events in the stream, which are read when something is logged: nothing waits for them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from transformers import TrainerCallback


PARTS = ("sampling", "old", "reference", "forward", "backward")

Mark = float | torch.cuda.Event


class Profile(TrainerCallback):
    """Times a trainer's steps. It must be told of the parts, but finds `backward` by itself.

    A step lasts from the end of the one before, or of an evaluation or a save behind it, to its own end.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self.clock = time.perf_counter  # seconds, where the device has no events of its own
        self._start = self._now()
        self._spans: list[tuple[str, Mark, Mark]] = []  # of the step that is under way; no part lies inside another
        self._steps: list[tuple[Mark, Mark, list[tuple[str, Mark, Mark]]]] = []
        # Trainer itself calls it for the last view of a micro-batch.
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)
        trainer.add_callback(self)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to the part of this name."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part and of the rest, means over the steps since the last call; empty if there were none."""
        steps, self._steps = self._steps, []
        found = dict.fromkeys((*PARTS, "rest"), 0.0) if steps else {}
        for start, end, spans in steps:
            found["rest"] += _seconds(start, end) / len(steps)
            for name, *span in spans:
                found[name] += (taken := _seconds(*span) / len(steps))
                found["rest"] -= taken
        return found

    def record(self) -> None:
        """Put the means of all processes into the trainer's metrics of training; every process takes part."""
        if not self._trainer.model.training or not self._steps:
            return
        seconds, accelerator = self.seconds(), self._trainer.accelerator
        means = accelerator.gather(torch.tensor([list(seconds.values())], device=accelerator.device)).mean(dim=0)
        for name, mean in zip(seconds, means.tolist(), strict=True):
            self._trainer._metrics["train"][f"profile/{name}_seconds"] = [mean]

    def on_step_end(self, args, state, control, **kwargs):
        end = self._now()
        self._steps.append((self._start, end, self._spans))
        self._start, self._spans = end, []

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._spans, self._steps = self._now(), [], []

    def on_evaluate(self, args, state, control, **kwargs):
        self._start, self._spans = self._now(), []

    on_save = on_evaluate

    def _now(self) -> Mark:
        if self._trainer.accelerator.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # type: ignore[operator]  # both are
    end.synchronize()
    return start.elapsed_time(end) / 1000
