"""Runs of the GRPO trainer that a single process and a worker of several describe in the same words."""

import torch
from helpers_grpo import build, history, lora, losses, tiny, weights
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


def run_in_memory(folder, checkpoint: str, **settings) -> dict:
    """Full fine-tuning with a reference, on a model that was made in memory: TRL loads the reference by name."""
    model, tokenizer = tiny(num_layers=2)
    trainer = build(folder, model=model, tokenizer=tokenizer, beta=0.04, max_steps=2, ddp_timeout=60, **settings)
    initial = tiny(num_layers=2)[0].state_dict()
    found = trainer.ref_model.state_dict()
    same = initial.keys() == found.keys() and all(torch.equal(initial[name], found[name]) for name in initial)
    trainer.train()
    return {"reference": same, "kl": losses(trainer, "kl")}


def run_broken(folder, checkpoint: str, **settings) -> dict:
    """Only the last process scores a row that is not finite."""
    trainer = build(folder, model=checkpoint, max_steps=2, ddp_timeout=60, **settings)
    score = trainer._score_view

    def scoring(*args, **kwargs):
        scores = score(*args, **kwargs)
        broken = torch.is_grad_enabled() and trainer.accelerator.is_last_process and trainer.state.global_step == 1
        return scores.map(lambda table: table * torch.nan) if broken else scores

    trainer._score_view = scoring
    try:
        trainer.train()
    except FloatingPointError as error:
        finite = all(value.isfinite().all().item() for value in weights(trainer).values())
        return {"error": str(error), "finite": finite, "steps": trainer.state.global_step}
    return {"error": None}


def run_resumed(folder, checkpoint: str, peft: bool = False, steps=(1, 2, 3), **settings) -> dict:
    """A run, and the same one resumed from some of its checkpoints: whether each is the first, bit for bit."""

    def make():
        return build(
            folder,
            model=checkpoint,
            peft=peft,
            beta=0.04,
            p_mask_prompt=0.15,
            num_iterations=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            ddp_timeout=60,
            **settings,
        )

    whole = make()
    whole.train()
    found = {"flops": whole.flops.counted, "same": []}
    for step in steps:
        resumed = make()
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        equal = all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
        found["same"].append([equal, history(resumed) == history(whole), resumed.flops == whole.flops])
    return found
