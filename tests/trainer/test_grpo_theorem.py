"""Identity 9 (docs/methods.md §7) on real TRL: the expected gradient is the expected reward's (d2 Theorem 3.1).

Every rollout of a three-token canvas is enumerated and fed to `_compute_loss` with its probability as weight. The
other side is brute force: the gradient of Σ P(rollout) · reward through the plain model's logits, with none of the
library's scoring.
"""

import itertools

import pytest
import torch
from datasets import Dataset
from helpers_grpo import build, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_dllm.likelihood import ExactTrajectory, StepMerge
from trl_dllm.rollout import count_until_eos


# Llama's norms and rotary tables are float32 whatever the model is, hence 1e-6 and not 1e-12.
TOLERANCE = 1e-6
A, B, EOS, MASK = 0, 1, 2, 3
LENGTH, TEMPERATURE = 3, 0.7

# A value-independent order: (unmask step of each position, probability).
ORDERS = {
    "left to right, one a step": [((0, 1, 2), 1.0)],
    "random, one a step": [(order, 1 / 6) for order in itertools.permutations(range(3))],
    "random, two then one": [((0, 0, 1), 1 / 3), ((0, 1, 0), 1 / 3), ((1, 0, 0), 1 / 3)],
    "all at once": [((0, 0, 0), 1.0)],
}


def tokenizer():
    vocabulary = {"a": A, "b": B, "<eos>": EOS, "<mask>": MASK}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", mask_token="<mask>")


def toy_reward(canvas) -> float:
    """Not additive over positions, and it depends on what stands behind an EOS."""
    a, b, c = canvas
    return 1.0 + 2.0 * (a == b) - 1.5 * (b == EOS) * (c == A) + 0.5 * c * a


def log_probability(model, prompt, canvas, steps):
    """Brute force: what the sampler's values are drawn with, step by step, from the plain model's logits."""
    total = 0.0
    for step in range(max(steps) + 1):
        state = [token if s < step else MASK for token, s in zip(canvas, steps, strict=True)]
        logits = model(torch.tensor([[*prompt, *state]])).logits[0, len(prompt) :, :MASK]  # the mask is no sample
        log_p = (logits / TEMPERATURE).log_softmax(dim=-1)
        for position in range(LENGTH):
            if steps[position] == step:
                total = total + log_p[position, canvas[position]]
    return total


@pytest.fixture
def trainer(tmp_path):
    def make(estimator, loss_tokens="canvas"):
        model, _ = tiny(vocab_size=4, mask_token_id=MASK, pad_token_id=EOS, eos_token_id=EOS, bos_token_id=None)
        return build(
            tmp_path,
            model=model.double(),
            tokenizer=tokenizer(),
            data=Dataset.from_dict({"prompt": ["ab", "b"] * 4}),
            estimator=estimator,
            loss_type="dr_grpo",
            temperature=TEMPERATURE,
            loss_tokens=loss_tokens,
            beta=0.0,
            max_completion_length=LENGTH,
            block_length=LENGTH,
            diffusion_steps=LENGTH,
            num_segments=1,
            gradient_accumulation_steps=1,
        )

    return make


def both_gradients(trainer, orders, loss_tokens="canvas", prompt=(A, B)):
    """(expected gradient of the trainer's loss as a plain sum, gradient of the expected reward), flattened."""
    model = trainer.model.train()
    rollouts = [(canvas, steps, p) for canvas in itertools.product((A, B, EOS), repeat=LENGTH) for steps, p in orders]
    log_p = torch.stack([log_probability(model, prompt, canvas, steps) for canvas, steps, _ in rollouts])
    probability = log_p.exp() * torch.tensor([p for *_, p in rollouts], dtype=torch.float64)
    assert abs(probability.sum().item() - 1) < 1e-9
    rewards = torch.tensor([toy_reward(canvas) for canvas, *_ in rollouts], dtype=torch.float64)
    parameters = list(model.parameters())
    enumerated = torch.autograd.grad((probability * rewards).sum(), parameters, allow_unused=True)

    # The rollouts, with their probability as weight, behind a padding column that counts for nothing.
    rows = len(rollouts)
    canvas = torch.tensor([c for c, *_ in rollouts])
    steps = torch.tensor([s for _, s, _ in rollouts])
    counted = steps >= 0 if loss_tokens == "canvas" else count_until_eos(canvas, steps, [EOS])
    inputs = {
        "prompt_ids": torch.tensor([[EOS, *prompt]]).expand(rows, -1),
        "prompt_mask": torch.tensor([[0] + [1] * len(prompt)]).expand(rows, -1),
        "completion_ids": canvas,
        "completion_mask": counted.long(),
        "unmask_step": steps,
        "counted": counted,
        "rollout_logps": torch.zeros(rows, LENGTH, dtype=torch.float64),
        "view_seed": torch.arange(rows),
        "advantages": (rewards * probability).detach(),
        "num_items_in_batch": counted.sum(),
    }
    trainer.current_gradient_accumulation_steps = 1
    model.zero_grad()
    trainer.accelerator.backward(trainer._compute_loss(model, inputs))
    # dr_grpo divides by rows · canvas and minimises.
    trained = [torch.zeros_like(p) if p.grad is None else -rows * LENGTH * p.grad for p in parameters]
    enumerated = [torch.zeros_like(p) if g is None else g for g, p in zip(enumerated, parameters, strict=True)]
    return torch.cat([g.flatten() for g in trained]), torch.cat([g.flatten() for g in enumerated])


@pytest.mark.parametrize("order", ORDERS)
def test_expected_gradient_is_the_gradient_of_the_expected_reward(trainer, order):
    trained, enumerated = both_gradients(trainer(ExactTrajectory()), ORDERS[order])
    assert enumerated.abs().max() > 1e-2
    assert (trained - enumerated).abs().max() < TOLERANCE * enumerated.abs().max()


def test_the_same_holds_for_as_many_segments_as_steps(trainer):
    trained, enumerated = both_gradients(trainer(StepMerge(5)), ORDERS["random, two then one"])
    assert (trained - enumerated).abs().max() < TOLERANCE * enumerated.abs().max()


def test_mean_field_is_biased_and_so_is_the_eos_cut_out_of_order(trainer):
    """Negative controls: what identity 9 excludes does differ here."""
    for estimator, tokens in ((StepMerge(1), "canvas"), (ExactTrajectory(), "eos")):
        trained, enumerated = both_gradients(trainer(estimator, tokens), ORDERS["random, one a step"], tokens)
        assert (trained - enumerated).abs().max() > 1e-2 * enumerated.abs().max()


def test_the_eos_cut_is_unbiased_left_to_right_if_the_reward_is_cut_too(trainer, monkeypatch):
    def cut_reward(canvas):
        tokens = list(canvas[: canvas.index(EOS)] if EOS in canvas else canvas)
        return float(len(tokens) + 3 * (tokens[:1] == [B]))

    monkeypatch.setitem(globals(), "toy_reward", cut_reward)
    trained, enumerated = both_gradients(trainer(ExactTrajectory(), "eos"), ORDERS["left to right, one a step"], "eos")
    assert (trained - enumerated).abs().max() < TOLERANCE * enumerated.abs().max()
