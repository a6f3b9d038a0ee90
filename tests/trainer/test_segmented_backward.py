"""Memory does not grow with the number of views: one forward and one backward at a time."""

import pytest
import torch
from helpers_grpo import CheckedTrainer, OneGraphTrainer, build, tiny

from trl_dllm import DiffusionGRPOTrainer


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Peak bytes of the storages that autograd graphs hold at a time, parameters excluded."""

    def __init__(self, parameters):
        self.excluded = {p.untyped_storage().data_ptr() for p in parameters}
        self.holders, self.bytes, self.peak, self.packed = {}, 0, 0, 0
        tracker = self

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor.detach()  # the tensor itself would be a reference cycle through its own graph
                self.storage = tensor.untyped_storage().data_ptr()
                if self.storage not in tracker.excluded:
                    tracker.hold(self.storage, tensor.untyped_storage().nbytes())

            def __del__(self):
                if self.storage not in tracker.excluded:
                    tracker.release(self.storage)

        super().__init__(Held, lambda held: held.tensor)

    def hold(self, storage, nbytes):
        self.packed += 1
        count, _ = self.holders.get(storage, (0, 0))
        self.bytes += nbytes if count == 0 else 0
        self.holders[storage] = (count + 1, nbytes)
        self.peak = max(self.peak, self.bytes)

    def release(self, storage):
        count, nbytes = self.holders.pop(storage)
        if count > 1:
            self.holders[storage] = (count - 1, nbytes)
        else:
            self.bytes -= nbytes


def peak(folder, trainer_class=DiffusionGRPOTrainer, **kwargs) -> int:
    model, tokenizer = tiny(hidden_size=32, num_layers=2)
    trainer = build(
        folder,
        trainer_class,
        model=model,
        tokenizer=tokenizer,
        max_completion_length=32,
        block_length=32,
        diffusion_steps=16,
        beta=0.0,
        num_iterations=2,
        max_steps=1,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        **kwargs,
    )
    step, found = trainer.training_step, []

    def measured(*args, **kwargs):
        saved = SavedTensors(trainer.model.parameters())
        with saved:
            loss = step(*args, **kwargs)
        found.append(saved)
        return loss

    trainer.training_step = measured
    trainer.train()
    (saved,) = found
    assert saved.packed > 0 and saved.bytes == 0, "graphs outlive the step"
    return saved.peak


@pytest.mark.parametrize("loss_type", ["grpo", "luspo"], ids=["separable", "not separable"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_sixteen_views_need_no_more_memory_than_one(tmp_path, loss_type, checkpointing):
    settings = {"loss_type": loss_type, "gradient_checkpointing": checkpointing}
    one = peak(tmp_path, num_segments=1, **settings)
    sixteen = peak(tmp_path, num_segments=16, **settings)
    assert sixteen <= 1.2 * one, (sixteen, one)


def test_the_measure_sees_a_graph_through_all_views(tmp_path):
    """Negative control: with one graph, sixteen views need many times as much."""
    assert peak(tmp_path, OneGraphTrainer, num_segments=16) > 4 * peak(tmp_path, num_segments=1)


def test_the_views_of_a_step_run_one_after_the_other(tmp_path, monkeypatch):
    """N forwards and N backwards for a separable loss; a first pass without gradients for the others."""
    counts = {}
    for loss_type in ("grpo", "luspo"):
        calls = {"with gradients": 0, "without": 0}
        trainer = build(tmp_path, num_segments=4, loss_type=loss_type, gradient_accumulation_steps=1, max_steps=1)
        score = trainer._score_view

        def counting(*args, calls=calls, score=score, **kwargs):
            calls["with gradients" if torch.is_grad_enabled() else "without"] += 1
            return score(*args, **kwargs)

        trainer._score_view = counting
        trainer.train()
        counts[loss_type] = (calls["with gradients"], calls["without"])
    assert counts == {"grpo": (4, 0), "luspo": (4, 4)}


def test_the_gradients_of_sixteen_views_are_those_of_one_graph(tmp_path):
    trainer = build(
        tmp_path, CheckedTrainer, num_segments=8, max_completion_length=16, block_length=16, diffusion_steps=8
    )
    trainer.train()
    assert max(trainer.gradient_errors) < 1e-6
