"""Texts that parsers have to survive, and shorthand for completions."""

from hypothesis import strategies as st


PIECES = [
    *("<reasoning>", "</reasoning>", "<answer>", "</answer>", "<answer>\n", "\n</answer>\n", "<|eot_id|>", "####"),
    *("\\boxed{", "\\boxed ", "\\boxed", "\\fbox{", "{", "}", "\\frac", "\\sqrt", "\\text{ ", "$", "%", "\\", "^"),
    *("```", "```python\n", "def f(x):\n", "    return x", "\n", " ", "\t", "=", "+", "-", "*", "/", "(", ")", "."),
    *("1", "2", "3", "4", "0", "1,200", "-5", "9**9", "²", "٣", "\x00", "\x08oxed", "\ud800", "x", "nan", "inf"),
    "1234341221434321",
]
messy_text = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))

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
