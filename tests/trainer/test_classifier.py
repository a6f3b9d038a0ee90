"""A classifier's label as a reward: its log-probability, with special tokens, cut at the classifier's length."""

import json

import pytest
import torch
from helpers_classifier import LABELS, POSITIONS, write_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

from trl_dllm.trainer.classifier import ClassifierReward


TEXTS = ["a text", "", "x", "another one, which is longer", "you!"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def slow_rewards(folder: str, texts: list[str], number: int) -> list[float]:
    """A text at a time: `<s>`, the characters, `</s>`."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = []
    for text in texts:
        characters = [tokenizer.convert_tokens_to_ids(c) for c in text or " "][: POSITIONS - 2]
        ids = torch.tensor([[tokenizer.bos_token_id, *characters, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        out.append((logits[number] - logits.logsumexp(0)).item())
    return out


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("label", [*LABELS, "1"])
def test_the_reward_is_the_labels_log_probability(classifier, label, batch_size):
    reward = ClassifierReward(classifier, label, batch_size)
    number = LABELS.index(label) if label in LABELS else 1
    texts = [*TEXTS, "a text without end " * 9]  # more tokens than the classifier has positions
    assert reward.check() == number and reward.__name__ == f"log_prob_{label}"
    got, want = reward(completions=texts, prompts=["p"] * len(texts)), slow_rewards(classifier, texts, number)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want).float(), atol=1e-5, rtol=1e-5)
    assert max(got) < 0 and max(got) - min(got) > 0.5, "which tells texts apart"


def test_messages_are_read_by_their_content(classifier):
    reward = ClassifierReward(classifier, "toxic")
    assert reward([[{"role": "assistant", "content": text}] for text in TEXTS]) == reward(TEXTS)


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(tmp_path):
    folder = write_classifier(tmp_path, problem_type="multi_label_classification")
    chances = [torch.tensor(ClassifierReward(folder, label)(TEXTS)).exp() for label in LABELS]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        want = model(**tokenizer("a text", return_tensors="pt")).logits[0].sigmoid()
    torch.testing.assert_close(torch.stack(chances)[:, 0], want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sum(chances), torch.ones(len(TEXTS)), atol=0.01)


def test_what_is_no_label_is_refused_before_weights_are_loaded(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"label='toxik' is no label of .*: name one of neutral, toxic, odd"):
        ClassifierReward(classifier, "toxik").check()
    write_classifier(tmp_path, num_labels=1)
    with pytest.raises(ValueError, match=r"has one output and no labels to choose from. Leave reward_model_label out"):
        ClassifierReward(str(tmp_path), "toxic").check()
    with pytest.raises(OSError, match="nowhere"):
        ClassifierReward("./nowhere", "toxic").check()


def test_zero_3_would_shard_the_classifier(classifier):
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"under ZeRO-3: the classifier would be sharded.* Use ZeRO-2"):
        ClassifierReward(classifier, "toxic").check()
    del config
    assert ClassifierReward(classifier, "toxic").check() == 1


def test_the_config_alone_is_read_to_check(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "id2label": {"0": "a", "1": "b"}}))
    assert ClassifierReward(str(tmp_path), "b").check() == 1
