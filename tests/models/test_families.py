"""The table of families: each is registered, made tiny, sampled and scored like any other."""

from pathlib import Path

import pytest
import torch
from cases import assert_same_rollout, sample, whole_canvas
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import trl_dllm
from trl_dllm.likelihood import ExactTrajectory, token_logps
from trl_dllm.models import FAMILIES, MaskedDiffusionSpec, create_tiny_model
from trl_dllm.scripts import init_tiny


def tiny(family):
    """Weights far from uniform, which matter to every logit."""
    model, tokenizer = create_tiny_model(family, hidden_size=32, num_layers=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().eval(), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_saved_and_loaded_by_the_auto_classes(tmp_path, family):
    init_tiny.main(
        init_tiny.make_parser().parse_args(
            [str(tmp_path), "--family", family, "--hidden_size", "16", "--num_layers", "2"]
        )
    )
    config_class, model_class = FAMILIES[family]
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class is model_class.config_class
    model, tokenizer = create_tiny_model(family, hidden_size=16, num_layers=2)
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is type(model) is model_class
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert MaskedDiffusionSpec.from_model(loaded, tokenizer).mask_token_id == tokenizer.mask_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_config_is_a_masked_diffusion_models(family):
    """Mask token, shift and blocks by the class alone; A2D leaves its mask token to the tokenizer."""
    config = FAMILIES[family][0]()
    if config.mask_token_id is None:
        assert family.startswith("a2d")
        config.mask_token_id = 7
    spec = MaskedDiffusionSpec.from_config(config)
    assert spec.logits_shift == (family == "dream")
    assert spec.block_size == {"sdar": 4, "sdar_moe": 4, "llada2": 32}.get(family)


FULL_ATTENTION = [name for name, (config, _) in FAMILIES.items() if getattr(config(), "block_size", None) is None]


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_the_samplers_log_probs_are_the_exact_trajectorys(family):
    """Identity 1 (docs/methods.md §7), and 7: the same rows by themselves and in a batch."""
    model, _ = tiny(family)
    rollout = sample(model, temperature=1.0)
    scores = token_logps(model, whole_canvas(rollout), ExactTrajectory())
    assert scores.scored.all() and rollout.logps.std() > 0.1
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-6, rtol=0)
    assert_same_rollout(sample(model, temperature=1.0, batch_size=1, width=11), rollout, atol=1e-6)


def test_sampler_scorer_and_trainers_know_no_family_by_name():
    """They read what they need of a `MaskedDiffusionSpec`; a new family is a file and a row of the table."""
    classes = [family_class for row in FAMILIES.values() for family_class in row]
    package = Path(trl_dllm.__file__).parent
    for folder in ("generation", "likelihood", "trainer"):
        for path in (package / folder).glob("*.py"):
            named = [family_class.__name__ for family_class in classes if family_class.__name__ in path.read_text()]
            assert not named, f"{path.name}: {named}"
