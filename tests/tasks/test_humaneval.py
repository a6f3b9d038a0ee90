import pytest
from helpers_tasks import chat, long_texts, messy_text
from hypothesis import given, settings

from trl_dllm.sandbox import ALLOW_VARIABLE
from trl_dllm.tasks import get_task
from trl_dllm.tasks.humaneval import build_trials, humaneval_reward, make_reward
from trl_dllm.tasks.programs import MAX_CODE


TASK = get_task("humaneval")
ROW = {
    "code_prompt": "import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n    '''Area of a disc.'''\n",
    "test": "def check(candidate):\n    assert abs(candidate(helper(1)) - math.pi) < 1e-9\n",
    "entry_point": "area",
}
COLUMNS = {name: [value] for name, value in ROW.items()}


def solutions_that_pass(data, **columns):
    names = ("code_prompt", "test", "entry_point")
    return sum(humaneval_reward(data["completion"], **{n: data[n] for n in names}, allow_code_execution=True))


def test_reference_solutions_pass(data_dir, sandbox):
    data = TASK.load("test", 20, data_dir=str(data_dir))
    assert solutions_that_pass(data) == 20


@pytest.mark.slow
@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_all_reference_solutions_pass(data_dir, sandbox, prompt_format):
    data = TASK.load("test", prompt_format=prompt_format, data_dir=str(data_dir))
    assert len(data) == 164 and solutions_that_pass(data) == 164


@pytest.mark.parametrize(
    "text, right",
    [
        ("```python\ndef area(r):\n    return math.pi * r * r\n```", 1.0),
        ("```python\nimport math\ndef area(r):\n    return math.pi * r * r\n```\nThat is it.", 1.0),
        ("```py\ndef area(r): return 0\n```\nNo:\n```\ndef area(r):\n    return math.pi\n```", 1.0),
        ("```python\ndef area(r):\n    return math.pi\n", 1.0),  # never closed
        ("<answer>\n```python\ndef area(r):\n    return math.pi\n```\n</answer>", 1.0),
        ("<answer>\ndef area(r):\n    return math.pi\n</answer>", 1.0),
        ("```python\nfrom __future__ import annotations\ndef area(r: X):\n    return math.pi\n```", 1.0),
        ("    return math.pi * r**2\n", 1.0),  # a body
        ("    return math.pi * r**2\n\ndef area(r):\n    return 0\n", 0.0),  # whole text with the function: it counts
        ("    return math.pi * r**2\n\nprint(area(2)) and so on", 1.0),
        ("```python\ndef other(r):\n    return math.pi\n```", 0.0),
        ("```python\ndef area(r):\n    return 3\n```", 0.0),
        ("```python\nimport sys\ndef area(r):\n    sys.exit(0)\n```", 0.0),
        ("def check(c): pass", 0.0),
        ("pi times r squared", 0.0),
        ("", 0.0),
    ],
)
def test_reward(sandbox, text, right):
    for completion in (text, chat(text)):
        assert humaneval_reward([completion], **COLUMNS, allow_code_execution=True, prompts=["x"]) == [right]


def test_score_and_permission(sandbox, monkeypatch):
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    text = "```python\ndef area(r):\n    return math.pi\n```"
    with pytest.raises(PermissionError, match="allow_code_execution"):
        TASK.rewards["tests"]([text], **COLUMNS)
    with pytest.raises(PermissionError):
        TASK.score(text, ROW)
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert TASK.score(text, ROW) == {"correct": True, "judged_outside": 1, "judged_inside": 0}
    assert TASK.score("", ROW) == {"correct": False, "judged_outside": 1, "judged_inside": 0}
    assert TASK.score("x" * (MAX_CODE + 1), ROW) == {"correct": False, "judged_outside": 0, "judged_inside": 0}
    inside = {**ROW, "test": "def check(candidate):\n    assert candidate.__name__ == 'area'\n"}
    assert TASK.score(text, inside) == {"correct": True, "judged_outside": 0, "judged_inside": 1}
    reward = make_reward()
    assert reward.__name__ == "humaneval" and reward([text], **COLUMNS, prompts=["x"]) == [1.0]


class Nothing:
    def execute_scripts(self, scripts, languages):
        return [0.0] * len(scripts)


@settings(max_examples=200, deadline=None)
@given(messy_text)
def test_any_text(text):
    assert [trial.entry_point for trial in build_trials(text, ROW)] == ["area"]
    assert humaneval_reward([text], **COLUMNS, allow_code_execution=True, provider=Nothing()) == [0.0]


@settings(max_examples=15, deadline=None)
@given(messy_text)
def test_any_text_is_run_and_fails(sandbox, text):
    assert humaneval_reward([text], **COLUMNS, allow_code_execution=True) == [0.0]


def test_long_texts_take_no_time():
    for text in long_texts():
        for trial in build_trials(text, ROW):
            assert len(trial.script) < 2 * MAX_CODE


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_load(data_dir, prompt_format):
    data = TASK.load("test", 5, prompt_format=prompt_format, data_dir=str(data_dir))
    assert data["task_id"][0] == "HumanEval/0" and "def has_close_elements" in str(data["prompt"][0])
    with pytest.raises(ValueError, match=r"train.* does not exist.*allow_test_as_train"):
        TASK.load("train", 5, data_dir=str(data_dir))
    with pytest.warns(UserWarning, match="training on its test split"):
        assert len(TASK.load("train", 5, data_dir=str(data_dir), allow_test_as_train=True)) == 5


# Two lines each, which passed while tests ran in the program's own process.
NOT_SOLVED = [
    "import sys, os\ndef {name}(*a): [os.write(3, v) for v in sys._getframe(2).f_locals.values() if type(v) is bytes]",
    "class E:\n    __eq__ = lambda *a: True\ndef {name}(*a): return E()",
    "import random\nrandom.randint = lambda *a: 0\nrange = set = lambda *a: []\ndef {name}(*a): return 0",
    "import builtins\nbuiltins.range = builtins.set = lambda *a: []\ndef {name}(*a): return 0",
    "import sys\ndef {name}(*a): return next(c for c in sys._getframe(1).f_code.co_consts if c is not None)",
]


def test_programs_that_fool_their_own_interpreter_are_wrong(data_dir, sandbox):
    data = TASK.load("test", data_dir=str(data_dir))
    columns = ("code_prompt", "test", "entry_point")
    rows = [row for row in data if row["task_id"].split("/")[1] in ("0", "38", "44", "53")]
    for code in NOT_SOLVED:
        texts = [f"```python\n{code.replace('{name}', row['entry_point'])}\n```" for row in rows]
        given = {name: [row[name] for row in rows] for name in columns}
        assert humaneval_reward(texts, **given, allow_code_execution=True) == [0.0] * 4, code
