import pytest

from trl_dllm.tasks import Task
from trl_dllm.tasks.base import (
    Grid,
    check_load_arguments,
    completion_text,
    last_answer,
    last_boxed,
    marked_answers,
    without_end_tokens,
)


def test_a_task_without_parsers_has_its_score():
    task = Task(name="x", load=list, rewards={}, score=lambda text, row: {"correct": True})
    assert dict(task.parsers) == {"default": task.score} and task.stored_row is None and task.layout is None


@pytest.mark.parametrize("cells", [((0,), (None, None), (None, None)), ((0, 1, 2),) * 3, ((0, 1),) * 3])
def test_a_grid_has_whole_rows_of_cells(cells):
    if len(cells[0]) == len(cells[1]) == 2:
        assert Grid(2, *cells).box is None
        return
    with pytest.raises(ValueError, match=r"cells; they must have as many as each other, in whole rows of columns=2"):
        Grid(2, *cells)


@pytest.mark.parametrize(
    "completion, text",
    [
        ("x", "x"),
        ([], ""),
        ([{"role": "assistant", "content": "x"}], "x"),
        ([{"role": "user", "content": "y"}, {"role": "assistant", "content": "x"}], "x"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}], "x"),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    "text, answer, box",
    [
        ("<answer>1</answer><answer>2</answer>", "2", None),
        ("<answer>1</answer><answer>2", "1", None),
        ("</answer><answer>", None, None),
        ("\\boxed{1} \\boxed{\\frac{1}{2}}", None, "\\frac{1}{2}"),
        ("\\boxed{1} \\fbox{2}", None, "2"),
        ("\\boxed{1} \\boxed{2", None, None),
        ("<answer>\\boxed{1}</answer>", "\\boxed{1}", "1"),
    ],
)
def test_last_answer_and_box(text, answer, box):
    assert (last_answer(text), last_boxed(text)) == (answer, box)


def test_marked_answers_come_clearest_first():
    text = "#### 5\n\\boxed{2} <answer>\\boxed{1} apples</answer> <answer> 4"
    assert list(marked_answers(text)) == ["1", "\\boxed{1} apples", "1", "1} apples", "4", "5"]
    assert list(marked_answers("<|im_end|>" + text)) == []
    assert without_end_tokens("a<|eot_id|>b<|endoftext|>") == "a"


@pytest.mark.parametrize(
    "arguments, message",
    [(("dev", 1, "chat"), "'dev'"), (("test", 1, "html"), "'html'"), (("test", 0, "chat"), "at least 1, got 0")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_load_arguments(*arguments)
    check_load_arguments("test", None, "text")
