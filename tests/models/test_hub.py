"""A config's original names, and the Hub's keys in a state dict."""

import json

import pytest
import torch
from cases import IDS, saved_tensors
from torch import nn
from transformers import LlamaConfig

from trl_dllm.models import create_tiny_model
from trl_dllm.models.hub import HubConfig


class Config(HubConfig, LlamaConfig):
    model_type = "test_hub"
    hub_names = {"width": "hidden_size", "depth": "num_hidden_layers"}  # noqa: RUF012
    hub_fixed = {"bent": (False, None), "hidden_act": ("silu",)}  # noqa: RUF012


def test_original_names_are_read_and_both_are_written(tmp_path):
    config = Config(
        width=64, num_hidden_layers=3, depth=None, rope_theta=77.0, auto_map={"AutoConfig": "remote.Config"}
    )
    assert (config.hidden_size, config.num_hidden_layers) == (64, 3) and not config.auto_map
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["width"], written["hidden_size"], written["depth"], written["num_hidden_layers"]) == (64, 64, 3, 3)
    assert written["rope_theta"] == 77.0 and written["bent"] is False and "auto_map" not in written
    again = Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(("name", "value"), [("bent", True), ("hidden_act", "gelu")])
def test_what_the_stock_decoder_does_not_compute_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} in a Config: this implementation has (False|'silu'), as"):
        Config(**{name: value})
    assert Config(bent=None).bent is None


@pytest.mark.parametrize("family", ["llada", "llada_moe", "llada2"])
def test_a_state_dict_with_the_hubs_keys_is_loaded_beside_another_modules(tmp_path, family):
    """Under a prefix, with keys of a neighbour that must not be touched; nothing of it is left over."""
    model, _ = create_tiny_model(family, hidden_size=32, num_layers=2, seed=0)
    other, _ = create_tiny_model(family, hidden_size=32, num_layers=2, seed=1)
    model.save_pretrained(tmp_path)
    state = {f"inner.{key}": value for key, value in saved_tensors(tmp_path).items()}
    state["model.transformer.wte.weight"] = torch.ones(1, 1)
    both = nn.ModuleDict(
        {"inner": other, "model": nn.ModuleDict({"transformer": nn.ModuleDict({"wte": nn.Linear(1, 1, False)})})}
    )
    result = both.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert both["model"]["transformer"]["wte"].weight == 1
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not other.load_state_dict(model.state_dict()).unexpected_keys, "its own keys as they are"


def test_a_layers_experts_are_taken_whole_or_not_at_all(tmp_path):
    """A shard that ends inside a layer would otherwise leave some of its experts as they were."""
    model, _ = create_tiny_model("llada_moe", hidden_size=32, num_layers=2)
    model.save_pretrained(tmp_path)
    state = {key: value for key, value in saved_tensors(tmp_path).items() if "0.mlp.experts.3" not in key}
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        model.load_state_dict(state, strict=False)
