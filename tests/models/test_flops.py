"""Counted operations against torch's flop counter, and d2's formula against numbers worked out by hand."""

import importlib.util

import pytest
import torch
from helpers_flops import flop_counter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, StepMerge, score_view
from trl_dllm.models import (
    FlopsCounter,
    ForwardFlops,
    LLaDAConfig,
    LLaDAModelLM,
    MaskedDiffusionSpec,
    TrainingFlops,
    apply_head,
    backbone_parameters,
    create_tiny_model,
    head,
    hidden_rows,
    log_probs,
    paper_flops,
    unwrap,
)
from trl_dllm.trainer.sft_trainer import freeze_all_but


ROWS, WIDTH, HEAD_ROWS = 4, 24, 48
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


def lora(model, **kwargs):
    return get_peft_model(model, LoraConfig(**{"r": 8, "target_modules": PROJECTIONS, **kwargs}))


def frozen_but(*names):
    def apply(model):
        freeze_all_but(model, list(names))
        return model

    return apply


# What may be trained of a model: everything, adapters, or a part.
TRAINED = {
    "all": lambda model: model,
    "lora": lora,
    "lora on q": lambda model: lora(model, target_modules=["q_proj"]),
    "lora on down": lambda model: lora(model, target_modules=["down_proj"]),
    "lora and the head": lambda model: lora(model, modules_to_save=["lm_head"]),
    "lora and embeddings": lambda model: lora(model, modules_to_save=["embed_tokens"]),
    "q, k and v": frozen_but("q_proj", "k_proj", "v_proj"),
    "embeddings": frozen_but("embed_tokens"),
    "one matrix": frozen_but("layers.0.self_attn.o_proj"),
    "second layer": frozen_but("layers.1"),
    "last norm": frozen_but("model.norm"),
    "head": frozen_but("lm_head"),
}
CHECKPOINTING = {"none": None, "checkpointed": False, "reentrant": True}


def tiny(family: str = "llada", attention: str = "sdpa", **kwargs):
    model, _ = create_tiny_model(family, hidden_size=64, num_layers=2, **kwargs)
    model.set_attn_implementation(attention)
    return model.train()


