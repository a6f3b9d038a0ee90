from fractions import Fraction

import pytest

from trl_dllm.tasks.number import gold_number, to_number


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
        ("(3+2)-4", 4),
        ("x^{2}-4", 4),
        ("(-4)", -4),
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


def test_gold_number():
    assert gold_number("1,200") == gold_number(1200) == gold_number(1200.0) == 1200
    assert gold_number(0.5) == Fraction(1, 2) and gold_number(None) is None
