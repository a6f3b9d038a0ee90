"""Runs of the GRPO trainer that a single process and a worker of several describe in the same words."""

import torch
from helpers_grpo import build, lora, losses
from torch.nn.parallel import DistributedDataParallel

from trl_dllm import DiffusionGRPOTrainer


class RecordingTrainer(DiffusionGRPOTrainer):
    """Keeps the rollouts of its process, and counts DDP's reductions."""

    def __init__(self, *args, **kwargs):
        self.rollouts, self.reductions, self.wrappers, self.views = [], 0, set(), []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        names = ("view_seed", "completion_ids", "unmask_step", "advantages")
        rows = zip(*(outputs[name].tolist() for name in names), strict=True)
        self.rollouts.append([[self.state.global_step, *row] for row in rows])
        return outputs

    def _num_views(self, rollout):
        needed, run = self.estimator.num_views(rollout), super()._num_views(rollout)
        self.views.append([needed, run])
        return run

    def training_step(self, model, *args, **kwargs):
        if isinstance(model, DistributedDataParallel) and not self.wrappers:
            model.register_comm_hook(self, _count_and_reduce)
        self.wrappers.add(type(model).__name__)
        return super().training_step(model, *args, **kwargs)


def _count_and_reduce(trainer, bucket):
    if bucket.is_last():
        trainer.reductions += 1
    summed = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda future: future.value()[0] / torch.distributed.get_world_size())


def run(folder, checkpoint: str, peft: bool = False, **settings) -> dict:
    """Two generation cycles of two inner iterations; what the run did, as plain values."""
    settings = {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "beta": 0.04,
        "p_mask_prompt": 0.15,
        "learning_rate": 0.01,
        "optim": "sgd",  # Adam turns the sign of a rounding error into a full step
        "ddp_timeout": 60,
        **settings,
    }
    # Both matrices random, so that every adapter weight has a gradient from the first step.
    adapter = lora(init_lora_weights=False, lora_alpha=2) if peft else False
    trainer = build(folder, RecordingTrainer, model=checkpoint, peft=adapter, **settings)
    trainer.train()
    return {
        "loss": losses(trainer),
        "grad_norm": [float(value) for value in losses(trainer, "grad_norm")],
        "kl": losses(trainer, "kl"),
        "rollouts": trainer.rollouts,
        "reductions": trainer.reductions,
        "views": trainer.views,
        "wrapper": sorted(trainer.wrappers),
    }
