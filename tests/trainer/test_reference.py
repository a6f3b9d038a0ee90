"""The reference policy: its folder, its log-probs, and that it stands still."""

from pathlib import Path

import pytest
import torch
from helpers_grpo import build, lora, losses, tiny
from peft import get_peft_model

from trl_dllm.trainer.reference import as_reference, reference_source


def test_a_model_made_in_memory_has_a_folder_while_trl_loads_from_it():
    model, _ = tiny()
    with reference_source(model, needed=True):
        folder = Path(model.config._name_or_path)
        assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
    assert not folder.exists() and model.config._name_or_path == ""


def test_no_folder_is_written_where_none_is_needed(tmp_path):
    model, _ = tiny()
    with reference_source(model, needed=False):
        assert model.config._name_or_path == ""
    with reference_source(get_peft_model(model, lora()), needed=True):
        assert model.config._name_or_path == ""
    named, _ = tiny()
    named.config._name_or_path = str(tmp_path)
    with reference_source(named, needed=True):
        assert named.config._name_or_path == str(tmp_path) and not list(tmp_path.iterdir())
    with reference_source("a/name", needed=True):
        pass


@pytest.mark.parametrize("kind", ["full", "lora", "already adapted"])
def test_the_reference_is_the_policy_before_training(tmp_path, kind):
    """A model of its own, the base under a new adapter, or a copy of the adapter that the model came with."""
    model, tokenizer = tiny()
    if kind == "already adapted":
        model = get_peft_model(model, lora(init_lora_weights=False))
    trainer = build(tmp_path, model=model, tokenizer=tokenizer, peft=kind == "lora", beta=0.04, max_steps=2)
    ids = torch.tensor([[7, 30, 3, 3]])
    with torch.no_grad():
        before = trainer.model(input_ids=ids).logits
    trainer.train()
    with torch.no_grad():
        with as_reference(trainer) as reference:
            torch.testing.assert_close(reference(input_ids=ids).logits, before, atol=1e-6, rtol=0)
        assert (trainer.model(input_ids=ids).logits - before).abs().max() > 1e-3


def test_a_reference_that_follows_the_policy_is_trls(tmp_path):
    trainer = build(
        tmp_path, beta=0.04, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, max_steps=3
    )
    trainer.train()
    policy, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert all(torch.allclose(policy[name], reference[name]) for name in policy)
    assert max(losses(trainer, "kl")) < 1e-6
