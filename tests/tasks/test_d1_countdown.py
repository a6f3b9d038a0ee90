import json
import time

import pytest
from helpers_tasks import chat, messy_expression
from hypothesis import given, settings

from trl_dllm.tasks import get_task
from trl_dllm.tasks.countdown import countdown_reward
from trl_dllm.tasks.d1_countdown import d1_countdown_reward, d1_parse_answer, d1_score


@pytest.mark.parametrize(
    "text, d1, ours",
    [
        ("<answer>2*3+4</answer>", 1.0, 1.0),
        ("<answer>2*3+4 = 10</answer>", 0.1, 1.0),  # digits of the result count as a number
        ("<answer>\\boxed{2*3+4}</answer>", 0.1, 1.0),
        ("<answer>2\\times 3+4</answer>", 0.1, 1.0),
        ("<answer>2×3+4</answer>", 0.1, 1.0),
        ("<answer>4**2-3</answer>", 0.1, 0.1),  # 13
        ("<answer>3*4-2</answer>", 1.0, 1.0),
        ("<answer>3**2+4-3</answer>", 0.1, 0.1),
        ("<answer>(4//3)*(2*5)</answer>", 0.1, 0.1),
        ("<answer>2.3+4</answer>", 0.1, 0.1),
        ("<answer></answer>", 0.1, 0.1),
        ("<answer>2*3+4</answer><answer>x</answer>", 0.1, 0.1),
        ("2*3+4", 0.0, 0.0),
        ("<answer>2*3+4", 0.0, 0.0),
        ("<answer>9**9**9**2*3+4</answer>", 0.1, 0.1),
    ],
)
def test_d1_reward(text, d1, ours):
    columns = {"numbers": [[2, 3, 4]], "target": [10]}
    for completion in (text, chat(text)):
        assert d1_countdown_reward([completion], **columns, prompts=["x"]) == [d1]
    assert countdown_reward([chat(text)], **columns) == [ours]


def test_d1_takes_what_python_does():
    def d1(text, numbers, target):
        return d1_countdown_reward([f"<answer>{text}</answer>"], numbers=[numbers], target=[target])[0]

    assert d1("2**3", [2, 3], 8) == 1.0
    assert d1("7//2", [7, 2], 3) == 1.0
    assert d1("1.5*2", [1, 5, 2], 3) == 1.0  # two numbers make a decimal
    assert d1("1/3*3", [1, 3, 3], 1) == 1.0  # in floating point
    assert d1("07+1", [7, 1], 8) == 0.1  # no number in Python
    assert d1("2(3)", [2, 3], 6) == 0.1
    assert d1("-(2-5)", [2, 5], 3) == 1.0
    assert d1("1/0", [1, 0], 1) == 0.1
    assert d1("9**9**9", [9, 9, 9], 1) == 0.1
    assert d1("2\n+3", [2, 3], 5) == 0.1
    assert d1("(2\n+3)", [2, 3], 5) == 1.0


@pytest.mark.parametrize(
    "text, expression",
    [
        ("\\boxed{2 + 3}", "2 + 3"),
        ("\\boxed{2 \\times 3 = 6}", "2 * 3"),
        ("<answer>2 + 3</answer> \\boxed{4}", "4"),
        ("<answer>2 + 3 = 5</answer>", "2 + 3"),
        ("so 2 + 3 = 5 is it", "2 + 3"),  # no mark at all: the first equation of the text
        ("\\boxed{2 + 3> and 1 - 1 = 0", "1 - 1"),
        ("<answer>\\boxed{2 \\div 3}</answer>", "2 / 3"),
        ("<answer>2 + 3</answer>", "<answer>2 + 3</answer>"),  # no box: the whole output, tags and all
        ("4 - 1 <answer>2 + 3</answer> = 5", ""),  # what stands before the equals sign
        ("<answer>2 + 3</answer> \\boxed{2 + 3", "2 + 3"),  # the box never closes: the first tag
        ("\\fbox{2 + 3}", "\\fbox{2 + 3}"),
        ("\\boxed{}", ""),
        ("", ""),
    ],
)
def test_d1_parser(text, expression):
    assert d1_parse_answer(text) == expression


@pytest.mark.parametrize(
    "text, numbers, target, correct",
    [
        ("\\boxed{2*3+4}", [2, 3, 4], 10, True),
        ("\\boxed{\n2*3+4 }", [2, 3, 4], 10, True),
        ("\\boxed{8/(3-8/3)}", [8, 3, 8, 3], 24, True),  # 23.999999999999996: within 1e-5
        ("\\boxed{2*3+4 = 10}", [2, 3, 4], 10, True),
        ("2*3+4", [2, 3, 4], 10, True),
        ("<answer>2*3+4 = 10</answer>", [2, 3, 4], 10, True),  # the first equation of the output
        ("<answer>2*3+4</answer>", [2, 3, 4], 10, False),  # no box and no equation: the output is no expression
        ("\\boxed{2*3+4} \\boxed{", [2, 3, 4], 10, False),
    ],
)
def test_d1_score(text, numbers, target, correct):
    assert d1_score(text, {"numbers": numbers, "target": target}) == {"correct": correct}


@settings(max_examples=150, deadline=None)
@given(messy_expression)
def test_d1_forms_take_any_text(text):
    columns = {"numbers": [[2, 3, 4]], "target": [10]}
    assert d1_countdown_reward([text], **columns)[0] in (0.0, 0.1, 1.0)
    assert isinstance(d1_score(text, {"numbers": [2, 3, 4], "target": 10})["correct"], bool)


@pytest.mark.parametrize("piece", ["(", "-", "1+", "9**", "1=", "=1", "9", "\\boxed{", "\\boxed{{{", "<answer>", " "])
def test_d1_forms_take_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    for long in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", f"<answer>{text[:9_000]}</answer>"):
        d1_countdown_reward([long], numbers=[[1, 1]], target=[2])
        d1_score(long, {"numbers": [1, 1], "target": 2})
    assert time.perf_counter() - start < 5


def test_d1_numbers_on_stored_outputs(data_dir):
    task = get_task("countdown")
    lines = (data_dir / "llada_generations" / "countdown_256.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    correct = {
        name: sum(parse(record["generations"], task.stored_row(record))["correct"] for record in records)
        for name, parse in task.parsers.items()
    }
    assert len(records) == 256
    assert correct == {"default": 49, "d1": 50}
