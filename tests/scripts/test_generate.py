"""The model that `generate`, `eval` and `report` load."""

import json

import torch
from cases import IDS
from oracles import sharp_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_dllm.models import create_tiny_model
from trl_dllm.scripts import generate


def test_an_adapter_in_the_original_names_is_on_the_model(tmp_path):
    base = sharp_model("llada", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    create_tiny_model("llada", 16, 1)[1].save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    weights, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    rename = {"model.layers": "model.transformer.blocks", "self_attn.o_proj": "attn_out"}
    state = load_file(weights)
    for native, original in rename.items():
        state = {key.replace(native, original): value for key, value in state.items()}
    save_file(state, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["attn_out"]}))
    argv = ["--model_name_or_path", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--prompt", "1"]
    model, _ = generate.load_model(generate.make_parser().parse_args(argv))
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits.cpu(), adapted(input_ids=IDS).logits)
