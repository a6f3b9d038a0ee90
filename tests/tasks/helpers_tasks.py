"""Texts that parsers have to survive, and shorthand for completions."""

import json

from hypothesis import strategies as st


PIECES = [
    *("<reasoning>", "</reasoning>", "<answer>", "</answer>", "<answer>\n", "\n</answer>\n", "<|eot_id|>", "####"),
    *("\\boxed{", "\\boxed ", "\\boxed", "\\fbox{", "{", "}", "\\frac", "\\sqrt", "\\text{ ", "$", "%", "\\", "^"),
    *("```", "```python\n", "def f(x):\n", "    return x", "\n", " ", "\t", "=", "+", "-", "*", "/", "(", ")", "."),
    *("1", "2", "3", "4", "0", "1,200", "-5", "9**9", "²", "٣", "\x00", "\x08oxed", "\ud800", "x", "nan", "inf"),
    "1234341221434321",
]
messy_text = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))

EXPRESSION_PIECES = [
    *"0123456789+-*/()=×÷− x.^,",
    "**",
    "//",
    "<answer>",
    "</answer>",
    "12",
    "1e9",
    "\n",
    "\ud800",
    "٣",
    "²",
    "((((",
    "1/0",
]
messy_expression = st.one_of(st.text(), st.lists(st.sampled_from(EXPRESSION_PIECES), max_size=60).map("".join))

# Each repeated to a megabyte: what makes a backtracking or a recursive parser hang.
LONG_PIECES = [
    *("\\boxed{{{", "\\boxed{", "{", "}", "<answer>", "</answer>", "<answer></answer>", "</reasoning><answer>"),
    *("<reasoning>", "```", "``` 1", "####", "(", "1", "1+", "9**", "=1", "1=", "- ", "\\frac", "\\sqrt", " ", "\n"),
    *("1,", "1,200", ".", "\\text{ ", "$", "\\boxed ", "<|", "<", "/", "\ndef f():\n", "</reasoning>\n<answer>"),
]


def chat(text):
    return [{"role": "assistant", "content": text}]


def long_texts():
    for piece in LONG_PIECES:
        text = piece * (1_000_000 // len(piece))
        yield from (text, f"<reasoning>{text}", f"<answer>{text}</answer>", f"\\boxed{{{text}}}")


def reward_of(task, name, text, **columns):
    """One reward of one completion, which is the same as text and as a conversation."""
    columns = {column: [value] for column, value in columns.items()}
    plain = task.rewards[name](prompts=["x"], completions=[text], **columns, trainer_state=None)[0]
    assert plain == task.rewards[name](completions=[chat(text)], **columns)[0]
    return plain


def write_reviews(folder, snippets=None):
    """A corpus of the task `reviews` in `folder`: the snippets, or sixty sentences about films."""
    if snippets is None:
        subjects = ("film", "story", "cast", "score", "plot", "camera", "ending", "script", "hero", "villain")
        starts = ("The first {}", "A second {}", "This good {}", "That dull {}", "Some new {}", "One old {}")
        ends = ("is great fun", "makes a bad evening", "leaves you where you were")
        openings = [start.format(subject) for start in starts for subject in subjects]
        snippets = [f"{opening} {ends[i % 3]}" for i, opening in enumerate(openings)]
    path = folder / "reviews" / "snippets.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in snippets))
    return folder
