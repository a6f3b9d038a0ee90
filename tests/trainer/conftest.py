"""Checkpoints without weights, for what must be refused before any is loaded."""

import pytest
from helpers_grpo import tiny
from transformers import PreTrainedModel


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weight fails the test."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the error")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(config, mask=True)`: a folder with a config and a tokenizer, and no weights at all."""

    def write(model_config=None, mask=True) -> str:
        model, tokenizer = tiny()
        if not mask:
            tokenizer.mask_token = None
        folder = tmp_path / "checkpoint"
        model_config = model_config or model.config
        model_config.architectures = model_config.architectures or ["LLaDAModelLM"]
        model_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write
