import json
import re
import time
from fractions import Fraction

import pytest
from helpers_tasks import chat, long_texts, messy_text
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dllm.tasks import d1_format, get_task
from trl_dllm.tasks.base import d1_answer, d1_last_tag, marked_answers
from trl_dllm.tasks.gsm8k import (
    d1_parse_answer,
    d1_score,
    format_reward,
    gsm8k_reward,
    number_reward,
    parse_answer,
    score,
    to_number,
)


TASK = get_task("gsm8k")
GOOD = "<reasoning>\nsix times seven\n</reasoning>\n<answer>\n42\n</answer>\n"


def reward(name, text, answer="42"):
    values = [TASK.rewards[name](prompts=["x"], completions=[text], answer=[answer], trainer_state=None)[0]]
    values.append(TASK.rewards[name](prompts=["x"], completions=[chat(text)], answer=[answer])[0])
    assert values[0] == values[1]
    return values[0]


# Numbers


@pytest.mark.parametrize(
    "text, number",
    [
        ("42", 42),
        ("1,200", 1200),
        ("1{,}200,000", 1_200_000),
        ("$1,200.50", Fraction("1200.5")),
        ("\\$8,400", 8400),
        ("-5", -5),
        ("− 5", -5),
        ("9 - 5", 5),
        ("2 + 3 = 5", 5),
        ("50\\%", 50),
        ("\\frac{2}{3}", Fraction(2, 3)),
        ("3/4 cups", Fraction(3, 4)),
        ("2:00 pm", 2),
        ("360\\text{ hours}", 360),
        (".5", Fraction(1, 2)),
        ("1,2", 2),
        ("12,3456", 3456),
        ("3.", 3),
        ("none", None),
        ("1/0", None),
        ("²", None),
        ("9" * 41, None),
        (None, None),
    ],
)
def test_to_number(text, number):
    assert to_number(text) == number


@pytest.mark.parametrize(
    "text, number",
    [
        (GOOD, 42),
        ("<answer>1</answer> no <answer>42</answer>", 42),
        ("<answer>\\boxed{42} apples, not 43</answer>", 42),
        ("so \\boxed{42}", 42),
        ("<answer></answer> \\boxed{42}", 42),
        ("<answer>\\boxed{}42</answer>", 42),
        ("\\boxed{42", 42),
        ("<answer>42", 42),
        ("7 * 6\n#### 42\nQuestion: 3", 42),
        ("<answer>42</answer><|eot_id|><answer>43</answer>", 42),
        ("42", 42),
        (" 42\n", 42),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_default_parser(text, number):
    assert parse_answer(text) == number
    assert score(text, {"answer": "42"}) == {"correct": number == 42, "answer": None if number is None else "42"}
    assert gsm8k_reward([text], answer=["42"]) == [2.0 if number == 42 else 0.0]


@pytest.mark.parametrize(
    "text, number",
    [
        ("\\boxed{1,200}", 1.0),  # the comma bug
        ("\\boxed{1200} and \\boxed{5}", 1200.0),  # the first box, not the last
        ("\\boxed{...} \\boxed{7}", 7.0),
        ("\\boxed{} \\boxed{7}", 7.0),
        ("\\boxed{x} \\boxed{7}", 7.0),
        ("\\boxed{\\frac{2}{3}}", 2.0),  # to the first closing brace
        ("\\boxed{\n7}", None),  # within a line
        ("\\boxed{7", None),
        ("<answer>8</answer> \\boxed{7}", 7.0),  # a box before tags
        ("<answer>1,200</answer>", 200.0),  # the last run of digits
        ("<answer>3 + 4 = 7</answer> <answer>8</answer>", 7.0),  # the first tags
        ("<answer>7", None),
        ("7", None),
        ("\\boxed{-7.5}", -7.5),
    ],
)
def test_d1_parser(text, number):
    assert d1_parse_answer(text) == number
    assert d1_score(text, {"answer": 7.0})["correct"] == (number == 7)


# d1's rewards


def test_d1_maxima():
    one_line = [
        reward(f"d1_{name}", GOOD) for name in ("xmlcount", "soft_format", "strict_format", "int", "correctness")
    ]
    assert one_line == [0.5, 0.0, 0.5, 0.5, 2.0]  # 3.5: strict and soft exclude each other
    several = GOOD.replace("six", "six\n")
    assert [reward(f"d1_{name}", several) for name in ("soft_format", "strict_format")] == [0.0, 0.0]
    assert reward("format", several) == reward("format", GOOD) == 0.5  # the default's fix


@pytest.mark.parametrize(
    "text, value",
    [
        (GOOD, 0.5),
        ("", 0.0),
        ("<reasoning>\n", 0.125),
        ("<reasoning>\n<reasoning>\n", 0.0),
        (GOOD + "x" * 10, 0.125 * 4 - 0.001 * 10 - 0.001 * 10),
        (GOOD + "x" * 1000, 0.125 * 4 - 1.0 - 1.0),  # unbounded below
        ("a\n<answer>\nb", 0.125 - 0.001 * 12),  # no closing tag: all of the text is behind it
        ("\n</answer>", 0.125 + 0.001),  # one more than an eighth: the line break was counted on
    ],
)
def test_d1_xmlcount(text, value):
    assert reward("d1_xmlcount", text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "text, soft, strict",
    [
        ("<reasoning>a</reasoning><answer>b</answer> more", 0.5, 0.0),
        ("<reasoning>a</reasoning>\n \n<answer>b</answer>", 0.5, 0.0),
        (" <reasoning>a</reasoning><answer>b</answer>", 0.0, 0.0),
        ("<reasoning>a\nb</reasoning><answer>b</answer>", 0.0, 0.0),
        ("<reasoning>a</reasoning><answer>b\n</answer>", 0.0, 0.0),
        ("<reasoning>a</reasoning><answer>\n</reasoning> <answer>c</answer>", 0.0, 0.0),
        ("<reasoning></reasoning><answer>b</reasoning>\n<answer></answer>", 0.5, 0.0),
        (GOOD, 0.0, 0.5),
        (GOOD + "\n", 0.0, 0.5),
        (GOOD + "\n\n", 0.0, 0.0),
        (GOOD[:-1], 0.0, 0.0),
    ],
)
def test_d1_formats(text, soft, strict):
    assert (reward("d1_soft_format", text), reward("d1_strict_format", text)) == (soft, strict)


@pytest.mark.parametrize(
    "answer, integer, right", [("42", 0.5, 2.0), ("-42", 0, 0), ("42.0", 0, 0), ("1,200", 0, 0), ("²", 0.5, 0)]
)
def test_d1_int_and_correctness(answer, integer, right):
    for text in (f"<answer> {answer}\n</answer>", f"<answer>9<answer>{answer}", answer):  # tags are not needed
        assert (reward("d1_int", text), reward("d1_correctness", text)) == (integer, right)
    assert reward("d1_correctness", "<answer>1,200</answer>", answer="1,200") == 2.0  # literally, or not at all
    assert reward("d1_correctness", "<answer>1200</answer>", answer="1,200") == 0.0
    assert reward("correctness", "<answer>1200</answer>", answer="1,200") == 2.0  # the default's fix


@settings(max_examples=300, deadline=None)
@given(st.one_of(messy_text, messy_text.map(lambda text: "<reasoning>" + text)))
def test_d1_formats_are_the_patterns(text):
    soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text)
    strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text)
    assert d1_format.soft_format(text) == (0.5 if soft else 0.0)
    assert d1_format.strict_format(text) == (0.5 if strict else 0.0)
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert d1_last_tag(text) == (tags[-1].strip() if tags else None)


