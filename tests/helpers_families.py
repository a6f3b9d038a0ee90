"""What each family's tests ask of a tiny checkpoint in the Hub's own keys and config; a forward in plain torch."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from cases import IDS, saved_tensors
from datasets import Dataset
from oracles import left_pad
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dllm.models import MaskedDiffusionSpec, create_tiny_model
from trl_dllm.scripts import merge


VOCAB = 112
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

# The projections of a decoder layer under stock names: (hidden 32, two heads of 16, MLP 48).
ATTENTION = {f"self_attn.{name}_proj": (32, 32) for name in "qkvo"}
MLP = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
NORMS = {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
QK_NORMS = {"self_attn.q_norm": (16,), "self_attn.k_norm": (16,)}
DENSE = ATTENTION | MLP | NORMS


def stock_shapes(layers: list[dict], head: bool = True) -> dict[str, tuple]:
    """Keys and shapes of a stock decoder whose layers have these parts."""
    shapes = {"model.embed_tokens.weight": (VOCAB, 32), "model.norm.weight": (32,)}
    shapes |= {"lm_head.weight": (VOCAB, 32)} if head else {}
    for n, parts in enumerate(layers):
        for name, shape in parts.items():
            key = name if name.endswith((".bias", "_bias")) else f"{name}.weight"
            shapes[f"model.layers.{n}.{key}"] = shape
    return shapes


def experts(count: int, width: int = 24) -> dict[str, tuple]:
    """A tensor an expert, as mixtures of experts are stored on the Hub."""
    shapes = {"gate_proj": (width, 32), "up_proj": (width, 32), "down_proj": (32, width)}
    return {f"mlp.experts.{n}.{name}": shape for n in range(count) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, config: dict, shapes: dict[str, tuple], mask_token: bool = True
) -> dict[str, Tensor]:
    """Write a folder as it would stand on the Hub, with random weights and the tiny tokenizer; returns the weights."""
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.2) + (key.endswith("norm.weight"))
        for key, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = create_tiny_model("llada", 16, 1)[1]
    if not mask_token:
        tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    return state


# --------------------------------------------------------------------------------------------------------- the forward


def plain_forward(
    weight: Callable[[str], Tensor],
    ids: Tensor,
    mlp: Callable[[int, Tensor], Tensor],
    theta: float,
    kv_heads: int = 2,
    qk_norm: bool = True,
    rotary: float = 1.0,
    eps: float = 1e-6,
    allowed: Tensor | None = None,
) -> Tensor:
    """Logits of a two-layer decoder with two heads of 16, in plain torch: pre-norm, RoPE by halves.

    `weight` gives a tensor by its stock name, `mlp` the second half of a layer, `allowed` (S, S) the rows that may see
    each column; without it all see all.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight(f"{name}.weight")

    x = weight("model.embed_tokens.weight")[ids]
    rows, length, _ = x.shape
    size = int(16 * rotary)
    frequency = theta ** -(torch.arange(0, size, 2).double() / size)
    angle = (torch.arange(length)[:, None] * frequency).repeat(1, 2).to(x.dtype)

    def rotate(y: Tensor) -> Tensor:
        turned, rest = y[..., :size], y[..., size:]
        first, second = turned[..., : size // 2], turned[..., size // 2 :]
        return torch.cat([turned * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin(), rest], dim=-1)

    for n in range(2):
        layer = f"model.layers.{n}"
        h = norm(x, f"{layer}.input_layernorm")

        def heads(name: str, count: int, layer=layer, h=h) -> Tensor:
            y = (h @ weight(f"{layer}.self_attn.{name}_proj.weight").T).view(rows, length, count, 16)
            if qk_norm and name != "v":
                y = norm(y, f"{layer}.self_attn.{name}_norm")
            return y.transpose(1, 2)

        q, k, v = heads("q", 2), heads("k", kv_heads), heads("v", kv_heads)
        k, v = (y.repeat_interleave(2 // kv_heads, dim=1) for y in (k, v))
        scores = rotate(q) @ rotate(k).transpose(2, 3) / math.sqrt(16)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, 32)
        x = x + attended @ weight(f"{layer}.self_attn.o_proj.weight").T
        x = x + mlp(n, norm(x, f"{layer}.post_attention_layernorm"))
    return norm(x, "model.norm") @ weight("lm_head.weight").T


def swiglu(weight: Callable[[str], Tensor], name: str, h: Tensor) -> Tensor:
    """The MLP called `name` on h (..., 32)."""
    gate, up, down = (weight(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
    gated = h @ gate.T
    return (gated * gated.sigmoid() * (h @ up.T)) @ down.T


def dense_mlp(weight: Callable[[str], Tensor]) -> Callable[[int, Tensor], Tensor]:
    return lambda n, h: swiglu(weight, f"model.layers.{n}.mlp", h)


def mixture(weight: Callable[[str], Tensor], layer: str, h: Tensor, chosen: Callable[[Tensor], dict]) -> Tensor:
    """A layer's experts, token by token: `chosen` gives {expert: its weight} for a token's router logits."""
    out = torch.zeros_like(h)
    for place in itertools.product(*map(range, h.shape[:-1])):
        for expert, share in chosen(weight(f"{layer}.mlp.gate.weight") @ h[place]).items():
            out[place] += share * swiglu(weight, f"{layer}.mlp.experts.{expert}", h[place])
    return out


# -------------------------------------------------------------------------------------------------------- the contract


def logits(model, ids: Tensor = IDS, **inputs) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, **inputs).logits


def check_loading(folder: Path, model_class: type, state: dict[str, Tensor], mask_token_id: int) -> torch.nn.Module:
    """Nothing is missing, unexpected or mismatched; saved again it is the same, in keys, bits and config."""
    assert type(AutoModel.from_pretrained(folder)) is model_class
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is model_class and type(model.config) is model_class.config_class
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    spec = MaskedDiffusionSpec.from_config(AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    assert spec.mask_token_id == mask_token_id
    model.save_pretrained(folder / "saved")
    saved = saved_tensors(folder / "saved")
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)
    original, written = (json.loads((path / "config.json").read_text()) for path in (folder, folder / "saved"))
    same = {key: value for key, value in original.items() if value is not None and key not in ("auto_map", "dtype")}
    same.pop("transformers_version", None)
    assert "auto_map" not in written and {key: written.get(key) for key in same} == same
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert type(again) is model_class and torch.equal(logits(again), logits(model))
    # As Trainer resumes: the Hub's keys into a model that is there already.
    other = model_class(model.config)
    result = other.load_state_dict(dict(state), strict=False)
    assert not result.unexpected_keys and torch.equal(logits(other), logits(model))
    return model


def check_attention(model) -> None:
    """Every position sees every other; left padding changes nothing."""
    last = IDS.clone()
    last[:, -1] = 20
    assert (logits(model, last) - logits(model))[:, 0].abs().max() > 1e-4
    prompts = [[5, 9, 77, 20, 64], [33], [90, 14, 8]]
    ids, mask = left_pad(prompts, width=7)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = logits(model, ids, attention_mask=mask.long(), position_ids=positions)
    for row, prompt in enumerate(prompts):
        alone = logits(model, torch.tensor([prompt]))[0]
        torch.testing.assert_close(padded[row, -len(prompt) :], alone, atol=5e-5, rtol=0)


def check_adapter_and_merge(folder: Path, adapted: set[str]) -> None:
    """LoRA on all linear layers is on these; merged, it is the same model under the Hub's keys."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=1, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    found = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == adapted
    model.save_pretrained(folder / "adapter")
    merge.main(merge.make_parser().parse_args([str(folder / "adapter"), str(folder / "merged")]))
    assert saved_tensors(folder / "merged").keys() == saved_tensors(folder).keys()
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    torch.testing.assert_close(merged, logits(model), atol=1e-4, rtol=1e-4)


def check_training(folder: Path) -> None:
    """A step of SFT and one of GRPO change the weights; the run is saved under the Hub's keys, and goes on."""
    data = Dataset.from_dict({"prompt": ["ab", "abcdefg", "x", "12"], "completion": ["c", "hijk", "yz", "345"]})
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    block = getattr(AutoConfig.from_pretrained(folder), "block_size", None) or 4
    decoding = {"num_generations": 4, "max_completion_length": 2 * block, "block_length": block, "diffusion_steps": 4}

    def sft(name, **changes):
        config = DiffusionSFTConfig(str(folder / name), **{**settings, **changes})
        return DiffusionSFTTrainer(str(folder), config, train_dataset=data)

    def grpo(name, **changes):
        config = DiffusionGRPOConfig(str(folder / name), **{**settings, **decoding, **changes})
        return DiffusionGRPOTrainer(str(folder), reward, config, data.select_columns(["prompt"]))

    for build in (sft, grpo):
        trainer = build(build.__name__)
        assert trainer.model.config.mask_token_id == trainer.spec.mask_token_id
        assert not getattr(trainer.model.config, "output_router_logits", False), "no loss of the router's"
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 and "aux_loss" not in entry
        still = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
        assert not still, still
        checkpoint = folder / build.__name__ / "checkpoint-1"
        assert saved_tensors(checkpoint).keys() == saved_tensors(folder).keys()
        resumed = build("resumed", max_steps=2)
        resumed._load_from_checkpoint(str(checkpoint))
        assert torch.equal(logits(resumed.model), logits(trainer.model))


def reward(completions, **kwargs) -> list[float]:
    return [sum(map(ord, completion)) % 11 / 11 for completion in completions]
