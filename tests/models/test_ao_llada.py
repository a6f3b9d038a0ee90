"""AO-LLaDA, d2's any-order causal checkpoints: LLaDA's own class, keys and chat template, decoded in any order."""

import json

import pytest
import torch
from cases import saved_tensors, whole_canvas
from datasets import Dataset
from helpers_families import VOCAB, check_loading, reward
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, token_logps
from trl_dllm.models import LLaDAModelLM, create_tiny_model
from trl_dllm.recipe import load_recipe, recipe_paths
from trl_dllm.rollout import Rollout


SPECIAL = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "model_type": "llada",
}
RECIPE = load_recipe(recipe_paths()["llada_8b/grpo/gsm8k_ao_llada"])
DECODING = {key: RECIPE[key] for key in ("block_length", "diffusion_steps", "decoding", "cache", "temperature")}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as it stands on the Hub, and its weights."""
    model, tokenizer = create_tiny_model("llada", 32, 2, vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **CONFIG}))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL], special_tokens=True)
    tokenizer.bos_token, tokenizer.chat_template = SPECIAL[0], TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_it_loads_as_llada(checkpoint):
    state = saved_tensors(checkpoint)
    assert all(key.startswith("model.transformer.") for key in state), "LLaDA's own keys"
    check_loading(checkpoint, LLaDAModelLM, state, mask_token_id=3)


def test_grpo_prompts_it_by_its_template(checkpoint):
    """The beginning-of-text token once, the turn, and the head of the answer; then a step in any order."""
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    batch = {"num_generations": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
    kept = {
        key: RECIPE[key] for key in ("estimator", "num_iterations", "old_logps", "scale_rewards", "loss_type", "beta")
    }
    args = DiffusionGRPOConfig(
        str(checkpoint / "run"),
        max_completion_length=64,
        **settings,
        **batch,
        **kept,
        **{**DECODING, "diffusion_steps": 32},
    )
    prompts = [[{"role": "user", "content": content}] for content in ("1+1", "What is 2 + 2?")]
    trainer = DiffusionGRPOTrainer(str(checkpoint), chat_reward, args, Dataset.from_dict({"prompt": prompts * 2}))
    seen, decode = [], trainer._generate_single_turn

    def recorded(prompt_ids, *rest, **kwargs):
        seen.extend(prompt_ids)
        return decode(prompt_ids, *rest, **kwargs)

    trainer._generate_single_turn = recorded
    trainer.train()
    texts = {trainer.processing_class.decode(ids) for ids in seen}
    head = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
    tail = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert texts and texts <= {f"{head}{content}{tail}" for content in ("1+1", "What is 2 + 2?")}
    assert all(ids.count(trainer.processing_class.bos_token_id) == 1 for ids in map(list, seen))


def chat_reward(completions, **kwargs) -> list[float]:
    return reward([completion[0]["content"] for completion in completions])


@pytest.mark.parametrize("steps", [128, 256])
def test_a_canvas_of_256_is_filled_block_by_block_and_scored_exactly(checkpoint, steps):
    """Two tokens a step as d2's RL, and one as it was trained: eight blocks of 32 in turn, any order within each."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    settings = {**DECODING, "diffusion_steps": steps, "max_new_tokens": 256, "stop_at_eos": False}
    config = DiffusionGenerationConfig(**settings, eos_token_ids=(1,))
    rollout: Rollout = generate(model, ids, torch.ones_like(ids).bool(), config, seeds=torch.tensor([5])).validate()
    a_step = 256 // steps
    for number, row in enumerate(rollout.unmask_step[0].view(8, 32).tolist()):
        assert sorted(row) == sorted([number * 32 // a_step + i for i in range(32 // a_step)] * a_step)
        assert row != sorted(row), "not left to right"
    scores = token_logps(model, whole_canvas(rollout), AnyOrder(), temperature=DECODING["temperature"])
    assert scores.scored.all()
    torch.testing.assert_close(scores.logps, rollout.logps, atol=1e-9, rtol=0)
