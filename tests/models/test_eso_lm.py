"""Eso-LM: its Hub checkpoints, folded into Starcoder2, compute what Eso-LM does; any-order decoding is its sampler."""

import math

import pytest
import torch
from cases import IDS, SEEDS, sample_any_order, saved_tensors, whole_canvas
from helpers_eso_lm import BLOCKS, CONFIG, EOS, HEADS, HIDDEN, MASK, VOCAB, run, write_original
from helpers_families import check_adapter_and_merge, check_attention, check_loading, check_training, logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from trl_dllm import cli
from trl_dllm.likelihood import AnyOrder, token_logps
from trl_dllm.models import MaskedDiffusionSpec
from trl_dllm.models.eso_lm import EsoLMConfig, EsoLMForCausalLM
from trl_dllm.models.lora import register_lora_targets


@pytest.fixture
def folders(tmp_path):
    """The original's weights, and the converted folder, in float64."""
    state = write_original(tmp_path / "hub")
    run("eso_lm", tmp_path / "hub", tmp_path / "converted")
    return state, tmp_path / "converted"


def load(folder, dtype="float64"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# --------------------------------------------------------------------------------------------------------- the oracle


def modulation(state: dict[str, Tensor], name: str) -> Tensor:
    """An adaLN's shifts, scales and gates at time 0."""
    get = {key.removeprefix("backbone."): value.double() for key, value in state.items()}
    waves = torch.arange(128).double().div(128).mul(-math.log(10000)).exp() * 0.0
    x = torch.cat([waves.cos(), waves.sin()])
    x = get["sigma_map.mlp.0.weight"] @ x + get["sigma_map.mlp.0.bias"]
    x = get["sigma_map.mlp.2.weight"] @ (x * x.sigmoid()) + get["sigma_map.mlp.2.bias"]
    return get[f"{name}.adaLN_modulation.weight"] @ (x * x.sigmoid()) + get[f"{name}.adaLN_modulation.bias"]


def eso_lm(state: dict[str, Tensor], ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    """Logits (S, V) of Eso-LM for tokens (S,) at positions (S,), where row q sees the columns `allowed` (S, S)."""
    get = {key.removeprefix("backbone."): value.double() for key, value in state.items()}

    def norm(x: Tensor, name: str, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * get[f"{name}.weight"]
        return x * (1 + scale) + shift

    angle = positions[:, None].float() * state["backbone.rotary_emb.inv_freq"]
    cos, sin = (table.double()[:, None] for table in (angle.cos(), angle.sin()))

    def rotate(y: Tensor) -> Tensor:  # (S, heads, 16), by halves
        first, second = y.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = get["vocab_embed.embedding"][ids]
    for n in range(BLOCKS):
        block = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(state, block).chunk(6)
        fused = norm(x, f"{block}.norm1", shift1, scale1) @ get[f"{block}.attn_qkv.weight"].T
        q, k, v = fused.view(len(ids), 3, HEADS, HIDDEN // HEADS).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(HIDDEN // HEADS)
        seen = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", seen, v).reshape(len(ids), HIDDEN)
        x = x + gate1 * (attended @ get[f"{block}.attn_out.weight"].T)
        h = norm(x, f"{block}.norm2", shift2, scale2) @ get[f"{block}.mlp.0.weight"].T + get[f"{block}.mlp.0.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * (h @ get[f"{block}.mlp.2.weight"].T + get[f"{block}.mlp.2.bias"])
    shift, scale = modulation(state, "output_layer").chunk(2)
    out = norm(x, "output_layer.norm_final", shift, scale)
    return out @ get["output_layer.linear.weight"].T + get["output_layer.linear.bias"]


def sequential_log_probs(state: dict[str, Tensor], prompt: list[int], tokens: list[int], steps: list[int]) -> Tensor:
    """Log-probs of a canvas by Eso-LM's sequential mode: inputs sorted by decoding order, positions carried along.

    [prompt, clean tokens in order | masks in order]; the prompt sees itself, a clean token what came before it, a mask
    the clean tokens before its own and itself.
    """
    order = sorted(range(len(tokens)), key=lambda place: steps[place])
    known, canvas = len(prompt), len(tokens)
    place = torch.tensor([known + i for i in order])
    ids = torch.tensor([*prompt, *(tokens[i] for i in order), *[MASK] * canvas])
    rank = torch.arange(canvas)
    allowed = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    allowed[:, :known] = True
    clean, masks = slice(known, known + canvas), slice(known + canvas, None)
    allowed[clean, clean] = rank[:, None] >= rank
    allowed[masks, clean] = rank[:, None] > rank
    allowed[masks, masks] = torch.eye(canvas, dtype=torch.bool)
    out = eso_lm(state, ids, torch.cat([torch.arange(known), place, place]), allowed)[masks]
    out[:, MASK] = -1e6
    result = torch.zeros(canvas, dtype=torch.float64)
    result[order] = out.log_softmax(-1)[rank, torch.tensor([tokens[i] for i in order])]
    return result


# ----------------------------------------------------------------------------------------------------------- the tests


def test_a_converted_checkpoint_computes_what_eso_lm_does(folders):
    state, folder = folders
    model = load(folder)
    everything = torch.ones(IDS.shape[1], IDS.shape[1], dtype=torch.bool)
    want = torch.stack([eso_lm(state, row, torch.arange(len(row)), everything) for row in IDS])
    assert want.std() > 1
    torch.testing.assert_close(logits(model), want, atol=1e-9, rtol=0)
    check_attention(model)
    gates = modulation(state, "blocks.0").chunk(6)
    assert min(part.abs().max() for part in gates) > 0.1, "shifts, scales and gates that matter"


def test_it_loads_and_is_saved_like_any_other(tmp_path):
    write_original(tmp_path / "hub", torch.float32)
    run("eso_lm", tmp_path / "hub", tmp_path / "converted")
    check_loading(tmp_path / "converted", EsoLMForCausalLM, saved_tensors(tmp_path / "converted"), MASK)
    config = AutoConfig.from_pretrained(tmp_path / "converted")
    assert (config.vocab_size, config.max_position_embeddings, config.num_key_value_heads) == (VOCAB, 64, HEADS)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (EOS, EOS, EOS)
    assert config.dtype == torch.float32, "the checkpoint's own"


@pytest.mark.parametrize("cache", [None, "exact"])
@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
@pytest.mark.parametrize(
    "prompts", [[[]] * 4, [[EOS]] * 4, [[EOS], [EOS, 97, 98], [7, 9, 33, 20, 5], [41]]], ids=["empty", "bos", "ragged"]
)
def test_identity_3_on_a_converted_eso_lm(folders, prompts, remasking, cache):
    """With a token a step: sampler, one forward of P + 2L tokens, and Eso-LM's own sequential mode."""
    state, folder = folders
    model = load(folder)
    settings = {"max_new_tokens": 12, "block_length": 12, "diffusion_steps": 12, "temperature": 1.0}
    rollout = sample_any_order(model, cache, prompts, SEEDS, remasking=remasking, eos_token_ids=(EOS,), **settings)
    assert (rollout.unmask_step.sort().values == torch.arange(12)).all() and (rollout.completion_ids != MASK).all()
    scores = token_logps(model, whole_canvas(rollout), AnyOrder())
    assert scores.scored.all()
    for row, prompt in enumerate(prompts):
        want = sequential_log_probs(
            state, prompt, rollout.completion_ids[row].tolist(), rollout.unmask_step[row].tolist()
        )
        torch.testing.assert_close(scores.logps[row].double(), want, atol=1e-9, rtol=0)
        torch.testing.assert_close(rollout.logps[row].double(), want, atol=1e-9, rtol=0)


def test_it_is_trained_adapted_and_merged(tmp_path):
    write_original(tmp_path / "hub", torch.float32)
    run("eso_lm", tmp_path / "hub", tmp_path / "converted")
    check_training(tmp_path / "converted")
    check_adapter_and_merge(tmp_path / "converted", set(EsoLMForCausalLM.lora_targets))


def test_a_bare_lora_config_adapts_its_linear_layers(folders):
    """The MLP's too, whose names are not Llama's."""
    register_lora_targets()
    model = get_peft_model(load(folders[1]), LoraConfig(r=2))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == set(EsoLMForCausalLM.lora_targets)


def test_the_defaults_are_the_released_models():
    config = EsoLMConfig()
    assert (config.vocab_size, config.mask_token_id, config.eos_token_id, config.pad_token_id) == (
        50258,
        50257,
        50256,
        50256,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (768, 12, 1024)
    assert not config.is_causal and not config.tie_word_embeddings


def test_the_tokenizer_is_gpt2s_with_a_mask(folders, tmp_path):
    """Padded with the end-of-text token, where Eso-LM's own padding token has the mask's id."""
    _, folder = folders
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (MASK, EOS, EOS)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 64
    assert tokenizer("<|endoftext|>a b")["input_ids"] == [EOS, *tokenizer("a b")["input_ids"]]
    assert tokenizer("")["input_ids"] == [] and len(tokenizer("a b")["input_ids"]) == 3
    assert tokenizer.decode([*tokenizer("a b")["input_ids"], MASK, EOS], skip_special_tokens=True) == "a b"
    own = GPT2Tokenizer.from_pretrained(tmp_path / "hub")
    own.add_special_tokens({"pad_token": "[PAD]"})
    own.save_pretrained(tmp_path / "own")
    run("eso_lm", tmp_path / "hub", tmp_path / "again", "--tokenizer", tmp_path / "own")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (again.mask_token_id, again.pad_token_id) == (MASK, EOS)


def test_weights_may_stand_in_several_files_or_one_of_torchs(tmp_path):
    state = write_original(tmp_path / "hub")
    run("eso_lm", tmp_path / "hub", tmp_path / "want")
    want = saved_tensors(tmp_path / "want")
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hub" / "pytorch_model.bin")
    run("eso_lm", tmp_path / "hub", tmp_path / "torch")
    keys = sorted(state)
    for number, part in enumerate((keys[:9], keys[9:])):
        save_file({key: state[key] for key in part}, tmp_path / "hub" / f"model-{number}.safetensors")
    (tmp_path / "hub" / "pytorch_model.bin").unlink()
    run("eso_lm", tmp_path / "hub", tmp_path / "shards")
    for name in ("torch", "shards"):
        found = saved_tensors(tmp_path / name)
        assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_conditioning": True}, "time_conditioning=True in the config: .* Use one that was trained without"),
        ({"mask_index": None}, "mask_index=None in the config, where .* whole number. Give the config.json of"),
        ({"n_blocks": "2"}, "n_blocks='2' in the config"),
        ({"n_heads": 5}, "hidden_size=32 is no multiple of n_heads=5"),
        ({"n_blocks": 3}, r"blocks\.2\.adaLN_modulation\.bias, .* and 6 more are missing among .*n_blocks=3"),
        ({"n_blocks": 1}, r"blocks\.1\..* are unknown among the weights"),
        ({"vocab_size": 300}, r"vocab_embed\.embedding has the shape \(258, 32\), and config\.json says \(300, 32\)"),
        ({"mask_index": 255}, "has 257 tokens, and mask_index=255 must be the next id or its last one. Pass GPT-2's"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, change, message):
    write_original(tmp_path / "hub", config={**CONFIG, **change})
    with pytest.raises(ValueError, match=message):
        run("eso_lm", tmp_path / "hub", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_folders_that_are_none(tmp_path):
    with pytest.raises(SystemExit, match=r"^trl-dllm convert: checkpoint='nowhere' is no folder with a config.json"):
        cli.main(["convert", "eso_lm", "nowhere", str(tmp_path / "converted")])
    write_original(tmp_path / "hub")
    with pytest.raises(ValueError, match="is the checkpoint's own folder; name another"):
        run("eso_lm", tmp_path / "hub", tmp_path / "other" / ".." / "hub")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no vocabulary. Copy GPT-2's files there, or pass --tokenizer"):
        run("eso_lm", tmp_path / "hub", tmp_path / "converted", "--tokenizer", tmp_path / "empty")
    (tmp_path / "hub" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither \*.safetensors nor pytorch_model.bin. Take the"):
        run("eso_lm", tmp_path / "hub", tmp_path / "converted")


def test_the_hubs_folder_says_that_it_must_be_converted(tmp_path):
    write_original(tmp_path)
    with pytest.raises(ValueError, match=r"model_type='EsoLM' .*trl-dllm convert eso_lm FOLDER OUTPUT_DIR"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_its_mask_token_is_found_where_it_stands(folders):
    _, folder = folders
    spec = MaskedDiffusionSpec.from_model(load(folder), AutoTokenizer.from_pretrained(folder))
    assert (spec.mask_token_id, spec.logits_shift, spec.blocks) == (MASK, 0, None)
