"""What the GRPO tests share: a tiny sharp model, prompts of different lengths, and a trainer that checks itself.

Import it as `from helpers_grpo import …`; pytest puts this folder on the path.
"""

import copy
import gc
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from trl import GRPOTrainer

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer, Rollout
from trl_dllm.likelihood import Estimator, Plan, TokenScores, token_logps
from trl_dllm.likelihood.view import perturb_prompt
from trl_dllm.models import create_tiny_model
from trl_dllm.trainer import grpo_trainer, old_and_reference
from trl_dllm.trainer.buffer import from_batch


torch.set_num_threads(1)

# accelerate collects garbage whenever `train` starts: half of a tiny run, unless what was imported is taken out of it.
gc.collect()
gc.freeze()

# Rows differ in length: equal rows would hide wrong normalisers and wrong masks.
PROMPTS = ["ab", "abcdefg", "x", "a rather longer prompt"]


def text_prompts(repeats: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeats, "answer": [p[::-1] for p in PROMPTS] * repeats})


def chat_prompts(repeats: int = 8) -> Dataset:
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    return Dataset.from_dict({"prompt": prompts * repeats, "answer": [p[::-1] for p in PROMPTS] * repeats})


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def reward(completions, **kwargs) -> list[float]:
    """A deterministic function of the text that differs between almost all completions."""
    return [sum((i + 1) * ord(c) for i, c in enumerate(text_of(completion))) % 11 / 11 for completion in completions]


def tiny(
    family: str = "llada", hidden_size: int = 16, num_layers: int = 1, seed: int = 0, scale: float = 12.0, **kwargs
):
    """A tiny model whose predictions are far from uniform, and its tokenizer."""
    model, tokenizer = create_tiny_model(family, hidden_size, num_layers, seed, **kwargs)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
            else:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # completions end at different places
    return model, tokenizer


def with_head_bias(model, **bias: float):
    """The model with a bias on its output head: `with_head_bias(model, t1=3.0)` adds 3 to the logit of token 1."""
    head = model.lm_head
    biased = nn.Linear(head.in_features, head.out_features, bias=True, dtype=head.weight.dtype)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()
        for token, value in bias.items():
            biased.bias[int(token[1:])] = value
    model.lm_head = biased
    return model


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": "all-linear", **kwargs})


def config(folder, **kwargs) -> DiffusionGRPOConfig:
    """Two micro-batches of four rows a step, a canvas of 8 in two blocks, decoded in four steps."""
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "seed": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_steps": 1,
        "max_completion_length": 8,
        "block_length": 4,
        "diffusion_steps": 4,
    }
    return DiffusionGRPOConfig(str(folder), **{**settings, **kwargs})


def build(folder, trainer_class=DiffusionGRPOTrainer, model=None, tokenizer=None, peft=False, data=None, **kwargs):
    """A trainer on the tiny model; keywords that the trainer itself takes go to it, the others to the config."""
    own = {
        k: kwargs.pop(k) for k in ("eval_dataset", "callbacks", "quantization_config", "rollout_func") if k in kwargs
    }
    if isinstance(kwargs.get("estimator"), Estimator):
        own["estimator"] = kwargs.pop("estimator")
    rewards = kwargs.pop("reward_funcs", reward)
    if model is None:
        model, tokenizer = tiny()
    return trainer_class(
        model,
        rewards,
        config(folder, **kwargs),
        train_dataset=text_prompts() if data is None else data,
        processing_class=tokenizer,
        peft_config=(lora() if peft is True else peft) or None,
        **own,
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def moved(before: dict, trainer) -> bool:
    return any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def losses(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train_with_either_old_logps(folder, make, **settings) -> tuple[DiffusionGRPOTrainer, DiffusionGRPOTrainer]:
    """Trained with the sampler's log-probs as the old policy's, and with recomputed ones: the same to rounding."""
    runs = []
    for old in ("rollout", "recompute"):
        model, tokenizer = make()
        runs.append(build(folder / old, model=model, tokenizer=tokenizer, old_logps=old, **settings))
        runs[-1].train()
    rollout, recompute = runs
    assert losses(rollout) == pytest.approx(losses(recompute), abs=1e-5)
    ours, theirs = weights(rollout), weights(recompute)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0, msg=name)
    return rollout, recompute


def history(trainer) -> list[dict]:
    """The whole log, without times; `train_loss` is the mean over the steps of one call, which a resume divides."""
    timed = ("step_time", "_seconds", "runtime", "per_second", "train_loss")
    return [
        {key: value for key, value in entry.items() if not key.endswith(timed)} for entry in trainer.state.log_history
    ]


def as_rollout(trainer, inputs) -> Rollout:
    """The rollout of a micro-batch, as TRL's buffer carries it."""
    return from_batch(inputs, trainer.sampling.facts(trainer.spec) | {"steps": None})


class OneGraphTrainer(DiffusionGRPOTrainer):
    """The control: TRL's loss on one graph through all views."""

    def _segmented_loss(self, model, inputs, views, score, loss):
        return loss(TokenScores.sum(map(score, range(views))), record=True)


def half(completions, prompts, **kwargs) -> list[float]:
    """Groups of one prompt are all alike: eight times 0.1, whose mean is not 0.1."""
    values = reward(completions)
    return [0.1 if text_of(prompt) == "ab" else value for prompt, value in zip(prompts, values, strict=True)]


class UpdateTrainer(DiffusionGRPOTrainer):
    """Keeps the losses of its micro-steps and the gradients of its steps, and counts the rows that it scores."""

    def __init__(self, *args, **kwargs):
        self.micro_losses, self.gradients, self.scored_rows = [], [], 0
        super().__init__(*args, **kwargs)

    def _score_view(self, model, plan, number, *args, **kwargs):
        self.scored_rows += len(plan[number][1])
        return super()._score_view(model, plan, number, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.micro_losses.append(loss.item())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad})
        return super()._get_grad_norm(model, grad_norm)


