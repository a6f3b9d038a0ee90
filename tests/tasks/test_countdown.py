import time
from fractions import Fraction

import pytest
from helpers_tasks import chat, messy_expression
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dllm.tasks import get_task
from trl_dllm.tasks.countdown import (
    MAX_DEPTH,
    countdown_reward,
    evaluate_expression,
    load,
    score,
    split_of,
)


def reward(completion, numbers=(2, 3, 4), target=10):
    columns = {"numbers": [list(numbers)], "target": [target], "prompts": ["x"], "trainer_state": None}
    return countdown_reward([completion], **columns)[0]


# Data


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("num_numbers, max_number, max_target", [(2, 9, 20), (3, 99, 99), (4, 30, 50)])
def test_problems_have_solutions_and_are_of_the_split(split, num_numbers, max_number, max_target):
    count = 8 if num_numbers == 2 else 60
    data = load(split, count, seed=5, num_numbers=num_numbers, max_number=max_number, max_target=max_target)
    assert data.column_names == ["prompt", "numbers", "target", "completion"]
    assert len({(*sorted(row["numbers"]), row["target"]) for row in data}) == len(data) == count
    for row in data:
        assert len(row["numbers"]) == num_numbers and all(1 <= number <= max_number for number in row["numbers"])
        assert 1 <= row["target"] <= max_target
        assert split_of(row["numbers"], row["target"]) == split
        # Python is the oracle for what the expression means; that the operands are the numbers, the characters show.
        expression = row["completion"]
        assert eval(expression) == row["target"]
        assert sorted(int(word) for word in "".join(c if c.isdigit() else " " for c in expression).split()) == sorted(
            row["numbers"]
        )
        assert reward(expression, row["numbers"], row["target"]) == 1.0
        assert row["prompt"] == f"{','.join(map(str, row['numbers']))}:{row['target']}="
        assert set(row["prompt"] + expression) <= set("0123456789+-*/(),:=")


def test_splits_share_no_problem():
    problems = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            for row in load(split, 60, seed=seed, num_numbers=3, max_number=9, max_target=20):
                assert problems.setdefault((*sorted(row["numbers"]), row["target"]), split) == split
    assert set(problems.values()) == {"train", "validation", "test"}


def test_split_is_pinned():
    # The order of the numbers does not matter; a change of the hash would make old and new numbers incomparable.
    splits = [split_of([number, 7, 3], 10) for number in range(1, 21)]
    assert splits == [split_of([3, number, 7], 10) for number in range(1, 21)]
    assert [s[0] for s in splits] == list("tttttttttttttttttttt")


def test_split_sizes():
    splits = [split_of([number, 2], target) for number in range(1, 51) for target in range(1, 41)]
    assert 1500 < splits.count("train") < 1700
    assert 140 < splits.count("validation") < 260 and 140 < splits.count("test") < 260


def test_seeds():
    first = load("train", 50, seed=1)
    assert first.to_list() == load("train", 50, seed=1).to_list()
    assert first["prompt"][:20] == load("train", 20, seed=1)["prompt"][:]
    assert not set(first["prompt"]) & set(load("train", 50, seed=2)["prompt"])


def test_formats():
    text = load("test", 5, seed=7)
    conversation = load("test", 5, seed=7, prompt_format="chat", data_dir="unused")
    for plain, talk in zip(text, conversation, strict=True):
        assert (plain["numbers"], plain["target"]) == (talk["numbers"], talk["target"])
        (message,) = talk["prompt"]
        assert message["role"] == "user"
        assert ", ".join(map(str, plain["numbers"])) in message["content"] and "<answer>" in message["content"]
        assert reward(talk["completion"], talk["numbers"], talk["target"]) == 1.0
        assert score(plain["completion"], plain) == {"correct": True}
        assert score(talk["completion"][0]["content"], talk) == {"correct": True}
        assert score(plain["completion"], talk) == {"correct": False}  # a conversation needs the tags


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "dev"}, "split must be"),
        ({"prompt_format": "html"}, "prompt_format must be"),
        ({"num_examples": -1}, "num_examples"),
        ({"num_numbers": 1}, "num_numbers"),
        ({"num_numbers": 7}, "num_numbers"),
        ({"max_number": 0}, "max_number=0"),
        ({"max_target": 0}, "max_target=0"),
        ({"max_number": 2, "max_target": 3, "num_examples": 100}, "were found"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"split": "train", "num_examples": 2, **arguments})


# Arithmetic


@pytest.mark.parametrize(
    "text, value",
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("10-4-3", 3),
        ("12/4/3", 1),
        ("1/3+2/3", 1),
        ("2*-3", -6),
        ("--5", 5),
        ("-2+5", 3),
        (" 8 ÷ 2 × 3 − 1 ", 11),
        ("((((7))))", 7),
        ("3*4=12", 12),
        ("3*4 = 12 ", 12),
        ("1/2", Fraction(1, 2)),
        ("0", 0),
    ],
)
def test_values(text, value):
    assert evaluate_expression(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "1+",
        "*2",
        "1 2",
        "12 3+4",
        "07",
        "1.0",
        "2**3",
        "7//2",
        "2^3",
        "2(3)",
        "(1",
        "1)",
        "()",
        "1/0",
        "1/(2-2)",
        "3=4",
        "=3",
        "3=",
        "3=3=3",
        "3=1+2",
        "3=-3",
        "1e3",
        "1_0",
        "x",
        "٣",
        "²",
        "abs(3)",
        "__import__('os')",
        "1,2",
        "[1]",
        "1;2",
        "1+\x002",
        "2 x 3",
    ],
)
def test_what_is_not_an_expression(text):
    assert evaluate_expression(text) is None


