"""TRL's model cards show an autoregressive pipeline; these models are decoded by masked diffusion."""

import textwrap
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from ..generation import DiffusionGenerationConfig, decoding_of
from ..generation.saved import decoding_config


def rewrite_quick_start(folder: str, model_id: str | None, decoding: Mapping[str, object]) -> None:
    """Replace the first Python snippet of the card in `folder` by one that decodes as `decoding.json` says, greedily.

    Settings that have their default are left out, but for the canvas.
    """
    card = Path(folder) / "README.md"
    if not card.exists():
        return
    text = card.read_text()
    start = text.find("```python")
    end = text.find("```", start + 3)
    if start < 0 or end < 0:
        return
    defaults = {f.name: f.default for f in fields(DiffusionGenerationConfig) if f.name != "max_new_tokens"}
    greedy = decoding_of(decoding_config(decoding, {"temperature": 0.0}))
    settings = ", ".join(f"{name}={value!r}" for name, value in greedy.items() if value != defaults.get(name, ...))
    snippet = textwrap.dedent(
        f"""\
        ```python
        import trl_dllm  # registers the model family
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl_dllm.generation import DiffusionGenerationConfig, generate

        model = AutoModelForCausalLM.from_pretrained("{model_id}")
        tokenizer = AutoTokenizer.from_pretrained("{model_id}", padding_side="left")
        messages = [{{"role": "user", "content": "…"}}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts = tokenizer([text], add_special_tokens=False, return_tensors="pt", padding=True)
        config = DiffusionGenerationConfig({settings})
        rollout = generate(model, prompts["input_ids"], prompts["attention_mask"], config)
        print(tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True))
        ```"""
    )
    card.write_text(text[:start] + snippet + text[end + 3 :])
