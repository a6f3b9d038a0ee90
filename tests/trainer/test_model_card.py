"""The card's snippet: TRL's pipeline is autoregressive, and would run."""

from trl_dllm.generation import DiffusionGenerationConfig
from trl_dllm.trainer.model_card import rewrite_quick_start


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