class EveryView:
    """A plan of all views, each in a forward of all rows; takes a `Plan`'s arguments."""

    def __init__(self, estimator, rollout, draw, size, p_mask_prompt=0.0, skipped=None):
        self.estimator, self.seeds, self.iteration = estimator, rollout.view_seed, draw
        self.rollout = perturb_prompt(rollout, p_mask_prompt, rollout.view_seed, draw)
        self._views = [
            estimator.view(self.rollout, n, rollout.view_seed, draw) for n in range(estimator.num_views(rollout))
        ]

    num_rows = Plan.num_rows

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, number: int):
        rows = len(self.rollout)
        return self._views[number], torch.arange(rows) + (number * rows if self.estimator.apart else 0)


class PlainTrainer(UpdateTrainer):
    """The control: every view on every column, on one graph; nothing skipped, and the old policy in a pass of its own.

    Within `plainly()`, which takes away what is not a method.
    """

    _segmented_loss = OneGraphTrainer._segmented_loss

    def _compute_loss(self, model, inputs):
        assert grpo_trainer.Plan is EveryView and ("old_per_token_logps" in inputs) == self.args.scores_old
        # As if the policy had moved since the batch was drawn: the ratio is to what the buffer has.
        drawn, self._generation_round[0] = self._generation_round[0], (-1, 0)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._generation_round[0] = drawn


@contextmanager
def plainly():
    with (
        patch.object(grpo_trainer, "Plan", EveryView),
        patch.object(grpo_trainer, "compact", lambda view: view),
        patch.object(grpo_trainer, "rows_without_gradient", lambda trainer, rewards, mask: mask[:, 0] < 0),
        patch.object(old_and_reference, "_batches_of_the_first_update", lambda trainer: 0),
    ):
        yield


def update(folder, checkpoint: str, plain: bool = False, **settings) -> UpdateTrainer:
    """Two updates on one generation batch in float64, of rows that end at different places; some have no gradient."""
    settings = {
        "num_iterations": 2,
        "max_steps": 2,
        "beta": 0.0,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 1e9,
        "reward_funcs": half,
        "scale_rewards": "none",
        "stop_at_eos": False,
        "model_init_kwargs": {"dtype": "auto"},
        **settings,
    }
    if settings.get("loss_type") == "luspo":
        settings["importance_sampling_level"] = "sequence"
    with plainly() if plain else nullcontext():
        trainer = build(folder, PlainTrainer if plain else UpdateTrainer, model=checkpoint, **settings)
        trainer.train()
    return trainer


class CountingTrainer(DiffusionGRPOTrainer):
    """Counts inner iterations by itself: micro-steps since the last generation, over `steps_per_generation`."""

    _since_generation = 0

    @property
    def true_iteration(self) -> int:
        return self._since_generation // self.args.steps_per_generation

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._since_generation, self.generated_at = 0, self.state.global_step
        return outputs

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._since_generation += 1
        return loss


class CheckedTrainer(CountingTrainer):
    """Compares each micro-step's gradients with those of TRL's loss on one graph through all views.

    The log-probs of that graph come from the public `token_logps`, so the trainer's own scoring and its segmented
    backward pass are on the other side of the comparison.
    """

    def __init__(self, *args, **kwargs):
        self.gradient_errors, self.loss_errors, self.largest = [], [], []
        super().__init__(*args, **kwargs)

    def _one_graph(self, model, inputs):
        draws = inputs["old_per_token_logps"].shape[1] if "old_per_token_logps" in inputs else self.num_iterations
        stacked = {k: v for k, v in inputs.items() if k in ("old_per_token_logps", "ref_per_token_logps")}
        iteration = self.true_iteration if self.args.p_mask_prompt > 0 else 0
        assert (
            draws == (self.num_iterations if self.args.p_mask_prompt > 0 else 1) or "old_per_token_logps" not in inputs
        )
        sliced = {k: v[:, min(iteration, v.shape[1] - 1)] for k, v in stacked.items()}
        if self.state.global_step == self.generated_at:
            sliced["old_per_token_logps"] = None  # TRL takes the current policy's
        scores = token_logps(
            model,
            as_rollout(self, inputs),
            self.estimator,
            temperature=self.args.score_temperature,
            iteration=iteration,
            p_mask_prompt=self.args.p_mask_prompt,
            differentiable_entropy=True,
        )
        quiet = copy.copy(self)
        quiet._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        loss = GRPOTrainer._compute_loss(quiet, scores, {**inputs, **sliced})
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), [
            torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)
        ]

    def _compute_loss(self, model, inputs):
        if torch.is_grad_enabled():
            self._expected = self._one_graph(model, inputs)
        return super()._compute_loss(model, inputs)

    def training_step(self, *args, **kwargs):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        accumulated = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        loss = super().training_step(*args, **kwargs)
        expected_loss, expected = self._expected
        added = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for p, mine, before in zip(parameters, added, accumulated, strict=True):
            p.grad = mine if before is None else mine + before
        scale = max(g.abs().max() for g in expected)
        errors = [(a - e).abs().max() for a, e in zip(added, expected, strict=True)]
        # A micro-batch of equal rewards has no gradient at all; its error is then absolute.
        self.gradient_errors.append((max(errors) / (scale if scale > 0 else 1)).item())
        self.loss_errors.append((loss - expected_loss).abs().item())
        self.largest.append(scale.item())
        return loss
