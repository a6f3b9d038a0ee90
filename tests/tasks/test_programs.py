import pytest
from helpers_tasks import long_texts, messy_text
from hypothesis import given, settings

from trl_dllm.tasks.programs import MAX_CODE, code_format_reward, defines, extract_code, future_first, with_execution


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```\nand\n```py\ny = 2\n```\nbye", "y = 2\n"),
        ("```python\nx = 1\n", "x = 1\n"),  # never closed
        ("```x = 1```", "x = 1"),
        ("<answer>\nx = 1\n</answer>", "x = 1"),
        ("```\nx\n```<answer>```\ny\n```</answer>", "y\n"),
        ("```\nx\n```<|eot_id|>```\ny\n```", "x\n"),
        ("x = 1", None),
        ("", None),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_code_format():
    texts = ["```python\nx = 1\n```", "```python\nx =\n```", "x = 1", "```\n\n```", "<answer>x = 1</answer>"]
    assert code_format_reward(texts) == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert code_format_reward(["```\n" + "x = 1\n" * MAX_CODE]) == [0.5]


def test_definitions():
    assert defines("import x\nasync def f(): pass", "f") and defines("class f: pass", "f")
    assert not defines("def ff(): pass\n  def f(): pass\nf = 1", "f")
    assert future_first("x = 1\nfrom __future__ import annotations\ny = 2") == (
        "from __future__ import annotations\nx = 1\ny = 2"
    )


def test_with_execution_sets_what_it_was_given():
    def reward(completions, **options):
        return [options]

    chosen = with_execution("name", reward, False, "elsewhere")
    assert chosen.__name__ == "name"
    assert chosen(["x"], a=1, allow_code_execution=True) == [
        {"a": 1, "allow_code_execution": False, "provider": "elsewhere"}
    ]


@settings(max_examples=200, deadline=None)
@given(messy_text)
def test_any_text(text):
    code = extract_code(text)
    assert code is None or code in text
    assert code_format_reward([text])[0] in (0.0, 0.5, 1.0)


def test_long_texts_take_no_time():
    for text in long_texts():
        code_format_reward([text])
