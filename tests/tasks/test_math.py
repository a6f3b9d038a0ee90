import sys
import threading
import time

import pytest
from helpers_tasks import chat, long_texts, messy_text
from hypothesis import given, settings

from trl_dllm.tasks import get_task, math500
from trl_dllm.tasks.d1_format import d1_last_box, d1_math_format, d1_normal_form
from trl_dllm.tasks.math500 import d1_equivalent, is_equivalent, parse_answer


pytest.importorskip("math_verify", reason="math-verify is not installed (pip install trl-dllm[eval])")

TASK = get_task("math")


def reward(name, text, answer="\\frac{1}{2}"):
    plain = TASK.rewards[name](prompts=["x"], completions=[text], answer=[answer], trainer_state=None)[0]
    assert plain == TASK.rewards[name](completions=[chat(text)], answer=[answer])[0]
    return plain


# Equivalence


@pytest.mark.parametrize(
    "answer, gold, equal",
    [
        ("\\frac{1}{2}", "\\frac12", True),
        ("0.5", "\\frac{1}{2}", True),
        ("x = 5", "5", True),
        ("(1, 2)", "\\left( 1, 2 \\right)", True),
        ("2, 1", "1, 2", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        ("\\text{Evelyn}", "\\text{Evelyn}", True),
        ("1,200", "1200", True),
        ("2", "3", False),
        ("(2, 1)", "(1, 2)", False),
        ("", "3", False),
        (None, "3", False),
        ("[0, 1)", "[0, 1]", False),
    ],
)
def test_equivalence(answer, gold, equal):
    assert is_equivalent(answer, gold) is equal


def test_every_gold_answer_is_its_own_equal_in_both_forms(data_dir):
    data = TASK.load("test", data_dir=str(data_dir))
    assert len(data) == 500
    for answer in data["answer"]:
        assert is_equivalent(answer, answer) and d1_equivalent(answer, answer)
    assert TASK.rewards["correctness"](data["completion"], answer=data["answer"]) == [2.0] * 500


def test_equivalence_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(is_equivalent("\\frac{2}{6}", "\\frac{1}{3}")))
    thread.start()
    thread.join(120)
    assert found == [True]


def test_what_never_ends_is_stopped_and_the_next_one_is_answered(monkeypatch):
    assert is_equivalent("\\frac{3}{9}", "\\frac{1}{3}")  # started
    monkeypatch.setattr(math500, "VERIFY_SECONDS", 1.0)
    start = time.perf_counter()
    assert not is_equivalent("9^{9^{9^{9}}}", "9^{9^{9^{8}}} + 1")
    assert time.perf_counter() - start < 20
    monkeypatch.undo()
    assert is_equivalent("\\frac{4}{12}", "\\frac{1}{3}")


def test_without_math_verify(monkeypatch):
    math500._need_math_verify.cache_clear()
    monkeypatch.setattr(math500.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trl-dllm\[eval\]"):
        is_equivalent("1", "1")
    monkeypatch.undo()
    assert is_equivalent("1", "1")


# Parsers


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{\\frac{1}{2}} and", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("<answer>\\boxed{3}</answer> \\boxed{4}", "3"),
        ("<answer>x = 3</answer>", "x = 3"),
        ("no answer 5", None),
        ("", None),
    ],
)
def test_default_parser(text, answer):
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    "text, box",
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed 5$ more", "5"),
        ("\\boxed{5", None),
        ("\\boxed{5} \\boxed{6", None),
        ("\\fbox{5}", None),
        ("5", None),
        ("\\boxed{}", ""),
    ],
)
def test_d1_last_box(text, box):
    assert d1_last_box(text) == box


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
        ("a\\text{ b}\\text{ c}", None),
    ],
)
def test_d1_normal_form(text, form):
    assert d1_normal_form(text) == form


# Rewards


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
    assert reward("correctness", "\\boxed{0.50}") == 2.0  # the default's fixes
    assert reward("correctness", "<answer>0.50</answer>") == 2.0
    assert reward("correctness", "\\frac{1}{2}") == 0.0


@settings(max_examples=200, deadline=None)
@given(messy_text)
def test_any_text(text):
    assert TASK.parsers["d1"](text, {"answer": "\\frac{1}{2}"})["correct"] in (True, False)
    for name in ("boxed", "d1_correctness", "d1_boxed_and_answer_tags"):
        assert 0 <= reward(name, text) <= 2


@settings(max_examples=30, deadline=None)
@given(messy_text)
def test_any_text_with_math_verify(text):
    assert reward("correctness", f"\\boxed{{{text}}}") in (0.0, 2.0)
    assert is_equivalent(text, "\\frac{1}{2}") in (True, False)


def test_long_texts_take_no_time():
    is_equivalent("\\frac{5}{15}", "\\frac{1}{3}")
    limit = sys.get_int_max_str_digits()
    for text in long_texts():
        start = time.perf_counter()
        for parse in TASK.parsers.values():
            parse(text, {"answer": "\\frac{1}{2}"})
        for name in TASK.rewards:
            TASK.rewards[name](completions=[text], answer=["\\frac{1}{2}"])
        assert time.perf_counter() - start < 10, text[:40]
    assert sys.get_int_max_str_digits() == limit
