import pytest
from helpers_tasks import chat, long_texts, messy_text
from hypothesis import given, settings

from trl_dllm.sandbox import ALLOW_VARIABLE, LocalProvider, providers
from trl_dllm.tasks import get_task
from trl_dllm.tasks.mbpp import build_trials, make_reward, mbpp_reward


TASK = get_task("mbpp")
ROW = {"test_list": ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 16"]}
COLUMNS = {"test_list": [ROW["test_list"]]}

# Written for this test, by the sentence of the problem.
SOLUTIONS = {
    "remove_Occ": (
        "def remove_Occ(text, char):\n    first = text.find(char)\n    if first < 0:\n        return text\n"
        "    text = text[:first] + text[first + 1:]\n    last = text.rfind(char)\n"
        "    return text if last < 0 else text[:last] + text[last + 1:]"
    ),
    "sort_matrix": "def sort_matrix(rows):\n    return sorted(rows, key=sum)",
    "count_common": (
        "from collections import Counter\ndef count_common(words):\n    return Counter(words).most_common(4)"
    ),
    "find_Volume": "def find_Volume(length, width, height):\n    return length * width * height / 2",
    "square_perimeter": "square_perimeter = lambda side: 4 * side",
    "remove_dirty_chars": "def remove_dirty_chars(a, b):\n    return ''.join(c for c in a if c not in set(b))",
    "test_duplicate": "def test_duplicate(items):\n    return len(set(items)) < len(items)",
    "multiples_of_num": "def multiples_of_num(m, n):\n    return [n * k for k in range(1, m + 1)]",
    "maximum_Sum": "def maximum_Sum(lists):\n    return max(map(sum, lists))",
    "binary_to_decimal": "def binary_to_decimal(number):\n    return int(str(number), 2)",
    "binomial_Coeff": "import math\ndef binomial_Coeff(n, k):\n    return math.comb(n, k)",
    "find_rect_num": "def find_rect_num(n):\n    return n * (n + 1)",
    "filter_evennumbers": "def filter_evennumbers(numbers):\n    return [n for n in numbers if n % 2 == 0]",
}


def test_handwritten_solutions_pass(data_dir, sandbox):
    data = TASK.load("test", 60, data_dir=str(data_dir))
    chosen = {name: row for name in SOLUTIONS for row in data if f" {name}(" in row["test_list"][0]}
    assert set(chosen) == set(SOLUTIONS)
    texts = [f"Here:\n```python\n{code}\n```" for code in SOLUTIONS.values()]
    tests = [chosen[name]["test_list"] for name in SOLUTIONS]
    assert mbpp_reward(texts, test_list=tests, allow_code_execution=True) == [1.0] * len(SOLUTIONS)
    # And each fails the tests of its neighbour.
    assert not any(mbpp_reward(texts[:3], test_list=tests[1:4], allow_code_execution=True))


@pytest.mark.parametrize(
    "text, fraction",
    [
        ("def f(x):\n    return x * x", 1.0),
        ("```python\ndef f(x):\n    return x * x\n```", 1.0),
        ("<answer>def f(x): return x * x</answer>", 1.0),
        ("def f(x):\n    return 1", 0.25),
        ("def f(x):\n    while x == 2: pass\n    return x * x", 0.75),  # one that hangs costs one
        ("def f(x):\n    if x > 2: exit()\n    return x * x", 0.5),
        ("print('passed')\nraise SystemExit(0)", 0.0),
        ("def g(x): return x * x", 0.0),
        ("squares", 0.0),
        ("", 0.0),
    ],
)
def test_reward(sandbox, monkeypatch, text, fraction):
    monkeypatch.setattr(providers, "PROVIDERS", {"local": lambda: LocalProvider(timeout=2)})
    for completion in (text, chat(text)):
        assert mbpp_reward([completion], **COLUMNS, allow_code_execution=True, prompts=["x"]) == [fraction]


def test_setup_score_and_permission(sandbox, monkeypatch):
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    text = "def f(x):\n    return x * factor"
    with pytest.raises(PermissionError, match="allow_code_execution"):
        TASK.rewards["tests"]([text], **COLUMNS)
    assert make_reward()([text], **COLUMNS, test_setup=["factor = 4"]) == [0.25]
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    outside = {"judged_outside": 4, "judged_inside": 0}
    once = {**ROW, "test_setup": "factor = 1"}
    assert TASK.score(text, once) == {"correct": False, "tests_passed": 0.25, **outside}
    assert TASK.score("def f(x): return x * x", ROW) == {"correct": True, "tests_passed": 1.0, **outside}
    mixed = {"test_list": ["assert f(2) == 4", "assert f(P()) == 4"]}
    text = "class P:\n    def __mul__(self, other): return 4\ndef f(x): return x * x"
    judged = {"judged_outside": 1, "judged_inside": 1}
    assert TASK.score(text, mixed) == {"correct": True, "tests_passed": 1.0, **judged}


class Nothing:
    def execute_scripts(self, scripts, languages):
        return [0.0] * len(scripts)


@settings(max_examples=200, deadline=None)
@given(messy_text)
def test_any_text(text):
    assert len(build_trials(text, ROW)) == 4
    assert mbpp_reward([text], **COLUMNS, allow_code_execution=True, provider=Nothing()) == [0.0]


@settings(max_examples=5, deadline=None)
@given(messy_text)
def test_any_text_is_run_and_fails(sandbox, text):
    assert mbpp_reward([text], **COLUMNS, allow_code_execution=True) == [0.0]


def test_long_texts_take_no_time():
    for text in long_texts():
        assert len(build_trials(text, ROW)) in (0, 4)


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_load(data_dir, prompt_format):
    data = TASK.load("test", prompt_format=prompt_format, data_dir=str(data_dir))
    assert len(data) == 498 and data.column_names == ["prompt", "text", "test_list", "test_setup"]
    assert data["test_list"][0][0] in str(data["prompt"][0]).replace("\\'", "'").replace('\\"', '"')
    with pytest.raises(ValueError, match=r"validation.* does not exist"):
        TASK.load("validation", 5, data_dir=str(data_dir))
    with pytest.warns(UserWarning, match="test split"):
        assert len(TASK.load("train", 5, data_dir=str(data_dir), allow_test_as_train=True)) == 5