def run(model, head_rows: int = HEAD_ROWS) -> tuple[int, int]:
    """Operations of a forward and of its backward pass, by torch."""
    ids = torch.randint(5, 50, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(0, ROWS * WIDTH, ROWS * WIDTH // head_rows)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with flop_counter() as counter:
        out = apply_head(model, inputs, rows, lambda logits: log_probs(logits, 3)[:, 5:6])
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def check(model, tolerance: float = 0.002, head_rows: int = HEAD_ROWS):
    count, (forward, backward) = TrainingFlops(model), run(model, head_rows)
    assert count(ROWS, WIDTH, WIDTH, head_rows) == count.view(ROWS, WIDTH, head_rows, training=False) == forward
    counted = count.view(ROWS, WIDTH, head_rows, training=True) - forward
    assert counted == pytest.approx(backward, rel=tolerance)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("trained", TRAINED)
def test_forward_and_backward_are_those_of_torchs_counter(trained, checkpointing):
    model = TRAINED[trained](tiny())
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    check(model)


@pytest.mark.parametrize("trained", TRAINED)
def test_frozen_layers_below_the_first_trained_one_are_not_recomputed(trained):
    """Without gradients of the embeddings, which transformers asks for with checkpointing, layers may have none."""
    model = TRAINED[trained](tiny())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    unwrap(model).disable_input_require_grads()
    check(model)


@pytest.mark.parametrize("trained", ["all", "lora", "lora on q"])
@pytest.mark.parametrize(
    "family, attention", [("llada", "eager"), ("dream", "sdpa"), ("dream", "eager"), ("eso_lm", "sdpa")]
)
def test_every_family_and_attention(family, attention, trained):
    # In the first layer that is trained, eager attention needs the gradients of some of q, k and v alone.
    check(TRAINED[trained](tiny(family, attention)), tolerance=0.03)


@pytest.mark.parametrize("tiles", [0, 1, 2])
@pytest.mark.parametrize("trained", ["all", "lora", "head"])
def test_tiles_that_are_kept_are_not_computed_again(monkeypatch, trained, tiles):
    """Of two tiles of 48 rows; the head is most of this model."""
    model = TRAINED[trained](tiny(vocab_size=3001))
    monkeypatch.setattr(head, "KEPT_BYTES", tiles * 48 * 3001 * 4 * 2)
    check(model, head_rows=96)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("trained", ["all", "lora", "second layer"])
@pytest.mark.parametrize("family", ["llada_moe", "llada2"])
def test_a_token_costs_the_experts_that_it_is_sent_to(family, trained, checkpointing):
    """With its router, and a shared expert and a dense first layer where there are any."""
    model = tiny(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # zeros, so far
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model = lora(model, target_modules=["q_proj", "v_proj"]) if trained == "lora" else TRAINED[trained](model)
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    check(model)


def test_grouped_keys_and_a_head_width_of_its_own():
    check(tiny("dream", num_key_value_heads=2, head_dim=32))


def test_tied_embeddings_are_trained_as_head_too():
    check(tiny(tie_word_embeddings=True))


def test_a_frozen_model_has_no_backward_pass():
    model = tiny().requires_grad_(False)
    count = TrainingFlops(model)
    assert count.view(4, 24, 32, training=True) == count.view(4, 24, 32, training=False)


# -------------------------------------------------------------------------------------------------- adapters


def test_the_tiny_models_known_figures():
    assert ForwardFlops(tiny()).per_token == 188416
    assert ForwardFlops(lora(tiny(), r=2)).per_token == 197888


def test_adapters_count_while_they_are_active():
    model = lora(tiny(), r=2)
    model.add_adapter("ref", LoraConfig(r=4, target_modules=PROJECTIONS))
    count = ForwardFlops(model)
    per_rank = (197888 - 188416) // 2
    for name, rank in (("default", 2), ("ref", 4), ("default", 2)):
        model.set_adapter(name)
        assert count.per_token == 188416 + rank * per_rank
        assert run(model)[0] == count(ROWS, WIDTH, WIDTH, HEAD_ROWS)
    with model.disable_adapter():
        assert count.per_token == 188416
        assert run_without_gradient(model) == count(ROWS, WIDTH, WIDTH, HEAD_ROWS)
    model.merge_adapter()
    assert count.per_token == 188416


def run_without_gradient(model) -> int:
    ids = torch.full((ROWS, WIDTH), 7)
    with torch.no_grad(), flop_counter() as counter:
        apply_head(model, {"input_ids": ids}, torch.arange(HEAD_ROWS), lambda logits: logits[:, :1])
    return counter.get_total_flops()


@pytest.mark.parametrize("reference", ["disabled", "ref"])
@pytest.mark.parametrize("training", [False, True])
def test_a_reference_beside_the_policy(training, reference):
    """The full KL: hidden states of the reference from the same inputs, and its logits a tile at a time."""
    model = lora(tiny())
    if reference == "ref":
        model.add_adapter("ref", LoraConfig(r=4, target_modules=PROJECTIONS))
        model.set_adapter("default")
    spec, rollout = MaskedDiffusionSpec.from_config(model.config), drawn(model)
    head = unwrap(model).get_output_embeddings().forward

    def beside(inputs, rows):
        with torch.no_grad():
            if reference == "disabled":
                with model.disable_adapter():
                    return hidden_rows(model, inputs, rows), head
            model.set_adapter("ref")
            hidden = hidden_rows(model, inputs, rows)
            model.set_adapter("default")
            return hidden, head

    count = TrainingFlops(model)
    view = StepMerge(2).view(rollout, 0, rollout.view_seed, 0)
    with torch.set_grad_enabled(training), flop_counter() as counter:
        scores = score_view(model, view, 8, spec, reference=beside)
        if training:
            (scores.logps.sum() + scores.kls.sum()).backward()
    expected = count.view(4, view.input_ids.shape[1], int(scores.scored.sum()), training, reference=True)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.002)


# --------------------------------------------------------------------------------------------------- layouts


def drawn(model, **kwargs):
    """Completions of a group: four rows, three of which share a prompt."""
    prompts = torch.tensor([[0, 9, 8], [7, 6, 5], [7, 6, 5], [7, 6, 5]])
    config = DiffusionGenerationConfig(max_new_tokens=8, block_length=4, diffusion_steps=4, **kwargs)
    return generate(model, prompts, prompts > 0, config)


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("estimator", [StepMerge(2), AnyOrder()], ids=["P + L", "P + 2L"])
def test_views_of_both_widths(estimator, trained):
    model = TRAINED[trained](tiny())
    spec, rollout = MaskedDiffusionSpec.from_config(model.config), drawn(model)
    view = estimator.view(rollout, 0, rollout.view_seed, 0)
    width = view.input_ids.shape[1]
    assert width == (3 + 8 if isinstance(estimator, StepMerge) else 3 + 2 * 8)
    with flop_counter() as counter:
        scores = score_view(model, view, 8, spec)
        forward = counter.get_total_flops()
        scores.logps.sum().backward()
    count, scored = TrainingFlops(model), int(scores.scored.sum())
    assert count.view(4, width, scored, training=False) == forward
    assert count.view(4, width, scored, training=True) == pytest.approx(counter.get_total_flops(), rel=0.002)


DECODING = {
    "denoising": {},
    "guided": {"cfg_scale": 0.5},
    "early stop": {"stop_at_eos": True, "eos_token_ids": (20, 30, 40, 50)},
    "any order": {"decoding": "any_order"},
    "cached": {"decoding": "any_order", "cache": "exact"},
}


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("decoding", DECODING)
def test_decoding_of_every_kind(decoding, trained):
    """Cached steps have more keys than queries, and one pass for the prompt that rows share."""
    model = TRAINED[trained](tiny()).eval()
    with flop_counter() as counter:
        rollout = drawn(model, **DECODING[decoding])
    assert rollout.flops == counter.get_total_flops()


# ------------------------------------------------------------------------------------- shapes without weights


def test_llada_8b_with_lora():
    """One forward of 6 rows of 200 + 256 tokens, the head at a block of 32 each, and the update: by torch's counter on
    fake tensors 4.088e13 and, with checkpointing, 1.252e14."""
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
        assert backbone_parameters(model) == 8_015_581_184
        model = lora(model, r=128)
    assert backbone_parameters(model) == 8_015_581_184
    count = TrainingFlops(model)
    assert count(6, 456, 456, 6 * 32) == pytest.approx(4.088e13, rel=1e-4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert count.view(6, 456, 6 * 32, training=True) == pytest.approx(1.252e14, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_packed_weights_count_as_what_they_stand_for(tmp_path):
    from transformers import BitsAndBytesConfig

    model = tiny()
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    assert sum(p.numel() for p in quantised.parameters()) < sum(p.numel() for p in model.parameters())
    assert backbone_parameters(quantised) == backbone_parameters(model)
    assert ForwardFlops(quantised)(4, 24, 24, 32) == ForwardFlops(model)(4, 24, 24, 32)
    one, other = (TrainingFlops(lora(m)).view(4, 24, 32, training=True) for m in (model, quantised))
    assert one == other


def test_adapters_and_trained_copies_are_no_parameters_of_the_backbone():
    model = tiny()
    parameters = sum(p.numel() for p in model.parameters())
    assert backbone_parameters(model) == parameters
    model.model.norm.weight.ds_numel = 100  # ZeRO-3 holds the rest elsewhere
    assert backbone_parameters(model) == parameters + 100 - 64
    adapted = lora(model, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    assert backbone_parameters(adapted) == parameters + 100 - 64


# ---------------------------------------------------------------------------------------------- d2's formula


STEP_MERGE = {  # d2-StepMerge on GSM8K, for two groups of six
    "parameters": 8_000_000_000,
    "canvas_length": 256,
    "completions": 12,
    "steps": 128,
    "views": 8,
    "draws": 12,
    "inner_iterations": 12,
    "frozen_backbone": True,
    "scores_old": True,
    "scores_reference": True,
}


def test_d2s_formula():
    """App. C.2: L·G·T·2P, L·G·N·2P for old and reference each, and L·G·N·4P an update."""
    tokens, parameters = 256 * 12, 8_000_000_000
    cost = paper_flops(**STEP_MERGE)
    assert cost.sampling == tokens * 128 * 2 * parameters == 6_291_456_000_000_000
    assert cost.old == cost.reference == 12 * tokens * 8 * 2 * parameters
    assert cost.updates == 12 * tokens * 8 * 4 * parameters
    assert cost.total == 6_291_456_000_000_000 + 9_437_184_000_000_000 + 9_437_184_000_000_000


def test_what_is_not_run_costs_nothing_by_d2s_formula():
    full = paper_flops(**STEP_MERGE)
    without = paper_flops(**{**STEP_MERGE, "scores_old": False, "scores_reference": False})
    assert (without.old, without.reference) == (0, 0) and without.updates == full.updates
    once = paper_flops(**{**STEP_MERGE, "draws": 1})
    assert once.old * 12 == full.old and once.updates == full.updates


def test_full_fine_tuning_and_a_reference_in_each_update_by_d2s_formula():
    frozen = paper_flops(**STEP_MERGE).updates
    assert paper_flops(**{**STEP_MERGE, "frozen_backbone": False}).updates * 4 == frozen * 6
    assert paper_flops(**{**STEP_MERGE, "full_kl": True}).updates * 4 == frozen * 6
    assert paper_flops(**{**STEP_MERGE, "frozen_backbone": False, "full_kl": True}).updates == 2 * frozen


def test_a_counter_is_saved_and_restored():
    counter, restored = FlopsCounter(), FlopsCounter()
    counter.counted += 2**60 + 1
    counter.paper += 7
    restored.load_state_dict(counter.state_dict())
    assert restored == counter
