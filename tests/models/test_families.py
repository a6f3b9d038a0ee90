"""The native families: Hub key and config names, forwards against plain torch, LoRA, and the spec's errors."""

import json
import math

import pytest
import torch
from oracles import sharp_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffusionGemmaConfig,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_dllm.models import (
    DreamConfig,
    DreamModel,
    LLaDAConfig,
    LLaDAModelLM,
    MaskedDiffusionSpec,
    create_tiny_model,
)


LAYERS, HIDDEN = 2, 32
BLOCK_KEYS = ["attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
HUB_KEYS = {"model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"} | {
    f"model.transformer.blocks.{layer}.{name}.weight" for layer in range(LAYERS) for name in BLOCK_KEYS
}
# GSAI-ML/LLaDA-8B-Instruct's config.json, with small numbers in the place of the large.
ORIGINAL_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 48,
    "embedding_dropout": 0.0,
    "embedding_size": 112,
    "eos_token_id": 81,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 103,
    "max_sequence_length": 512,
    "mlp_hidden_size": 80,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 3,
    "n_kv_heads": 3,
    "n_layers": 2,
    "pad_token_id": 81,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 12345.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 104,
    "weight_tying": False,
}


def ids():
    return torch.tensor([[5, 90, 3, 3, 41, 3, 17], [3, 64, 64, 8, 3, 99, 100]])


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


# ------------------------------------------------------------------------------------------ LLaDA: the folder


def test_llada_saves_the_hub_keys_and_loads_them_back_bit_identical(tmp_path):
    model = sharp_model("llada", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = tensors(tmp_path)
    assert set(saved) == HUB_KEYS
    again, info = LLaDAModelLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    again.save_pretrained(tmp_path / "again")
    for key, value in tensors(tmp_path / "again").items():
        assert torch.equal(value, saved[key]), key
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, again.eval()(input_ids=ids()).logits)


