import sys
import threading
import time

import pytest
from helpers_tasks import long_texts, messy_text, reward_of
from hypothesis import given, settings

from trl_dllm.tasks import get_task, math500
from trl_dllm.tasks.d1_math500 import d1_equivalent
from trl_dllm.tasks.math500 import is_equivalent, parse_answer


pytest.importorskip("math_verify", reason="math-verify is not installed (pip install trl-dllm[eval])")

TASK = get_task("math")


def reward(name, text, answer="\\frac{1}{2}"):
    return reward_of(TASK, name, text, answer=answer)


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


# Rewards


def test_correctness_mends_d1():
    assert reward("correctness", "\\boxed{0.50}") == 2.0
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
