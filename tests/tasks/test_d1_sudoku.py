import time

import pytest
from helpers_tasks import chat, messy_text
from hypothesis import given, settings

from trl_dllm.tasks.d1_sudoku import d1_parse_board, d1_score, d1_sudoku_reward


PUZZLE = "1030341221434321"
SOLUTION = "1234341221434321"


@pytest.mark.parametrize(
    "text, d1",
    [
        (f"<answer>{SOLUTION}</answer>", 1.0),
        (f"<answer>{SOLUTION}99</answer>", 1.0),  # cut to 16
        ("<answer>12</answer>", 0.5),  # filled up with zeros
        ("<answer>1x2 3|4</answer>", 1.0),
        ("<answer>²2 34</answer>", 1.0),  # any Unicode digit takes a cell
        ("<answer></answer>", 0.0),
        (SOLUTION, 0.0),  # needs tags
        (f"<answer>{SOLUTION}", 0.0),
        ("", 0.0),
    ],
)
def test_d1_reward(text, d1):
    for completion in (text, chat(text)):
        assert d1_sudoku_reward([completion], puzzle=[PUZZLE], solution=[SOLUTION], prompts=["x"]) == [d1]


def test_d1_reward_without_blanks():
    assert d1_sudoku_reward([f"<answer>{SOLUTION}</answer>"], puzzle=[SOLUTION], solution=[SOLUTION]) == [0.0]


@pytest.mark.parametrize(
    "text, board",
    [
        (f"<answer>\n{SOLUTION}\n</answer>", SOLUTION),
        (f"<answer>{SOLUTION}<|eot_id|>", SOLUTION),
        ("<answer>my grid: ```\n1234 3412\n2143 4321\n```</answer>", SOLUTION),
        (f"<answer></answer>{SOLUTION}<|eot_id|>", SOLUTION),
        (f"it is {SOLUTION}.", SOLUTION),
        ("<answer>a12</answer>", "a12"),
        ("nothing", ""),
    ],
)
def test_d1_parser(text, board):
    assert d1_parse_board(text) == board
    score = d1_score(text, {"puzzle": PUZZLE, "solution": SOLUTION})
    assert score["correct"] == (board == SOLUTION) and score["cells_total"] == 2


@settings(max_examples=150, deadline=None)
@given(messy_text)
def test_d1_forms_take_any_text(text):
    assert len(d1_parse_board(text)) <= 16
    assert d1_sudoku_reward([text], puzzle=[PUZZLE], solution=[SOLUTION])[0] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("piece", ["```", "``` 1", "<answer>", "<answer>```1", "1", " ", "</answer>", "```1 ", "\n"])
def test_d1_forms_take_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    d1_parse_board(text), d1_parse_board(f"<answer>{text}</answer>")
    d1_sudoku_reward([text], puzzle=[PUZZLE], solution=[SOLUTION])
    assert time.perf_counter() - start < 3