def test_llada_sharded_save(tmp_path):
    model = sharp_model("llada", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == HUB_KEYS == set(tensors(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_llada_tied_embeddings_save_no_head(tmp_path):
    """`weight_tying` checkpoints have no ff_out at the top."""
    model = sharp_model("llada", dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert set(tensors(tmp_path)) == HUB_KEYS - {"model.transformer.ff_out.weight"}
    assert json.loads((tmp_path / "config.json").read_text())["weight_tying"] is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, again(input_ids=ids()).logits)


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_auto_classes_take_the_native_llada(tmp_path, trust_remote_code):
    """Even where the folder's auto_map names remote code, as the Hub's does."""
    model = sharp_model("llada", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": ORIGINAL_CONFIG["auto_map"]}))
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
        assert type(loaded) is LLaDAModelLM
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# ------------------------------------------------------------------------------------------ LLaDA: the config


def original_folder(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **changes}))
    return tmp_path


def assert_native_values(config):
    native = {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "intermediate_size": 80,
        "max_position_embeddings": 512,
        "vocab_size": 112,  # the embedding's size: what the tensors have
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "mask_token_id": 103,
        "eos_token_id": 81,
        "pad_token_id": 81,
        "is_causal": False,
    }
    assert {name: getattr(config, name) for name in native} == native
    assert config.rope_parameters["rope_theta"] == 12345.0
    assert not getattr(config, "auto_map", None)


def test_llada_reads_a_config_with_original_names_only(tmp_path):
    config = AutoConfig.from_pretrained(original_folder(tmp_path))
    assert type(config) is LLaDAConfig
    assert_native_values(config)


def test_llada_writes_both_name_sets_and_no_auto_map(tmp_path):
    config = AutoConfig.from_pretrained(original_folder(tmp_path))
    assert "auto_map" not in config.to_dict()
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "auto_map" not in saved
    # The original code sizes its embedding by embedding_size and reads vocab_size as well.
    unread = {"auto_map", "transformers_version", "vocab_size", "architectures"}
    wanted = {name: value for name, value in ORIGINAL_CONFIG.items() if name not in unread and value is not None}
    assert {name: saved.get(name) for name in wanted} == wanted
    assert saved["hidden_size"] == 48 and saved["num_hidden_layers"] == 2
    assert_native_values(AutoConfig.from_pretrained(tmp_path / "saved"))
    only_native = {k: v for k, v in saved.items() if k not in ORIGINAL_CONFIG or k in ("vocab_size", "model_type")}
    only_native |= {name: saved[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps")}
    (tmp_path / "config.json").write_text(json.dumps(only_native))
    assert_native_values(AutoConfig.from_pretrained(tmp_path))


def test_llada_grouped_and_default_heads(tmp_path):
    assert AutoConfig.from_pretrained(original_folder(tmp_path, n_kv_heads=1)).num_key_value_heads == 1
    assert AutoConfig.from_pretrained(original_folder(tmp_path, n_kv_heads=None)).num_key_value_heads == 3


def test_llada_defaults_are_the_released_models():
    config = LLaDAConfig()
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert (config.vocab_size, config.mask_token_id, config.eos_token_id) == (126464, 126336, 126081)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 32, 32)
    assert (config.intermediate_size, config.num_key_value_heads, config.rms_norm_eps) == (12288, 32, 1e-5)


def test_llada_loads_a_hub_folder_written_by_hand(tmp_path):
    """Original config and original keys, as on the Hub; no library code wrote either."""
    folder, generator = original_folder(tmp_path), torch.Generator().manual_seed(0)
    shapes = {"attn_norm": (48,), "ff_norm": (48,), "ff_proj": (80, 48), "up_proj": (80, 48), "ff_out": (48, 80)}
    shapes |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (48, 48))
    state = {f"model.transformer.blocks.{n}.{k}.weight": shape for n in range(2) for k, shape in shapes.items()}
    state |= {"model.transformer.wte.weight": (112, 48), "model.transformer.ff_out.weight": (112, 48)}
    state |= {"model.transformer.ln_f.weight": (48,)}
    state = {key: torch.randn(shape, generator=generator) * 0.4 + (len(shape) == 1) for key, shape in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        got = model(input_ids=ids()).logits
    torch.testing.assert_close(got, llada_reference(state, ids(), heads=3, theta=12345.0), atol=2e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    saved = tensors(tmp_path / "saved")
    assert set(saved) == set(state) and all(torch.equal(saved[key], state[key]) for key in state)


# ----------------------------------------------------------------------------------------------- the forwards


def llada_reference(state, input_ids, heads, theta, eps=1e-5):
    """LLaDA's forward in plain torch, from the Hub's own keys: pre-norm, RoPE by halves, SwiGLU, no mask at all."""

    def weight(name):
        return state[f"model.transformer.{name}.weight"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight(name)

    x = weight("wte")[input_ids]
    rows, length, hidden = x.shape
    width = hidden // heads
    frequency = theta ** -(torch.arange(0, width, 2).double() / width)
    angle = (torch.arange(length)[:, None] * frequency).repeat(1, 2).to(x.dtype)

    def split(y):
        return y.view(rows, length, heads, width).transpose(1, 2)

    def rotate(y):
        first, second = y[..., : width // 2], y[..., width // 2 :]
        return y * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    layer = 0
    while f"model.transformer.blocks.{layer}.q_proj.weight" in state:
        block = f"blocks.{layer}."
        h = norm(x, block + "attn_norm")
        q, k, v = (split(h @ weight(block + name).T) for name in ("q_proj", "k_proj", "v_proj"))
        scores = rotate(q) @ rotate(k).transpose(2, 3) / math.sqrt(width)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, hidden)
        x = x + attended @ weight(block + "attn_out").T
        h = norm(x, block + "ff_norm")
        gate, up = h @ weight(block + "ff_proj").T, h @ weight(block + "up_proj").T
        x = x + (gate * gate.sigmoid() * up) @ weight(block + "ff_out").T
        layer += 1
    return norm(x, "ln_f") @ weight("ff_out").T


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_llada_forward_equals_plain_torch(tmp_path, attn):
    model = sharp_model("llada", dtype=torch.float32, attn_implementation=attn)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        got = model(input_ids=ids()).logits
        padded = model(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    want = llada_reference(tensors(tmp_path), ids(), heads=2, theta=500_000.0)
    assert want.std() > 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, want, atol=1e-5, rtol=1e-5)


def test_dream_equals_bidirectional_qwen2(tmp_path):
    """Same keys as Qwen2, bit-identical; the folder loads as either."""
    model = sharp_model("dream", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "Dream" and config["is_causal"] is False and config["logits_shift"] == 1
    assert set(tensors(tmp_path)) == set(model.state_dict())
    qwen_config = Qwen2Config(**{k: v for k, v in config.items() if k not in ("model_type", "is_causal")})
    qwen = Qwen2ForCausalLM(qwen_config).eval()
    qwen.load_state_dict(tensors(tmp_path))
    with torch.no_grad():
        causal = qwen(input_ids=ids()).logits
        qwen.config.is_causal = False
        want, got = qwen(input_ids=ids()).logits, model(input_ids=ids()).logits
    assert torch.equal(got, want)
    assert (causal - want).abs().max() > 0.1
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is DreamModel and type(loaded.config) is DreamConfig
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids()).logits, got)


def test_dream_strips_auto_map(tmp_path):
    model = sharp_model("dream", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config
    remote = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": remote, "rope_theta": 77.0}))
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is DreamConfig and not getattr(again, "auto_map", None)
    again.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_dream_reads_the_hubs_rope_theta(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Dream", "rope_theta": 1e6, "hidden_size": 64}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.mask_token_id, config.eos_token_id, config.logits_shift) == (151666, 151643, 1)


# ------------------------------------------------------------------------------------------------------- LoRA


def test_lora_saves_loads_and_merges(tmp_path, family):
    """all-linear; the merged model saves under the Hub's key names."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = sharp_model(family, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=ids()).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with torch.no_grad():
        want = model(input_ids=ids()).logits
    assert (want - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(sharp_model(family, dtype=torch.float32), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, want)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    if family == "llada":
        assert set(tensors(tmp_path / "merged")) == HUB_KEYS
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids()).logits, want, atol=2e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- spec


def test_spec_of_the_families():
    for family, shift in (("llada", 0), ("dream", 1)):
        model, tokenizer = create_tiny_model(family, hidden_size=16, num_layers=1)
        assert MaskedDiffusionSpec.from_model(model) == MaskedDiffusionSpec(3, shift)
        assert MaskedDiffusionSpec.from_model(model, tokenizer).mask_token_id == tokenizer.mask_token_id


def test_spec_of_a_stock_decoder_trained_as_a_diffusion_model():
    """Any decoder with is_causal=False and a mask token; the tokenizer may be the one that names it."""
    config = LlamaConfig(vocab_size=50, is_causal=False, mask_token_id=7, logits_shift=1)
    assert MaskedDiffusionSpec.from_config(config) == MaskedDiffusionSpec(7, 1)
    _, tokenizer = create_tiny_model("llada", hidden_size=16, num_layers=1)
    assert MaskedDiffusionSpec.from_config(LlamaConfig(vocab_size=50, is_causal=False), tokenizer).mask_token_id == 3


class NoMask:
    mask_token_id = None


class OtherMask:
    mask_token_id = 9


@pytest.mark.parametrize(
    ("config", "tokenizer", "match"),
    [
        (
            LlamaConfig(mask_token_id=7),
            None,
            "model_type='llama'.*is_causal.*autoregressive.*config.is_causal = False",
        ),
        (Qwen2Config(mask_token_id=7, is_causal=True), None, "is_causal=True.*autoregressive.*set config.is_causal"),
        (LlamaConfig(is_causal=False), None, "mask_token_id is missing.*'llama'.*Set config.mask_token_id"),
        (LlamaConfig(is_causal=False), NoMask, "mask_token_id is missing.*Set config.mask_token_id"),
        (
            LlamaConfig(is_causal=False, mask_token_id=7),
            OtherMask,
            "mask_token_id=7.*id 9.*checkpoint's own tokenizer",
        ),
        (LlamaConfig(is_causal=False, mask_token_id=50, vocab_size=50), None, "mask_token_id=50.*50 tokens.*resize"),
        (LlamaConfig(is_causal=False, mask_token_id=-1), None, "mask_token_id=-1.*name the right token"),
        (LlamaConfig(is_causal=False, vocab_size=5), OtherMask, "mask_token_id=9.*vocabulary of 5"),
        (
            Gemma2Config(is_causal=False, mask_token_id=4),
            None,
            "final_logit_softcapping=30.0 is not supported.*logits",
        ),
        (LlamaConfig(is_causal=False, mask_token_id=4, logit_scale=0.06), None, "logit_scale=0.06 is not supported"),
        (LlamaConfig(is_causal=False, mask_token_id=4, logits_shift=2), None, "logits_shift=2.*0.*or 1"),
    ],
)
def test_spec_errors_name_field_value_and_remedy(config, tokenizer, match):
    with pytest.raises(ValueError, match=match):
        MaskedDiffusionSpec.from_config(config, tokenizer)


def test_diffusion_gemma_is_refused():
    """Uniform noise: there is no mask token."""
    with pytest.raises(NotImplementedError, match=r"model_type='diffusion_gemma'.*no mask token.*LLaDA"):
        MaskedDiffusionSpec.from_config(DiffusionGemmaConfig())


def test_a_scale_of_one_is_no_transformation():
    assert MaskedDiffusionSpec.from_config(
        LlamaConfig(is_causal=False, mask_token_id=4, logit_scale=1.0, final_logit_softcapping=None)
    )


# ------------------------------------------------------------------------------------------------ tiny models


def test_tiny_models_repeat_and_leave_the_global_generator_alone(family):
    state = torch.get_rng_state()
    (a, _), (b, _), (c, _) = (create_tiny_model(family, hidden_size=32, num_layers=1, seed=s) for s in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_tiny_tokenizer_round_trip(tmp_path):
    model, tokenizer = create_tiny_model("llada", hidden_size=16, num_layers=1)
    text = "What's 3 + 4?\n<answer>7</answer> {~}"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    encoded = again(text)["input_ids"]
    assert encoded == tokenizer(text)["input_ids"] and len(encoded) == len(text)
    assert again.decode(encoded) == text and again.padding_side == "left"
    assert again.mask_token_id == model.config.mask_token_id == 3 and len(again) == model.config.vocab_size
    assert (
        len({again.pad_token_id, again.eos_token_id, again.bos_token_id, again.mask_token_id, again.unk_token_id}) == 5
    )


def test_tiny_model_errors():
    with pytest.raises(ValueError, match=r"family='gpt'.*dream.*llada"):
        create_tiny_model("gpt")
    with pytest.raises(ValueError, match=r"hidden_size=40.*multiple of 16"):
        create_tiny_model(hidden_size=40)
