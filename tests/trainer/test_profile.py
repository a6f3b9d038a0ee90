"""Where the time of a step goes, by a clock that only work which is known moves."""

from types import SimpleNamespace

import pytest
import torch
from helpers_grpo import build, losses, reward, text_prompts
from transformers import TrainerCallback

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.trainer import grpo_trainer, old_and_reference, profile


NAMES = (*profile.PARTS, "rest")
REWARD, OPTIMIZER, EVALUATION, SAVING = 1000.0, 3000.0, 70_000.0, 500_000.0


class Clock:
    """Does its work in no time, and says how much of each kind there was."""

    def __init__(self):
        self.now, self.work = 0.0, dict.fromkeys(NAMES, 0.0)

    def spend(self, name: str | None, seconds: float) -> None:
        self.now += seconds
        if name is not None:
            self.work[name] += seconds


class WorkingTrainer(DiffusionGRPOTrainer):
    """Each part of its step takes times that no sum of others gives."""

    clock: Clock
    scoring = None

    def _score_view(self, *args, **kwargs):
        scores = super()._score_view(*args, **kwargs)
        if not self.model.training:
            self.clock.spend(None, EVALUATION)
        elif self.scoring is not None:
            self.clock.spend(self.scoring, {"old": 2.0, "reference": 5.0}[self.scoring])
        else:
            self.clock.spend("forward", 11.0)
            if scores.logps.requires_grad:
                scores.logps.register_hook(lambda gradient: self.clock.spend("backward", 31.0))
        return scores


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    generate, policy_logps = grpo_trainer.generate, old_and_reference.policy_logps

    def drawing(model, *args, **kwargs):
        # `model.training` is the sampler's own here: without dropout.
        clock.spend("sampling", 100.0)
        return generate(model, *args, **kwargs)

    def scoring(trainer, model, batch, *args, **kwargs):
        trainer.scoring = "reference" if trainer.ref_model is model else "old"
        try:
            return policy_logps(trainer, model, batch, *args, **kwargs)
        finally:
            trainer.scoring = None

    monkeypatch.setattr(grpo_trainer, "generate", drawing)
    monkeypatch.setattr(old_and_reference, "policy_logps", scoring)
    return clock


class Saving(TrainerCallback):
    def __init__(self, clock):
        self.clock = clock

    def on_save(self, args, state, control, **kwargs):
        self.clock.spend(None, SAVING)


def working(folder, clock, **settings):
    def scored(completions, **kwargs):
        clock.spend("rest", REWARD)
        return reward(completions)

    settings = {"num_iterations": 2, "max_steps": 4, "beta": 0.04, "p_mask_prompt": 0.4, **settings}
    trainer = build(folder, WorkingTrainer, reward_funcs=scored, callbacks=[Saving(clock)], **settings)
    trainer.clock = clock
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *args: clock.spend("rest", OPTIMIZER))
    clock.work = dict.fromkeys(NAMES, 0.0)
    return trainer


def logged(trainer) -> dict[str, list[float]]:
    return {name: losses(trainer, f"profile/{name}_seconds") for name in NAMES}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_segments": 4},
        {"estimator": "mean_field"},
        {"num_segments": 4, "loss_type": "luspo"},  # two forwards a view
        {"num_segments": 4, "gradient_checkpointing": True},
        {"num_segments": 2, "steps_per_generation": 3},
    ],
    ids=str,
)
def test_each_part_has_its_own_work_and_they_sum_to_the_step(tmp_path, clock, settings):
    trainer = working(tmp_path, clock, **settings)
    start = clock.now
    trainer.train()
    found = logged(trainer)
    assert all(len(values) == 4 for values in found.values())
    assert {name: sum(values) for name, values in found.items()} == pytest.approx(clock.work)
    assert sum(clock.work.values()) == clock.now - start
    assert all(clock.work.values()), f"a part without work: {clock.work}"
    if settings.get("steps_per_generation") is None:  # completions are drawn in every second step
        assert found["sampling"] == [100.0, 0.0, 100.0, 0.0]


