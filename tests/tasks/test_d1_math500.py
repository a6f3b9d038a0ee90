import pytest
from helpers_tasks import reward_of

from trl_dllm.tasks import get_task
from trl_dllm.tasks.d1_math500 import d1_equivalent, d1_math_format, d1_normal_form, d1_score


TASK = get_task("math")


def reward(name, text, answer="\\frac{1}{2}"):
    return reward_of(TASK, name, text, answer=answer)


@pytest.mark.parametrize(
    "text, form",
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("3/4", "\\frac{3}{4}"),
        ("x=.5", ".5"),  # the zero is only put at the start of the text and behind a space or a brace
        (".5", "\\frac{1}{2}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("90^\\circ", "90"),
        ("10\\text{ cm}", "10"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("50\\%", "50"),
        ("\\$5", "5"),
        ("\\frac", None),
        ("01/2", "01/2"),
        ("a/b", None),  # one slash, but no integers
        ("1/2/3", "1/2/3"),
        ("a\\text{ b}\\text{ c}", None),
    ],
)
def test_d1_normal_form(text, form):
    assert d1_normal_form(text) == form


def test_d1_format_never_sees_a_box():
    assert d1_math_format("<answer>\\boxed{1}</answer>") == d1_math_format("<answer>1</answer>") == 0.75
    assert d1_math_format("\\boxed{1}") == d1_math_format("") == 0.25
    assert d1_math_format("<answer>\x08oxed{1}</answer>") == 1.0  # what it looks for instead
    assert reward("d1_boxed_and_answer_tags", "<answer>\\boxed{1}</answer>") == 0.75
    # the default's fix
    texts = ["<answer>\\boxed{1}</answer>", "<answer>1</answer>", "\\boxed{1}", "<answer>\\boxed{1}", "1"]
    assert [reward("boxed", text) for text in texts] == [0.5, 0.375, 0.25, 0.25, 0.0]


def test_correctness():
    assert reward("d1_correctness", "<answer>\\boxed{\\frac12}</answer>") == 2.0
    assert reward("d1_correctness", "\\frac{1}{2}") == 2.0  # no box: the whole text
    assert reward("d1_correctness", "\\boxed{0.50}") == 0.0  # strings, not numbers
    assert reward("d1_correctness", "\\boxed{5}", answer="so it is $\\boxed{5}$.") == 2.0
    assert reward("d1_correctness", "\\fbox{5}", answer="5") == 0.0
    assert reward("d1_correctness", "x", answer="the value is \\boxed{x}") == 2.0
    assert reward("d1_correctness", "", answer="\\boxed{}") == 2.0


def test_what_cannot_be_normalised_is_compared_as_it_is():
    assert d1_equivalent("a/b", "a/b") and not d1_equivalent(" a/b", "a/b") and not d1_equivalent("a/b", "c")


@pytest.mark.parametrize(
    "text, answer, correct",
    [
        ("so \\boxed{\\frac12}.", "\\frac12", True),
        ("\\boxed{1} \\boxed{0.5}", "0.5", True),
        ("<answer>\\boxed{0.5}</answer>", "0.5", True),
        (
            "<answer>\\frac{1}{2}</answer>",
            "<answer>\\frac{1}{2}</answer>",
            False,
        ),  # no box: the whole output, tags and all
        ("\\frac{1}{2}", "\\frac{1}{2}", True),  # which may be the answer
        ("<answer>\\frac{1}{2}</answer> \\boxed{", "\\frac{1}{2}", True),  # the box never closes: the tag
        ("<answer>\\frac{1}{2}</answer> \\boxed{}", "\\frac{1}{2}", True),  # or is empty
        ("\\boxed{", None, False),
        ("\\boxed{}", "", False),
        ("", "", False),
    ],
)
def test_score(text, answer, correct):
    assert d1_score(text, {"answer": "\\frac{1}{2}"}) == {"correct": correct, "answer": answer}
