"""`trl-dllm merge`: one folder that is the adapter's model, under the Hub's names."""

import json

import pytest
import torch
from cases import IDS, saved_tensors
from oracles import sharp_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dllm.models import create_tiny_model
from trl_dllm.scripts import merge


def run(*argv) -> None:
    merge.main(merge.make_parser().parse_args([str(word) for word in argv]))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def folders(tmp_path, family):
    """A base model with its tokenizer, an adapter that names it, and the logits of the two together."""
    base = sharp_model(family, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    tokenizer = create_tiny_model(family, 16, 1)[1]
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=1, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(adapted)


def test_the_merged_model_is_the_adapters_in_the_hubs_names(folders):
    folder, want = folders
    run(folder / "adapter", folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), want, atol=1e-5 * want.std().item(), rtol=1e-5)
    before, after = saved_tensors(folder / "base"), saved_tensors(folder / "merged")
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed and not any("norm" in key or "wte" in key or "embed" in key for key in changed)
    assert not (folder / "merged" / "adapter_config.json").exists()
    old, new = (AutoTokenizer.from_pretrained(folder / name) for name in ("base", "merged"))
    assert new.get_vocab() == old.get_vocab() and new.chat_template == old.chat_template
    assert new.mask_token_id == old.mask_token_id and new.padding_side == "left"


def test_base_dtype_and_tokenizer_can_be_given(folders):
    folder, want = folders
    (folder / "base").rename(folder / "moved")
    tokenizer = AutoTokenizer.from_pretrained(folder / "moved")
    tokenizer.chat_template = "the adapter's own"
    tokenizer.save_pretrained(folder / "adapter")
    run(folder / "adapter", folder / "out", "--model_name_or_path", folder / "moved", "--dtype", "bfloat16")
    assert {value.dtype for value in saved_tensors(folder / "out").values()} == {torch.bfloat16}
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(folder / "out", dtype="float32")
    assert 0 < (logits(merged) - want).abs().max() < 0.2 * want.std()
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template == "the adapter's own"


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_cannot_be_merged(folders):
    folder, _ = folders
    with pytest.raises(ValueError, match="is the adapter's own folder; name another"):
        run(folder / "adapter", folder / "base" / ".." / "adapter")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(folder / "base" / "config.json", quantization_config=quantization)
    with pytest.raises(ValueError, match=r"base is quantised \(bitsandbytes\).*full precision with --model_name_or"):
        run(folder / "adapter", folder / "merged")
    edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not name its base model; pass --model_name_or_path"):
        run(folder / "adapter", folder / "merged")
    assert not (folder / "merged").exists()
