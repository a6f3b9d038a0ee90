"""Dream: Qwen2's keys, and Qwen2's forward without its causal mask; Dream-Coder's and DiffuCoder's tokenizer."""

import json

import torch
from cases import IDS, saved_tensors
from helpers_families import (
    DENSE,
    LINEAR,
    check_adapter_and_merge,
    check_attention,
    check_loading,
    check_training,
    stock_shapes,
    write_checkpoint,
)
from oracles import sharp_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from trl_dllm.evaluation import tokenize_prompts
from trl_dllm.models import DreamConfig, DreamModel
from trl_dllm.models.dream import DreamTokenizer


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


# ---------------------------------------------------------------------- as Dream-Coder and DiffuCoder stand on the Hub

MERGES = ["a b", "ab c"]
WORDS = [*ByteLevel.alphabet(), *("".join(pair.split()) for pair in MERGES)]
SPECIAL = ["<|endoftext|>", "<|beginoftext|>", "<|mask|>", "<|dlm_pad|>"]  # from len(WORDS) on
REMOTE = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}


def hub_folder(folder):
    """DiffuCoder's files: a slow tokenizer of a remote class, whose padding token is not the config's."""
    size, first = len(WORDS) + len(SPECIAL), len(WORDS)
    config = {
        "architectures": ["DreamModel"],
        "auto_map": REMOTE,
        "bos_token_id": first,
        "eos_token_id": first,
        "hidden_size": 32,
        "intermediate_size": 48,
        "mask_token_id": first + 2,
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "model_type": "Dream",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": first,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 12345.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": size,
    }
    shapes = stock_shapes([DENSE | {f"self_attn.{name}_proj.bias": (32,) for name in "qkv"}] * 2)
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (size, 32))
    state = write_checkpoint(folder, config, shapes)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    tokenizer = {
        "added_tokens_decoder": {
            str(first + n): {"content": token, "special": True, **flags} for n, token in enumerate(SPECIAL)
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|dlm_pad|>",
        "tokenizer_class": "DreamTokenizer",
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return state


def test_a_coders_checkpoint_is_loaded_trained_adapted_and_merged(tmp_path):
    state = hub_folder(tmp_path)
    model = check_loading(tmp_path, DreamModel, state, mask_token_id=len(WORDS) + 2)
    check_attention(model)
    check_training(tmp_path)
    check_adapter_and_merge(tmp_path, LINEAR)


def test_the_tokenizer_is_qwen2s_without_remote_code(tmp_path):
    hub_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    assert type(tokenizer) is DreamTokenizer
    stock = Qwen2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    text = "abc  abcd, x9\n"
    assert (
        tokenizer(text)["input_ids"] == stock(text)["input_ids"]
        and tokenizer.decode(tokenizer(text).input_ids) == text
    )
    mask, pad = len(WORDS) + 2, len(WORDS) + 3
    assert tokenizer("abc<|mask|>")["input_ids"] == [WORDS.index("abc"), mask]
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (mask, pad)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text((tmp_path / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is DreamTokenizer and again(text)["input_ids"] == tokenizer(text)["input_ids"]
    # Padding is the tokenizer's, whatever the config says.
    ids, padding = tokenize_prompts(tokenizer, ["abc", "x9"])
    assert ids[0].tolist() == [pad, WORDS.index("abc")] and padding.tolist() == [[False, True], [True, True]]