def test_limits():
    nested = "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH
    assert evaluate_expression(nested) == (1, [1])
    assert evaluate_expression(f"({nested})") is None
    assert evaluate_expression("1" + "+1" * 127)[0] == 128
    assert evaluate_expression("1" + "+1" * 128) is None


expressions = st.recursive(
    st.integers(0, 99).map(lambda number: (str(number), Fraction(number), [number])),
    lambda parts: st.tuples(parts, st.sampled_from("+-*/"), parts).map(lambda t: combine(*t)),
    max_leaves=8,
)


def combine(left, operator, right):
    value = None
    if left[1] is not None and right[1] is not None and not (operator == "/" and right[1] == 0):
        a, b = left[1], right[1]
        value = a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b
    return f"({left[0]} {operator} {right[0]})", value, left[2] + right[2]


@settings(max_examples=150, deadline=None)
@given(expressions)
def test_value_of_any_expression(expression):
    text, value, numbers = expression
    assert evaluate_expression(text) == (None if value is None else (value, numbers))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 20)), min_size=1, max_size=8))
def test_precedence_is_python_s(steps):
    text = "5" + "".join(f"{operator}{number}" for operator, number in steps)
    exact = eval("Fraction(5)" + "".join(f"{operator}Fraction({number})" for operator, number in steps))
    assert evaluate_expression(text) == (exact, [5, *(number for _, number in steps)])


# Rewards


@pytest.mark.parametrize(
    "text, plain, tagged",
    [
        ("2*3+4", 1.0, 1.0),
        ("4+3*2 = 10", 1.0, 1.0),
        ("4+3×2", 1.0, 1.0),
        ("4+3*2=11", 0.1, 0.1),
        ("2+3+4", 0.1, 0.1),  # another value
        ("10", 0.1, 0.1),  # other numbers
        ("2*3+4+4-4", 0.1, 0.1),  # a number too often
        ("2*(4+1)", 0.1, 0.1),
        ("6+4", 0.1, 0.1),
        ("banana", 0.1, 0.1),
        ("4+3*2/0", 0.1, 0.1),
        ("", 0.0, 0.1),
        (" \n", 0.0, 0.1),
    ],
)
def test_reward(text, plain, tagged):
    assert reward(text) == plain
    assert reward(chat(text)) == 0.0  # a conversation needs the tags
    inside = f"2+3+4 is 9, so <answer>\n{text} </answer>."
    assert reward(inside) == reward(chat(inside)) == tagged
    row = {"numbers": [2, 3, 4], "target": 10}
    assert score(text, row) == {"correct": plain == 1.0}
    assert score(inside, row) == {"correct": tagged == 1.0}


def test_the_last_closed_answer_counts():
    right, wrong = "<answer>2*3+4</answer>", "<answer>2+3+4</answer>"
    assert reward(chat(wrong + right)) == 1.0
    assert reward(chat(right + wrong)) == 0.1
    assert reward(chat(right + "<answer>2+")) == 1.0
    assert reward(chat("<answer>2*3+4")) == 0.0


def test_repeated_numbers_and_fractions():
    assert reward("3+3*3", (3, 3, 3), 12) == 1.0
    assert reward("3+3", (3, 3, 3), 6) == 0.1
    assert reward("8/(3-8/3)", (3, 8, 3, 8), 24) == 1.0  # exact, although 8/3 is no integer
    assert reward("8/(3-8/3)", (3, 8, 8), 24) == 0.1
    assert reward("1/3", (1, 3), 0) == 0.1


def test_rewards_of_a_batch_stay_in_order():
    columns = {"numbers": [[1, 2], [3, 4], [5, 6]], "target": [3, 12, 30]}
    assert countdown_reward(completions=["1+2", "", "5+6"], **columns) == [1.0, 0.0, 0.1]
    assert next(iter(get_task("countdown").rewards.values())) is countdown_reward


@settings(max_examples=150, deadline=None)
@given(messy_expression)
def test_any_text(text):
    result = evaluate_expression(text)
    assert result is None or (isinstance(result[0], Fraction) and all(type(number) is int for number in result[1]))
    assert reward(text) in (0.0, 0.1, 1.0)
    assert reward(chat(text)) in (0.0, 0.1, 1.0)
    assert score(text, {"numbers": [2, 3, 4], "target": 10}) == {"correct": reward(text) == 1.0}


@pytest.mark.parametrize("piece", ["(", "-", "1+", "9", "9*", "<answer>", "</answer>", "<answer>(</answer>", " ", "×"])
def test_long_texts_take_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    for long in (text, f"<answer>{text}</answer>", f"<answer>{text}1", f"{text}1"):
        assert reward(long) in (0.0, 0.1)
        assert reward(chat(long)) in (0.0, 0.1)
    assert time.perf_counter() - start < 1


def test_d1_problems(data_dir):
    data = load("test", source="d1", data_dir=str(data_dir), prompt_format="chat")
    assert len(data) == 256 and data.column_names == ["prompt", "numbers", "target"]
    assert (data["numbers"][0], data["target"][0]) == ([30, 100, 93], 23)
    with pytest.raises(ValueError, match="allow_test_as_train"):
        load("train", 4, source="d1", data_dir=str(data_dir))
    with pytest.raises(ValueError, match="source must be"):
        load("test", 4, source="d2")
    assert len(load("test")) == 256
