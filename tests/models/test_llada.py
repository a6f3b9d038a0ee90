"""LLaDA: Hub keys and config names, and the forward against plain torch."""

import json
import math

import pytest
import torch
from cases import IDS, saved_tensors
from oracles import sharp_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from trl_dllm.models import LLaDAConfig, LLaDAModelLM


LAYERS = 2

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


# ---------------------------------------------------------------------------------------------------------- the folder


def test_llada_saves_the_hub_keys_and_loads_them_back_bit_identical(tmp_path):
    model = sharp_model("llada", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = saved_tensors(tmp_path)
    assert set(saved) == HUB_KEYS
    again, info = LLaDAModelLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    again.save_pretrained(tmp_path / "again")
    for key, value in saved_tensors(tmp_path / "again").items():
        assert torch.equal(value, saved[key]), key
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, again.eval()(input_ids=IDS).logits)


def test_llada_sharded_save(tmp_path):
    model = sharp_model("llada", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == HUB_KEYS == set(saved_tensors(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_llada_tied_embeddings_save_no_head(tmp_path):
    """`weight_tying` checkpoints have no ff_out at the top."""
    model = sharp_model("llada", dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert set(saved_tensors(tmp_path)) == HUB_KEYS - {"model.transformer.ff_out.weight"}
    assert json.loads((tmp_path / "config.json").read_text())["weight_tying"] is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, again(input_ids=IDS).logits)


def test_llada_takes_the_hub_keys_as_a_state_dict(tmp_path):
    """As Trainer resumes: inside another module too, whose own keys stay as they are."""
    model, other = sharp_model("llada", dtype=torch.float32), sharp_model("llada", seed=3, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    hub = saved_tensors(tmp_path)
    other.load_state_dict(hub)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())
    other = sharp_model("llada", seed=3, dtype=torch.float32)
    critic = nn.ModuleDict({"1": nn.ModuleDict({"q_proj": nn.Linear(2, 1)})})
    outer = nn.ModuleDict({"policy": other, "critic": critic})
    own = {f"critic.{key}": tensor + 1 for key, tensor in critic.state_dict().items()}
    outer.load_state_dict({f"policy.{key}": tensor for key, tensor in hub.items()} | own)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())
    assert all(torch.equal(tensor, outer.state_dict()[key]) for key, tensor in own.items())


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


# ---------------------------------------------------------------------------------------------------------- the config


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
    assert config.auto_map == {}, "TRL reads it"


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_type", "gelu"),
        ("alibi", True),
        ("attention_layer_norm", True),
        ("block_type", "sequential"),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("input_emb_norm", True),
        ("layer_norm_type", "default"),
        ("rope", False),
        ("scale_logits", True),
    ],
)
def test_llada_of_another_structure_is_refused(tmp_path, name, value):
    """It would load, as all keys are there, and compute something else."""
    with pytest.raises(ValueError, match=rf"{name}={value!r} in a LLaDAConfig: this implementation has "):
        AutoConfig.from_pretrained(original_folder(tmp_path, **{name: value}))
    other = AutoConfig.from_pretrained(original_folder(tmp_path, init_fn="normal", precision="fp32"))
    assert_native_values(other)


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
        got = model(input_ids=IDS).logits
    torch.testing.assert_close(got, llada_reference(state, IDS, heads=3, theta=12345.0), atol=2e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    saved = saved_tensors(tmp_path / "saved")
    assert set(saved) == set(state) and all(torch.equal(saved[key], state[key]) for key in state)


# --------------------------------------------------------------------------------------------------------- the forward


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
        got = model(input_ids=IDS).logits
        padded = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    want = llada_reference(saved_tensors(tmp_path), IDS, heads=2, theta=500_000.0)
    assert want.std() > 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, want, atol=1e-5, rtol=1e-5)