def test_a_log_has_the_mean_of_its_steps(tmp_path, clock):
    trainer = working(tmp_path, clock, logging_steps=2)
    trainer.train()
    found = logged(trainer)
    assert found["sampling"] == [50.0, 50.0]
    assert {name: 2 * sum(values) for name, values in found.items()} == pytest.approx(clock.work)


def test_evaluation_and_saving_are_no_part_of_a_step(tmp_path, clock):
    settings = {"eval_dataset": text_prompts(1), "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = working(tmp_path, clock, max_steps=2, save_strategy="steps", save_steps=1, logging_steps=2, **settings)
    drawn = []
    trainer._generate_single_turn = lambda *args, plain=trainer._generate_single_turn: (
        drawn.append(trainer.model.training) or plain(*args)
    )
    trainer.train()
    assert False in drawn and clock.now > 2 * SAVING + EVALUATION
    found = logged(trainer)
    assert found["sampling"] == [50.0] and found["forward"][0] == clock.work["forward"] / 2
    assert found["rest"][0] < min(SAVING, EVALUATION)
    entries = trainer.state.log_history
    assert not [key for entry in entries for key in entry if key.startswith("eval_profile")]


def test_the_log_has_the_mean_of_all_processes(tmp_path, clock):
    trainer = working(tmp_path, clock, max_steps=1)
    trainer.train()
    trainer._metrics["train"].clear()
    with trainer.profile.part("sampling"):
        clock.spend(None, 7.0)
    trainer.profile.on_step_end(None, None, None)
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda table: torch.cat([table, 3 * table])
    trainer.profile.record()
    trainer.accelerator.gather = gather
    assert trainer._metrics["train"]["profile/sampling_seconds"] == [14.0]


def test_an_outside_engine_is_the_sampling(tmp_path, clock):
    """And so is nothing else of it; its importance weights are the old policy's."""

    def engine(prompts, trainer):
        clock.spend("sampling", 17.0)
        ids = trainer.processing_class(prompts)["input_ids"]
        canvas = [[7 + i % 5, *range(9, 16)] for i in range(len(prompts))]
        steps = [[0, 0, 1, 1, 2, 2, 3, 3]] * len(prompts)
        return {
            "prompt_ids": ids,
            "completion_ids": canvas,
            "canvas_ids": canvas,
            "unmask_step": steps,
            "logprobs": [[-1.0] * 8] * len(prompts),
        }

    trainer = working(tmp_path, clock, rollout_func=engine, estimator="mean_field")
    trainer.train()
    found = logged(trainer)
    assert {name: sum(values) for name, values in found.items()} == pytest.approx(clock.work)
    assert clock.work["sampling"] == 34.0 and clock.work["old"] > 0


def test_the_names_are_not_trls(tmp_path):
    """By a real clock: what is logged is positive, and a step is not longer than the run."""
    trainer = build(tmp_path, max_steps=2, report_to="none")
    trainer.train()
    found = logged(trainer)
    assert all(value > 0 for name in ("sampling", "forward", "backward", "rest") for value in found[name])
    assert found["old"] == found["reference"] == [0.0, 0.0]
    entry = trainer.state.log_history[0]
    step = sum(values[0] for values in found.values())
    assert entry["step_time"] < step < entry["step_time"] + 1, "the step without its optimizer, and with it"


class Event:
    """CUDA's events, without CUDA: a mark in a stream, of which nobody knows before it is waited for."""

    now, waits = 0.0, 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, end) -> float:
        return 1000 * (end.at - self.at)


def test_on_cuda_nothing_waits_before_the_log(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cuda"), backward=lambda loss: None),
        add_callback=lambda callback: None,
    )
    timed = profile.Profile(trainer)
    for _ in range(2):
        with timed.part("forward"):
            Event.now += 2.0
        trainer.accelerator.backward(None)
        Event.now += 1.0
        timed.on_step_end(None, None, None)
    assert Event.waits == 0
    assert timed.seconds() == {"sampling": 0, "old": 0, "reference": 0, "forward": 2.0, "backward": 0, "rest": 1.0}
    assert Event.waits > 0 and timed.seconds() == {}