# The default's rewards


def test_default_rewards():
    assert format_reward([GOOD, "x" + GOOD, GOOD + "x", GOOD * 2]) == [0.5, 0.0, 0.0, 0.0]
    assert number_reward([f"<answer>{text}</answer>" for text in ("-1,200.5", "$7", "7 eggs", "")]) == [0.5, 0.5, 0, 0]
    assert number_reward(["42"]) == [0.0]
    assert next(iter(TASK.rewards)) == "correctness" and TASK.rewards["correctness"] is gsm8k_reward


# Anything at all


@settings(max_examples=200, deadline=None)
@given(messy_text)
def test_any_text(text):
    for parse in TASK.parsers.values():
        assert isinstance(parse(text, {"answer": "42"})["correct"], bool)
    for name in TASK.rewards:
        assert -1 < reward(name, text) <= 2
    assert all(answer and answer == answer.strip() for answer in marked_answers(text))
    assert d1_answer(text) == text.split("<answer>")[-1].split("</answer>")[0].strip()


def test_long_texts_take_no_time():
    for text in long_texts():
        start = time.perf_counter()
        for parse in TASK.parsers.values():
            parse(text, {"answer": "42"})
        for name in TASK.rewards:
            TASK.rewards[name](completions=[text], answer=["42"])
        assert time.perf_counter() - start < 5, text[:40]


# Data


def test_d1_numbers_on_stored_outputs(data_dir):
    lines = (data_dir / "llada_generations" / "gsm8k_256.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    correct = {
        name: sum(parse(record["generations"], TASK.stored_row(record))["correct"] for record in records)
        for name, parse in TASK.parsers.items()
    }
    assert len(records) == 1130
    assert correct == {"default": 876, "d1": 863}


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_load(data_dir, prompt_format):
    data = TASK.load("test", 50, prompt_format=prompt_format, data_dir=str(data_dir))
    assert len(data) == 50 and data["answer"][0] == "18"
    assert data.column_names == ["prompt", "question", "answer", "completion"]
    assert TASK.rewards["correctness"](data["completion"], answer=data["answer"]) == [2.0] * 50
    if prompt_format == "chat":
        assert TASK.rewards["format"](data["completion"]) == [0.5] * 50
        assert TASK.rewards["d1_correctness"](data["completion"], answer=data["answer"]) == [2.0] * 50
    assert "<<" not in str(data["completion"][:])


def test_every_gold_answer_is_a_number(data_dir):
    for split, size in (("train", 7473), ("test", 1319)):
        data = TASK.load(split, data_dir=str(data_dir))
        assert len(data) == size and all(to_number(answer) is not None for answer in data["answer"])
