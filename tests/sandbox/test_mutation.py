import ast

import pytest

from trl_dllm.sandbox.mutation import COPIES, Mutations, passed, shared_names


def seen(test):
    tree = ast.parse(test)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "f"]
    mutations = Mutations(tree, functions, {"f"})
    return {name for name in map(mutations.seen, calls) if name is not None}


@pytest.mark.parametrize(
    "test",
    [
        "assert f([1, 2]) == 3",
        "x = [1]\nassert f(x) == 1",
        "x = [1]\nn = len(x)\nassert f(x) == n",
        "x = [1]\nassert f(list.copy) == 1",
        "from copy import deepcopy\nx = [1]\nassert f(deepcopy(x)) == sum(x)",
        "x = 3\nassert f(x) == x",
        "x, y = 1, 'a'\nassert f(x, y) == y * x",
        "x = -3 + 2 * 4\nx += 1\nassert f(x) == x",
        "x = f'{1}'\nassert f(x) == x",
        "for x in range(3):\n    assert f(x) == x",
        "for x in (1, 'a'):\n    assert f(x) == x",
        "import random\nx, y = random.randint(1, 2), random.random()\nassert f(x, y) == x + y",
        "t = ''.join(['a'])\nassert f(t) == t",
        "for _ in range(3):\n    x = [1]\n    n = sum(x)\n    assert f(x) == n",
        "data = [[1], [2]]\nfor x in data:\n    assert f(x) == 1",
        "for x, y in [([1], 1), ([2], 2)]:\n    assert f(x) == y",
        "for x, y in zip([[1], [2]], [1, 2]):\n    assert f(x) == y",
        "a, b = [[1], [2]], [1, 2]\nfor i, (x, y) in enumerate(zip(a, b)):\n    assert f(x) == y",
        "x = [1]\ny = f(x)\nz = f(y)\nassert z == 1",
        "def check(c):\n    x = [1]\n    n = sum(x)\n    assert f(x) == n\ncheck(0)",
        "x = [1]\nassert f(str(x)) == repr(x)",
    ],
)
def test_not_seen(test):
    assert seen(test) == set()


@pytest.mark.parametrize(
    "test, name",
    [
        ("x = [1]\ny = f(x)\nassert x == []", "x"),
        ("x = [1]\nassert f(x) == sum(x)", "x"),
        ("x = [1]\nassert f(x, 2) + len(x) == 3", "x"),
        ("x = [1]\nassert f(a=x) == x", "x"),
        ("x = [1]\nassert f([x]) == 1\nassert x", "x"),
        ("x = [1]\nassert f(*x) == 1\nassert x", "x"),
        ("x = [[1]]\nassert f(x[0]) == 1\nassert x", "x"),
        ("x = sorted([1])\nassert f(x) == x", "x"),
        ("x = unknown()\nassert f(x) == x", "x"),
        # by another name
        ("x = [1]\ny = x\nz = f(x)\nassert y == []", "y"),
        ("x = [1]\ny = [x]\nz = f(y[0])\nassert x == []", "x"),
        ("x = [1]\nall = []\nall.append(x)\nz = f(x)\nassert all == [[]]", "all"),
        ("data = [[1], [2]]\nfor x in data:\n    assert f(x) == 1\nassert data == []", "data"),
        ("a = [1]\nfor x, y in [(a, a)]:\n    assert f(x) == y", "y"),
        ("a = [1]\ncases = [(a, a)]\nfor x, y in cases:\n    assert f(x) == y", "y"),
        ("data = [[1]]\ny = data[0]\nfor x in data:\n    z = f(x)\nassert y == []", "y"),
        ("data = [[1], [2]]\nrows = [row for row in data]\nassert f(rows) == 1\nassert data == []", "data"),
        ("def g(x):\n    return f(x)\ny = [1]\nassert g(y) == 1\nassert y == []", "y"),
        ("def g(x):\n    return f(x)\ny = [1]\nassert g(x=y) == 1\nassert y == []", "y"),
        ("y = [1]\ndef g():\n    return f(y)\ndef h():\n    return y\nassert h() == g()", "y"),
        # in the next round
        ("x = [1]\nfor _ in range(3):\n    n = sum(x)\n    assert f(x) == n", "x"),
        ("x = [1]\nwhile sum(x):\n    y = f(x)", "x"),
        ("for x in [[1]] * 3:\n    assert f(x) == sum(x)", "x"),
        ("x = [1]\nassert [sum(x) + f(x) for _ in range(2)] == [2, 2]", "x"),
        ("for i in range(2):\n    x = [1]\n    for j in range(2):\n        n = sum(x)\n        assert f(x) == n", "x"),
    ],
)
def test_seen(test, name):
    assert seen(test) == {name}


def test_names_that_a_value_shares():
    def names(text):
        return set(shared_names(ast.parse(text, mode="eval").body, COPIES))

    assert (
        names("[a, (b, c.d)]") == {"a", "b", "c"}
        and names("len(a) + g(b)") == {"b"}
        and names("copy.deepcopy(a)") == set()
    )


def test_parameters_of_the_test_s_own_functions():
    call = ast.parse("g(1, z=3)", mode="eval").body
    (function,) = ast.parse("def g(x, z): pass").body
    assert [(name, ast.unparse(value)) for name, value in passed(call, {"g": function})] == [("x", "1"), ("z", "3")]
    assert passed(call, {}) == []
