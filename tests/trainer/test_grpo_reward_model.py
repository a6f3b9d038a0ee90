"""Generation without a prompt, rewarded by a sequence-classification model (d2 §5.1.1, at the size of a test)."""

import pytest
import torch
from datasets import Dataset
from helpers_grpo import build, losses, moved, tiny, weights
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from trl_dllm.models.tiny import create_tiny_tokenizer


BOS = 2


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    """A tiny classifier with one output and a tokenizer, as a folder: what TRL's `reward_funcs` takes by name."""
    folder, tokenizer = tmp_path_factory.mktemp("classifier"), create_tiny_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=1,
            initializer_range=1.0,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("by_name", [True, False], ids=["name", "module"])
@pytest.mark.parametrize("cache", [None, "exact"])
def test_a_prompt_of_bos_alone_and_a_reward_model(tmp_path, reward_model, cache, by_name):
    """Any-order decoding from one BOS at temperature 1, rewards of the classifier's on the text, weights that move."""
    model, tokenizer = tiny(num_layers=2)
    seen = []
    # TRL loads the classifier's tokenizer by the model's name, which a model in memory keeps.
    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    trainer = build(
        tmp_path,
        model=model,
        tokenizer=tokenizer,
        data=Dataset.from_dict({"prompt": ["<bos>"] * 8}),
        reward_funcs=reward_model if by_name else classifier,
        decoding="any_order",
        cache=cache,
        estimator="any_order",
        old_logps="rollout",
        temperature=1.0,
        num_iterations=2,
        max_steps=4,
    )
    decode = trainer._generate_single_turn

    def recorded(prompt_ids, *args, **kwargs):
        seen.extend(prompt_ids)
        return decode(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = recorded
    before = weights(trainer)
    trainer.train()
    assert all(list(ids) == [BOS] for ids in seen) and len(seen) >= 16
    assert moved(before, trainer)
    assert torch.tensor(losses(trainer) + losses(trainer, "grad_norm")).isfinite().all()
    assert len(losses(trainer)) == 4 and max(losses(trainer, "grad_norm")) > 0
    assert max(losses(trainer, "reward_std")) > 0, "the classifier should tell completions apart"
    assert max(losses(trainer, "sampling/mismatch_max")) < 1e-4


def test_an_infinite_reward_of_a_model_ends_the_run(tmp_path, reward_model):
    """Functions are checked when they return; a model is TRL's to call."""
    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)

    def spoil(module, inputs, logits):
        logits[0] = torch.inf

    classifier.classifier.register_forward_hook(spoil)
    trainer = build(tmp_path, reward_funcs=classifier, scale_rewards="none")
    with pytest.raises(FloatingPointError, match=r"advantages.*A reward model returned infinity"):
        trainer.train()


def test_the_reward_is_the_classifiers_logit_of_the_text(tmp_path, reward_model):
    """The mean reward logged in a step is the classifier's own on the completions that were drawn."""
    model, tokenizer = tiny(num_layers=2)
    trainer = build(
        tmp_path,
        model=model,
        tokenizer=tokenizer,
        data=Dataset.from_dict({"prompt": ["<bos>"] * 8}),
        reward_funcs=reward_model,
        decoding="any_order",
        cache="exact",
        estimator="any_order",
        max_steps=1,
    )
    rollouts, generate = [], trainer._generate_single_turn

    def recorded(*args, **kwargs):
        completions, extra = generate(*args, **kwargs)
        rollouts.extend(completions)
        return completions, extra

    trainer._generate_single_turn = recorded
    trainer.train()
    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1).eval()
    texts = ["<bos>" + text for text in tokenizer.batch_decode(rollouts, skip_special_tokens=True)]
    with torch.no_grad():
        rewards = [
            classifier(**tokenizer(text=text, return_tensors="pt", return_token_type_ids=False)).logits[0, 0].item()
            for text in texts
        ]
    assert abs(losses(trainer, "reward")[0] - sum(rewards) / len(rewards)) < 1e-4
