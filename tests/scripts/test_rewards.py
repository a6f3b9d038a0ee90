"""Rewards by name, by path and by default; a name that is none says what to write."""

import pytest
from trl.rewards import think_format_reward

from trl_dllm.scripts.rewards import resolve_rewards
from trl_dllm.tasks.sudoku import sudoku_cells_reward, sudoku_solved_reward


def test_rewards_by_name_by_path_and_by_default():
    assert resolve_rewards("sudoku", None, None) == [sudoku_cells_reward]
    names = ["solved", "think_format_reward", "trl_dllm.tasks.sudoku.sudoku_cells_reward"]
    assert resolve_rewards("sudoku", names, None) == [sudoku_solved_reward, think_format_reward, sudoku_cells_reward]
    assert resolve_rewards("sudoku", ["solved"], "a/model") == ["a/model", sudoku_solved_reward]
    assert resolve_rewards("sudoku", [], "a/model") == ["a/model"] == resolve_rewards(None, None, "a/model")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sovled"], r"'sovled' is neither a reward of task 'sudoku' .*\(did you mean 'solved'\?\)"),
        (["think_format_rewar"], r"did you mean 'think_format_reward'"),
        ([], r"=\[\] names no reward\. Name one of .*solved"),
        (["accuracy"], "'accuracy' is open-r1's name; write TRL's accuracy_reward, or the task's own"),
        (["format"], "'format' is open-r1's name; write TRL's think_format_reward"),
        (["tag_count"], "'tag_count' is open-r1's name; write a function of your own by its path"),
        (["get_soft_overlong_punishment"], "neither a reward of task"),
        (["accuracy_rewards"], "neither a reward of task"),
        (["__file__"], "neither a reward of task"),
        (["no.such.reward"], "'no.such.reward' cannot be imported: No module named 'no'"),
        (
            ["trl_dllm.tasks.sudoku.no_reward"],
            "'trl_dllm.tasks.sudoku.no_reward' cannot be imported: .* has no 'no_reward'",
        ),
        ([".reward"], "'.reward' cannot be imported"),
    ],
)
def test_a_name_that_is_none_says_what_to_write(names, message):
    with pytest.raises(ValueError, match=f"^reward_funcs.*{message}"):
        resolve_rewards("sudoku", names, None)


def test_without_a_task_a_reward_must_be_named():
    with pytest.raises(ValueError, match="reward_funcs=None names no reward"):
        resolve_rewards(None, None, None)
