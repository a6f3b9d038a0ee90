import gzip
import json

import pytest
import wrong_programs

from trl_dllm.sandbox.form import Form, form_of
from trl_dllm.tasks.humaneval import build_trials as humaneval_trials
from trl_dllm.tasks.mbpp import build_trials as mbpp_trials


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == 2",
        "assert f(1) == 2 and f(2) == 3, 'no'",
        "assert abs(f(1) - 2.5) < 1e-6",
        "import math\nassert math.isclose(f(1), 2.5, rel_tol=1e-6)",
        "assert f(1)",
        "assert not f(1)",
        "assert f(1) is None and f(2) is True and f(3) is not False",
        "assert set(f([1, 2])) == set([1, 2])",
        "assert sorted(f('ab'), key=len) == []",
        "assert f('a').lower() == 'a'",
        "assert f(f(1)) == 3",
        "assert f(*[1, 2], **{'a': 3}) == 6",
        "assert isinstance(f(1), int)",
        "assert [f(x) for x in range(3)] == [0, 1, 2]",
        "for x in range(3):\n    assert f(x) == x",
        "for x, y in [(1, 2), (3, 4)]:\n    assert f(x) == y",
        "inputs = [[1], [2]]\noutputs = [1, 2]\nfor x, y in zip(inputs, outputs):\n    assert f(x) == y",
        "cases = [([1], 1), ([2], 2)]\nfor x, y in cases:\n    assert f(x) == y",
        "x = [2, 1]\ny = f(x)\nassert y == [1, 2]",
        "x = [3, 1]\ntotal = sum(x)\nassert f(x) == total",
        "def same(a, b):\n    assert a == b\nsame(f(1), 2)",
        "def check(g):\n    assert g(1) == 2\ncheck(f)",
        "def run(g, x):\n    return g(x)\ndef check(h):\n    assert run(h, 1) == 2\ncheck(f)",
        "import random\nrandom.seed(1)\nx = random.randint(1, 9)\nassert f(x) == x + 1",
        "from copy import deepcopy\nx = [1]\ny = f(deepcopy(x))\nassert x == [1] and y == 1",
        "assert len(1, 2) == 3",  # a program may have a function of that name
    ],
)
def test_outside(test):
    assert form_of("", test) == Form(entry_point="len" if "len(1, 2)" in test else "f")


@pytest.mark.parametrize(
    "test, problem",
    [
        # more of the program than one function
        ("assert f(P(1)) == 1", "2 names of the program: P, f"),
        ("assert f.calls == 1", "f as something else than a function"),
        ("g = f\nassert g(1) == 2", "f as something else"),
        ("assert list(map(f, [1])) == [2]", "f as something else"),
        ("def check(g):\n    h = g\n    assert h(1) == 2\ncheck(f)", "g as something else"),
        ("f = lambda x: x\nassert f(1) == g(1)", None),
        ("def f(x): return x\nassert f(1) == 1", "0 names of the program"),
        ("assert True", "0 names"),
        ("assert f(1).value == 2", "the attribute value"),
        ("assert f(1).__class__ == int", "the attribute __class__"),
        # arguments that are no data
        ("assert f(lambda x: x, 1) == 1", "passes a function"),
        ("def g(x): return x\nassert f(g) == 1", "passes g"),
        ("assert f(len) == 1", "passes len"),
        ("assert f(int, '1') == 1", "passes int"),
        ("import math\nassert f(math) == 1", "passes math"),
        ("assert f(x for x in [1]) == 1", "a function or a generator"),
        # what the program does to its arguments
        ("x = [2, 1]\nf(x)\nassert x == [1, 2]", "without using the value"),
        ("x = [2, 1]\ny = f(x)\nassert x == [1, 2]", "look at x"),
        ("x = [2, 1]\nassert f(x) == sorted(x)", "look at x"),
        ("x = [2, 1]\ny = f(x)\nassert y is x", "look at x"),
        ("assert f(1) is f(1)", "by identity"),
        # what is no value
        ("import io\nassert f(1) == 2", "imports io"),
        ("import os.path\nassert f(1) == 2", "imports os.path"),
        ("from collections import deque\nassert f(1) == deque([2])", "imports collections"),
        ("assert f(slice(1)) == [2]", "uses slice"),
        ("assert type(f(1)) == int", "uses type"),
        ("from sys import stdout\nassert f(1) == 2", "imports sys"),
        ("from . import x\nassert f(1) == 2", "a file beside it"),
        ("from math import *\nassert f(1) == 2", r"imports \*"),
        ("f(1)\nassert open('x').read() == 'y'", "uses open"),
        ("assert eval('f(1)') == f(1)", "uses eval"),
        ("with f(1) as x:\n    assert x", "With"),
        ("try:\n    f(1)\nexcept ValueError:\n    pass", "Try"),
        ("match f(1):\n    case 2: pass\n    case _: assert False", "Match"),
        ("class A: pass\nassert f(1) == 2", "ClassDef"),
        ("def g():\n    yield f(1)\nassert list(g()) == [1]", "Yield"),
        ("assert f(1) ==", "not Python"),
        ("assert " + "(" * 10_000, "not Python"),
        ("\0", "not Python"),
    ],
)
def test_inside(test, problem):
    form = form_of("", test)
    if problem is None:
        assert form.entry_point == "g"  # the name that is free
    else:
        assert form.entry_point is None
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(form.problem)


@pytest.mark.parametrize(
    "setup, test, entry_point, problem",
    [
        ("def f(x):\n    pass", "assert f(1) == 2", "f", None),  # a stub, whose place the function takes
        ("def helper(x): return x", "assert f(helper(1)) == 2", "f", None),
        ("base = 3", "assert f(base) == 2", None, None),
        ("def f(x): pass\ny = f(1)", "assert f(1) == y", "f", "needs f before"),
        ("def f(x): pass", "def f(x): return 2\nassert f(1) == 2", "f", "a meaning of its own"),
        ("", "f = max\nassert f(1, 2) == 2", "f", "a meaning of its own"),
        ("", "from math import sqrt as f\nassert f(4) == 2", "f", "a meaning of its own"),
        ("", "assert f(1) == g(1)", "f", "uses g of the program"),
        ("root = Node(1)", "assert f(root) == 2", None, "2 names"),
        ("import os", "assert f(1) == 2", "f", "imports os"),
    ],
)
def test_setup_and_entry_point(setup, test, entry_point, problem):
    form = form_of(setup, test, entry_point)
    assert (form.problem is None) == (problem is None) and (problem or "") in (form.problem or "")
    assert form.entry_point == ("f" if problem is None else None)


def test_every_test_of_the_benchmarks_can_be_judged_outside(data_dir):
    with gzip.open(data_dir / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    trials = [trial for row in rows for trial in humaneval_trials("x = 1", {**row, "code_prompt": row["prompt"]})]
    lines = (data_dir / "mbpp" / "test.jsonl").read_text().splitlines()
    trials += [trial for line in lines for trial in mbpp_trials("x = 1", json.loads(line))]
    problems = [form_of(trial.setup, trial.test, trial.entry_point).problem for trial in trials]
    assert len(trials) == 164 + 1510 and problems.count(None) == len(trials)


def test_the_attackers_tests_are_of_the_form_that_is_claimed():
    for name, trial in wrong_programs.trials(lambda *given, **named: (given, named)).items():
        (_, test), named = trial
        form = form_of(named["setup"], test, named["entry_point"])
        assert (form.entry_point is None) == name.startswith("inside: "), (name, form)
