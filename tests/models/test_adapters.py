"""Adapters: under LLaDA's original names they do what they did there; whatever does not fit is refused."""

import importlib.util
import json
import re

import pytest
import torch
from cases import IDS
from oracles import sharp_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_dllm.models import create_tiny_model
from trl_dllm.models.adapters import load_adapter, resume_adapters


# LLaDA's remote modelling code names its modules so.
ORIGINAL = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
D1_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]  # half of them exist there
LORA = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}


def original_name(key: str) -> str:
    """A native adapter's key as LLaDA's remote code would have it."""
    key = key.replace("model.model.embed_tokens.", "model.model.transformer.wte.")
    key = key.replace("model.lm_head.", "model.model.transformer.ff_out.")
    for native, original in ORIGINAL.items():
        key = key.replace(f".{native}.", f".{original}.")
    return key.replace("model.model.layers.", "model.model.transformer.blocks.")


def base(dtype=torch.float32):
    return sharp_model("llada", dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def save_native(folder, **config):
    """A random adapter in native names, and the logits of the model that it was on."""
    torch.manual_seed(3)
    model = get_peft_model(base(), LoraConfig(**{**LORA, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def save_original(folder, native: dict, **original):
    """The adapter `native` as LLaDA's remote code would have written it, whose config says `original`."""
    want = save_native(folder, **native)
    state = {original_name(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    assert all(key.startswith("base_model.model.model.transformer.") for key in state)
    save_file(state, folder / "adapter_model.safetensors")
    edit_config(folder, base_model_name_or_path="GSAI-ML/LLaDA-8B-Instruct", **original)
    return want


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CASES = {
    # d1's: of its seven targets, remote LLaDA has four.
    "d1": ({"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"]}, {"target_modules": D1_TARGETS}),
    "every matrix and the head": (
        {"target_modules": ["lm_head", *(name.split(".")[1] for name in ORIGINAL)]},
        {"target_modules": list(ORIGINAL.values())},
    ),
    "some layers, ranks and scales of their own": (
        {
            "target_modules": ["layers.1.self_attn.o_proj", "layers.1.mlp.down_proj", "layers.1.mlp.gate_proj"],
            "rank_pattern": {"o_proj": 2, "down_proj": 3},
            "alpha_pattern": {"down_proj": 64, "gate_proj": 5},
        },
        {
            "target_modules": ["attn_out", "ff_out", "ff_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "blocks",
            "exclude_modules": ["model.transformer.ff_out"],
            "rank_pattern": {"attn_out": 2, r"blocks\.\d+\.ff_out": 3},
            "alpha_pattern": {"ff_out": 64, "ff_proj": 5},
        },
    ),
    "DoRA, and embeddings and head trained whole": (
        {"target_modules": ["v_proj"], "use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["wte", "transformer.ff_out"]},
    ),
    "embeddings": ({"target_modules": ["embed_tokens"]}, {"target_modules": ["wte"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_in_llada_s_original_names_does_what_it_did_there(tmp_path, case):
    native, original = CASES[case]
    plain, want = logits(base()), save_original(tmp_path / "original", native, **original)
    assert (want - plain).abs().max() > 0.1
    model = load_adapter(base(), tmp_path / "original")
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "native", save_embedding_layers=False)
    assert torch.equal(logits(load_adapter(base(), tmp_path / "native")), want)
    keys = load_file(tmp_path / "native" / "adapter_model.safetensors").keys()
    assert not any("transformer." in key for key in keys)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_trained_of_a_loaded_adapter(tmp_path, is_trainable):
    save_native(tmp_path, target_modules=["q_proj"])
    model = load_adapter(base(), tmp_path, is_trainable=is_trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({name for name, _ in model.named_parameters() if "lora_" in name} if is_trainable else set())


def test_an_adapter_of_a_family_that_is_not_renamed(tmp_path):
    model = get_peft_model(sharp_model("dream"), LoraConfig(**LORA, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(sharp_model("dream"), tmp_path)), logits(model))


def change_keys(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({change(key): value for key, value in load_file(path).items() if change(key)}, path)


@pytest.mark.parametrize("layers", ["layers.1.self_attn", "transformer.blocks.1"])
def test_weights_that_the_model_has_no_place_for_are_an_error(tmp_path, layers):
    """The message names them as the file does."""
    if "transformer" in layers:
        save_original(tmp_path, {"target_modules": ["q_proj", "v_proj"]}, target_modules=["q_proj", "v_proj"])
    else:
        save_native(tmp_path, target_modules=["q_proj", "v_proj"])
    change_keys(tmp_path, lambda key: key.replace(f"{layers}.v_proj", f"{layers}.att_proj"))
    error = (
        f"2 weights of the adapter that the model has no place for: base_model.model.model.{layers}.att_proj.lora_A"
    )
    with pytest.raises(ValueError, match=f"{re.escape(error)}.*Load it onto the model that it was trained on"):
        load_adapter(base(), tmp_path)


def test_places_that_the_adapter_has_no_weights_for_are_an_error(tmp_path):
    save_native(tmp_path, target_modules=["q_proj"])
    change_keys(tmp_path, lambda key: key if "layers.0" in key else "")
    with pytest.raises(ValueError, match=r"2 places in the model.* base_model\.model\.model\.layers\.1\.self_attn"):
        load_adapter(base(), tmp_path)


def test_a_module_that_is_trained_whole_and_not_in_the_file_is_an_error(tmp_path):
    save_native(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    change_keys(tmp_path, lambda key: key if "lora" in key else "")
    with pytest.raises(ValueError, match=r"1 places in the model .*: base_model.model.lm_head.weight"):
        load_adapter(base(), tmp_path)


def test_what_original_names_are_not_translated_for(tmp_path):
    save_original(tmp_path, {"target_modules": ["q_proj"]}, layer_replication=[[0, 1], [0, 2]])
    with pytest.raises(ValueError, match=r"original module names.*layer_replication=\[\[0, 1\], \[0, 2\]\] cannot"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(tmp_path, kind):
    get_peft_model(base(), kind(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"virtual tokens before the prompt.*Use LoRA"):
        load_adapter(base(), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_adapter_on_a_quantised_model(tmp_path):
    """The adapter's own share of a 4-bit layer's output is that of the layer in full precision."""
    model, _ = create_tiny_model("llada", hidden_size=64, num_layers=2, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**LORA, target_modules=["q_proj", "down_proj"])).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    change_keys(tmp_path / "adapter", original_name)
    edit_config(tmp_path / "adapter", target_modules=["q_proj", "ff_out"])
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit)
    loaded = load_adapter(quantised, tmp_path / "adapter")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer, want = loaded.get_base_model().get_submodule(name), adapted.get_base_model().get_submodule(name)
        assert type(layer.base_layer).__name__ == "Linear4bit"
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            share = layer(x) - layer.base_layer(x)
            torch.testing.assert_close(share, want(x) - want.base_layer(x), atol=1e-5, rtol=1e-5)
        assert share.abs().max() > 0.01
    assert logits(loaded).isfinite().all()


def test_resuming_loads_every_adapter_of_a_checkpoint(tmp_path):
    """PEFT's own `load_adapter`, which Trainer calls, loads nothing under original names, and says nothing."""
    native = {"target_modules": ["q_proj", "down_proj"]}
    want = save_original(tmp_path, native, target_modules=["q_proj", "ff_out"])
    torch.manual_seed(4)
    model = get_peft_model(base(), LoraConfig(**LORA, **native))
    model.add_adapter("ref", LoraConfig(**LORA, **native))
    assert not torch.equal(logits(model), want)
    resume_adapters(model, tmp_path)
    assert torch.equal(logits(model), want)
    (tmp_path / "ref").mkdir()
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "ref" / "adapter_model.safetensors")
    model.set_adapter("ref")
    assert not torch.equal(logits(model), want)
    resume_adapters(model, tmp_path)
    assert torch.equal(logits(model), want)
    change_keys(tmp_path / "ref", lambda key: key if "blocks.0" in key else "")
    with pytest.raises(ValueError, match="4 places in the model that the adapter has no weights for"):
        resume_adapters(model, tmp_path)
    resume_adapters(base(), tmp_path)  # a model without adapters has nothing to load
