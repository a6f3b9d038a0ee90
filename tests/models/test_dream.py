"""Dream: Qwen2's keys, and Qwen2's forward without its causal mask."""

import json

import torch
from cases import IDS, saved_tensors
from oracles import sharp_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trl_dllm.models import DreamConfig, DreamModel


def test_dream_equals_bidirectional_qwen2(tmp_path):
    """Same keys as Qwen2, bit-identical; the folder loads as either."""
    model = sharp_model("dream", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "Dream" and config["is_causal"] is False and config["logits_shift"] == 1
    assert set(saved_tensors(tmp_path)) == set(model.state_dict())
    qwen_config = Qwen2Config(**{k: v for k, v in config.items() if k not in ("model_type", "is_causal")})
    qwen = Qwen2ForCausalLM(qwen_config).eval()
    qwen.load_state_dict(saved_tensors(tmp_path))
    with torch.no_grad():
        causal = qwen(input_ids=IDS).logits
        qwen.config.is_causal = False
        want, got = qwen(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert torch.equal(got, want)
    assert (causal - want).abs().max() > 0.1
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is DreamModel and type(loaded.config) is DreamConfig
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, got)


def test_dream_strips_auto_map(tmp_path):
    model = sharp_model("dream", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config
    remote = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": remote, "rope_theta": 77.0}))
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is DreamConfig and again.auto_map == {}, "TRL reads it"
    again.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_dream_reads_the_hubs_rope_theta(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Dream", "rope_theta": 1e6, "hidden_size": 64}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.mask_token_id, config.eos_token_id, config.logits_shift) == (151666, 151643, 1)
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["rope_theta"] == 1e6, "where the original code looks for it"
