"""TRL's model cards show an autoregressive pipeline; these models are decoded by masked diffusion."""

import textwrap
from pathlib import Path


def rewrite_quick_start(folder: str, model_id: str | None, canvas_length: int) -> None:
    """Replace the first Python snippet of the card in `folder` by one that decodes a canvas of `canvas` tokens."""
    card = Path(folder) / "README.md"
    if not card.exists():
        return
    text = card.read_text()
    start = text.find("```python")
    end = text.find("```", start + 3)
    if start < 0 or end < 0:
        return
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
        config = DiffusionGenerationConfig(max_new_tokens={canvas_length}, temperature=0.0)
        rollout = generate(model, prompts["input_ids"], prompts["attention_mask"], config)
        print(tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True))
        ```"""
    )
    card.write_text(text[:start] + snippet + text[end + 3 :])
