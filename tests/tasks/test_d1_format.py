import re

import pytest
from helpers_tasks import messy_text
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dllm.tasks import d1_format
from trl_dllm.tasks.d1_format import (
    d1_answer,
    d1_boxed,
    d1_first_tag,
    d1_last_tag,
    d1_soft_format_reward,
    d1_strict_format_reward,
    d1_xmlcount_reward,
)


GOOD = "<reasoning>\nsix times seven\n</reasoning>\n<answer>\n42\n</answer>\n"


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
    assert d1_xmlcount_reward([text])[0] == pytest.approx(value, abs=1e-12)


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
    assert (d1_soft_format_reward([text]), d1_strict_format_reward([text])) == ([soft], [strict])


@settings(max_examples=300, deadline=None)
@given(st.one_of(messy_text, messy_text.map(lambda text: "<reasoning>" + text)))
def test_d1_formats_are_the_patterns(text):
    soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text)
    strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text)
    assert d1_format.soft_format(text) == (0.5 if soft else 0.0)
    assert d1_format.strict_format(text) == (0.5 if strict else 0.0)
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert d1_last_tag(text) == (tags[-1].strip() if tags else None)
    assert d1_answer(text) == text.split("<answer>")[-1].split("</answer>")[0].strip()


@pytest.mark.parametrize(
    "text, box",
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} \\boxed{2} behind", "2"),
        ("\\boxed 5$ more", "5"),
        ("\\boxed{5} and \\boxed 6", "6"),
        ("\\boxed{}", ""),
        ("\\boxed{5", None),  # never closes
        ("\\boxed{5} \\boxed{6", None),
        ("\\boxed}{5}", None),
        ("\\boxed }{5}", "}{5}"),
        ("\\boxed}{{5}} x", "\\boxed}{{5}"),  # begins with no brace
        ("\\boxed[x]{5} x", "\\boxed[x]{5}"),
        ("x \\fbox{5} x", "\\fbox{5}"),  # found, but not opened
        ("\\fbox{5} \\boxed{6}", "6"),
        ("\\fbox{5", None),
        ("<answer>5</answer>", "<answer>5</answer>"),  # no box at all: all of the text
        ("", ""),
    ],
)
def test_d1_boxed(text, box):
    assert d1_boxed(text) == box


@pytest.mark.parametrize(
    "text, tag",
    [
        ("a <answer> 5\n</answer> <answer>6</answer>", "5"),
        ("</answer><answer>5</answer>", "5"),
        ("<answer><answer>5</answer>", "<answer>5"),
        ("<answer></answer>", ""),
        ("<answer>5", None),
        ("5</answer>", None),
    ],
)
def test_d1_first_tag(text, tag):
    assert d1_first_tag(text) == tag
