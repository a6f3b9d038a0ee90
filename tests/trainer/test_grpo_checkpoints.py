"""Trained models load again, and every way to load a model gives the same run."""

import importlib.util

import pytest
import torch
from helpers_grpo import CheckedTrainer, build, config, lora, losses, moved, reward, text_prompts, tiny, weights
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_dllm import DiffusionGRPOTrainer
from trl_dllm.models import LLaDAModelLM


def save_tiny(folder, **kwargs) -> str:
    model, tokenizer = tiny(**kwargs)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_trained_model_loads_again_under_the_hubs_key_names(tmp_path):
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-1"):
        with safe_open(folder / "model.safetensors", "pt") as stored:
            names = set(stored.keys())
        assert {
            "model.transformer.wte.weight",
            "model.transformer.ff_out.weight",
            "model.transformer.ln_f.weight",
        } <= names
        assert (
            "model.transformer.blocks.0.ff_out.weight" in names
            and "model.transformer.blocks.0.attn_out.weight" in names
        )
        assert all(name.startswith("model.transformer.") for name in names)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is LLaDAModelLM
        expected, found = trainer.model.state_dict(), loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert AutoTokenizer.from_pretrained(folder).mask_token_id == trainer.spec.mask_token_id
    card = (
        (tmp_path / "final" / "README.md") if (tmp_path / "final" / "README.md").exists() else tmp_path / "README.md"
    )
    assert "from trl_dllm.generation import" in card.read_text() and "pipeline(" not in card.read_text()


def test_a_trained_adapter_loads_again_on_its_base_model(tmp_path):
    base = save_tiny(tmp_path / "base")
    trainer = build(tmp_path / "run", model=base, peft=True, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        assert not torch.equal(
            loaded.get_base_model()(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
        )


def test_an_adapter_that_does_not_fit_is_not_resumed_from(tmp_path):
    """PEFT would load what fits, and train the rest from its start."""
    build(tmp_path, peft=True, max_steps=1, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    state = {key.replace("mlp.up_proj", "mlp.other"): value for key, value in load_file(path).items()}
    save_file(state, path)
    for file in (path.parent / "manifest.json", *path.parent.glob("process_state*")):
        file.unlink()  # as from stock TRL: the sizes would tell first
    with pytest.raises(ValueError, match=r"no place for: .*mlp.other.lora_A.weight, .*no weights for: .*up_proj"):
        build(tmp_path, peft=True, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_path_an_instance_and_a_model_made_in_memory_train_alike(tmp_path):
    """Full fine-tuning with beta > 0: TRL loads the reference by name, and a model made in memory has none."""
    path = save_tiny(tmp_path / "base")
    runs = {}
    for kind in ("path", "instance", "in memory"):
        model = {"path": path, "instance": AutoModelForCausalLM.from_pretrained(path), "in memory": tiny()[0]}[kind]
        named = "" if kind == "path" else model.config._name_or_path
        tokenizer = tiny()[1] if kind == "in memory" else None  # the others bring their own
        trainer = build(
            tmp_path / kind,
            CheckedTrainer,
            model=model,
            tokenizer=tokenizer,
            beta=0.04,
            num_iterations=2,
            max_steps=4,
            num_segments=3,
        )
        assert kind == "path" or trainer.model.config._name_or_path == named
        initial = tiny()[0].state_dict()
        reference = trainer.ref_model.state_dict()
        assert initial.keys() == reference.keys()
        assert all(torch.equal(initial[name], reference[name]) for name in initial)
        trainer.train()
        assert max(trainer.gradient_errors) < 1e-6
        assert all(torch.equal(initial[name], value) for name, value in trainer.ref_model.state_dict().items())
        runs[kind] = losses(trainer), losses(trainer, "kl")
    assert runs["path"] == runs["instance"] == runs["in memory"]
    assert runs["path"][1][0] == 0 < runs["path"][1][1]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("num_segments", [1, 3])
def test_a_4_bit_model_trains_its_adapter(tmp_path, monkeypatch, num_segments):
    import bitsandbytes

    forward = bitsandbytes.nn.Linear4bit.forward

    def unpacked(self, x):
        # On a CPU with avx512_bf16 a forward without gradients would repack the weights for inference, for good.
        self.support_avx512bf16_for_cpu = False
        return forward(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", unpacked)
    path = save_tiny(tmp_path / "base", hidden_size=64, num_layers=1)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = DiffusionGRPOTrainer(
        path,
        reward,
        config(
            tmp_path / "run", beta=0.04, num_iterations=2, max_steps=2, num_segments=num_segments, p_mask_prompt=0.15
        ),
        text_prompts(),
        quantization_config=quantization,
        peft_config=lora(),
    )
    assert trainer.model.is_loaded_in_4bit
    full = sum(p.numel() for p in tiny(hidden_size=64)[0].parameters())
    assert trainer._parameters == full, "packed 4-bit weights hold two parameters a byte; adapters are left out"
    before = weights(trainer)
    trainer.train()
    assert moved(before, trainer)
    assert all(torch.tensor(losses(trainer, key)).isfinite().all() for key in ("loss", "grad_norm", "kl"))
    assert losses(trainer, "kl")[0] < 1e-6
