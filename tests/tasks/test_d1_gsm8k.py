import pytest
from helpers_tasks import reward_of

from trl_dllm.tasks import get_task
from trl_dllm.tasks.d1_gsm8k import d1_parse_answer, d1_score


TASK = get_task("gsm8k")
GOOD = "<reasoning>\nsix times seven\n</reasoning>\n<answer>\n42\n</answer>\n"


def reward(name, text, answer="42"):
    return reward_of(TASK, name, text, answer=answer)


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


def test_d1_maxima():
    one_line = [
        reward(f"d1_{name}", GOOD) for name in ("xmlcount", "soft_format", "strict_format", "int", "correctness")
    ]
    assert one_line == [0.5, 0.0, 0.5, 0.5, 2.0]  # 3.5: strict and soft exclude each other
    several = GOOD.replace("six", "six\n")
    assert [reward(f"d1_{name}", several) for name in ("soft_format", "strict_format")] == [0.0, 0.0]
    assert reward("format", several) == reward("format", GOOD) == 0.5  # the default's fix


@pytest.mark.parametrize(
    "answer, integer, right", [("42", 0.5, 2.0), ("-42", 0, 0), ("42.0", 0, 0), ("1,200", 0, 0), ("²", 0.5, 0)]
)
def test_d1_int_and_correctness(answer, integer, right):
    for text in (f"<answer> {answer}\n</answer>", f"<answer>9<answer>{answer}", answer):  # tags are not needed
        assert (reward("d1_int", text), reward("d1_correctness", text)) == (integer, right)
    assert reward("d1_correctness", "<answer>1,200</answer>", answer="1,200") == 2.0  # literally, or not at all
    assert reward("d1_correctness", "<answer>1200</answer>", answer="1,200") == 0.0
    assert reward("correctness", "<answer>1200</answer>", answer="1,200") == 2.0  # the default's fix
