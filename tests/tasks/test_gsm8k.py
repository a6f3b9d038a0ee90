import json
import time

import pytest
from helpers_tasks import long_texts, messy_text, reward_of
from hypothesis import given, settings

from trl_dllm.tasks import get_task
from trl_dllm.tasks.base import marked_answers
from trl_dllm.tasks.gsm8k import (
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
    return reward_of(TASK, name, text, answer=answer)


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
    "answer, correct", [("7", True), ("7.00", True), ("7.05", False), ("6.9", False), ("14/2", True)]
)
def test_numbers_are_equal_or_they_are_not(answer, correct):
    """Up to what a decimal of a fraction rounds off, 1e-6."""
    assert score(f"<answer>{answer}</answer>", {"answer": "7"})["correct"] == correct
    assert score("<answer>0.3333333</answer>", {"answer": "1/3"})["correct"]


def test_a_bare_number_is_an_answer_up_to_50_characters():
    short, long = "1" + ",000" * 12, "1" + ",000" * 13
    assert (len(short), len(long)) == (49, 53)
    assert parse_answer(short) == 10**36 and parse_answer(long) is None
    assert parse_answer(f"<answer>{long}</answer>") == 10**39, "marked, it is one"
    assert number_reward([f"<answer>{number}</answer>" for number in (short, long)]) == [0.5, 0.0]


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
