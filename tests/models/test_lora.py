"""Adapters on the native families: saved, loaded and merged."""

import pytest
import torch
from cases import IDS, saved_tensors
from oracles import sharp_model
from transformers import AutoModelForCausalLM

from trl_dllm.models import FAMILIES
from trl_dllm.models.lora import LORA_TARGETS, register_lora_targets


def test_lora_saves_loads_and_merges(tmp_path, family):
    """all-linear; the merged model saves under the Hub's key names."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = sharp_model(family, dtype=torch.float32)
    base.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    assert (want - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(sharp_model(family, dtype=torch.float32), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, want)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert set(saved_tensors(tmp_path / "merged")) == set(saved_tensors(tmp_path / "plain"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, want, atol=2e-3, rtol=1e-4)


def test_a_bare_config_adapts_all_linear_projections(family):
    """In PEFT's own map, which knows the names of stock families and takes q and v alone."""
    peft = pytest.importorskip("peft")
    register_lora_targets()
    register_lora_targets()
    model = peft.get_peft_model(sharp_model(family, dtype=torch.float32), peft.LoraConfig(r=2))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == set(LORA_TARGETS)
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert targets["llama"] == ["q_proj", "v_proj"], "a stock family is left as it is"
    assert {config.model_type for config, _ in FAMILIES.values()} <= set(targets)
