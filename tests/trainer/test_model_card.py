"""The card's snippet: TRL's pipeline is autoregressive, and would run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_grpo import build, tiny
from helpers_hub import Hub
from peft import PeftModel
from test_records import build_sft
from transformers import AutoModelForCausalLM

from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import ESTIMATORS, MeanField
from trl_dllm.trainer.model_card import PAPERS, rewrite_quick_start
from trl_dllm.trainer.sft_trainer import OBJECTIVES


CARD = """# Title

Text.

```python
from transformers import pipeline
```

```python
other = 1
```
"""


def test_the_first_snippet_becomes_a_decoder_of_the_canvas(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    rewrite_quick_start(str(tmp_path), "me/model", {"max_new_tokens": 48})
    text = (tmp_path / "README.md").read_text()
    assert "pipeline" not in text and 'from_pretrained("me/model")' in text and "max_new_tokens=48" in text
    assert text.startswith("# Title\n\nText.\n") and text.endswith("```python\nother = 1\n```\n")


def test_the_snippet_decodes_as_the_model_was_trained_and_greedily(tmp_path):
    decoding = {"max_new_tokens": 48, "block_length": 12, "diffusion_steps": 16, "decoding": "any_order"}
    decoding |= {"cache": "exact", "remasking": "low_confidence", "stop_at_eos": False, "temperature": 0.9}
    (tmp_path / "README.md").write_text(CARD)
    rewrite_quick_start(str(tmp_path), "me/model", decoding)
    line = next(line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("config = "))
    assert eval(line.removeprefix("config = ")) == DiffusionGenerationConfig(
        48,
        block_length=12,
        diffusion_steps=16,
        decoding="any_order",
        cache="exact",
        stop_at_eos=False,
        temperature=0.0,
    )
    assert "remasking" not in line, "it has its default"


def test_a_card_without_a_snippet_is_left_alone(tmp_path):
    rewrite_quick_start(str(tmp_path), "me/model", {"max_new_tokens": 48})
    assert not list(tmp_path.iterdir())
    for text in ("no code", "```python\nwithout an end"):
        (tmp_path / "README.md").write_text(text)
        rewrite_quick_start(str(tmp_path), "me/model", {"max_new_tokens": 48})
        assert (tmp_path / "README.md").read_text() == text


# ------------------------------------------------------------------------------------------------- what a card says


TALKATIVE = {"seed": 3, "num_layers": 2}  # a model whose greedy completion shows how it was decoded


def run_snippet(text: str, folder, **environment) -> str:
    """Run the first Python block of a card in a process of its own, from `folder`; what it prints."""
    code = text.split("```python\n")[1].split("```")[0]
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def decoded_here(model, tokenizer, config: DiffusionGenerationConfig) -> str:
    """What the card's snippet prints, computed in this process."""
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer([text], add_special_tokens=False, return_tensors="pt")
    rollout = generate(model.eval(), prompts["input_ids"], prompts["attention_mask"], config)
    return f"{tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_pushed_models_card_runs_from_any_folder(tmp_path, monkeypatch, kind):
    """Pushed to a Hub on localhost by one process; loaded from there by another, which has nothing else."""
    monkeypatch.chdir(tmp_path)
    base, tokenizer = tiny(**TALKATIVE)
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        worker = [sys.executable, str(Path(__file__).with_name("push_worker.py")), "run", "base", kind]
        done = subprocess.run(worker, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = hub.repos["me/model"]
        weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
        assert {weights, "decoding.json", "tokenizer.json", "README.md", "traces/step-0.html"} <= set(files)
        assert b"(traces/step-0.html)" in files["README.md"]
        assert hub.tokens == {"Bearer hf_of_a_test"}
        card = files["README.md"].decode()
        (tmp_path / "run").rename(tmp_path / "gone")
        found = run_snippet(card, tmp_path / "elsewhere", **hub.environment(tmp_path / "other home"))
    assert "dataset" in card and "me/prompts" in card and "`base`" in card and "None" not in card
    trained = AutoModelForCausalLM.from_pretrained("base" if kind == "lora" else "gone")
    trained = PeftModel.from_pretrained(trained, "gone") if kind == "lora" else trained
    settings = DiffusionGenerationConfig(8, block_length=4, diffusion_steps=4, temperature=0.0)
    assert found == decoded_here(trained, tokenizer, settings)
    assert found != decoded_here(trained, tokenizer, DiffusionGenerationConfig(8, temperature=0.0))


def test_the_card_of_a_model_made_in_memory_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny(**TALKATIVE)
    trainer = build(
        "run",
        model=model,
        tokenizer=tokenizer,
        decoding="any_order",
        cache="exact",
        estimator="any_order",
        save_strategy="steps",
        learning_rate=1e-4,
    )
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in card and "made in memory" in card
    settings = DiffusionGenerationConfig(
        8, block_length=4, diffusion_steps=4, temperature=0.0, decoding="any_order", cache="exact"
    )
    model = AutoModelForCausalLM.from_pretrained("run")
    found = run_snippet(card, tmp_path / "elsewhere")
    assert found == decoded_here(model, tokenizer, settings)
    assert found != decoded_here(model, tokenizer, DiffusionGenerationConfig(8, temperature=0.0))


@pytest.mark.parametrize(
    ("settings", "method", "title"),
    [
        ({"estimator": "step_merge", "num_segments": 2}, "`step_merge` (`num_segments=2`)", "d2: Improved Techniques"),
        ({"estimator": "pkl_u", "estimator_kwargs": {"block_size": 4}}, "`pkl_u` (`block_size=4`", "PADRE: Pseudo-L"),
        ({"estimator": "coupled_elbo"}, "`coupled_elbo`", "DiffuCoder"),
    ],
    ids=["d2", "padre", "coupled"],
)
def test_the_card_names_likelihood_decoding_paper_and_cost(tmp_path, settings, method, title):
    trainer = build(tmp_path, save_strategy="steps", **settings)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert f"- Likelihood: {method}" in card and "`block_length=4`, `diffusion_steps=4`" in card
    flops = trainer.state.log_history[0]["flops"]
    assert f"operations: {flops:.3g} counted" in card and "up to step 1" in card
    bibtex = card.split("Cite the likelihood as:\n\n```bibtex\n")[1].split("```")[0]
    assert title in bibtex and bibtex.count("{") == bibtex.count("}")
    assert "shao2024deepseekmath" in card and "vonwerra2020trl" in card, "TRL's own stay"


def test_the_card_of_an_estimator_of_ones_own_names_its_class(tmp_path):
    class Mine(MeanField):
        pass

    trainer = build(tmp_path, save_strategy="steps", estimator=Mine())
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "- Likelihood: `Mine`" in card and "Cite the likelihood" not in card


@pytest.mark.parametrize(("objective", "title"), [("masked_diffusion", "Large Language"), ("any_order", "d2: ")])
def test_the_card_of_sft_names_objective_and_paper(tmp_path, objective, title):
    trainer = build_sft(tmp_path, objective=objective)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert f"- Objective: `{objective}`" in card
    assert f"title        = {{{{{title}" in card.split("Cite the objective as:")[1]


def test_every_estimator_and_objective_has_a_paper():
    assert set(PAPERS) == {*ESTIMATORS, *OBJECTIVES}
