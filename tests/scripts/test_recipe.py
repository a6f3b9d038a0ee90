"""`trl-dllm recipe` prints one, all, or the page in docs."""

import pytest

from trl_dllm import cli
from trl_dllm.recipe import recipe_paths, render_recipe
from trl_dllm.scripts import recipe


def run(*argv: str) -> None:
    recipe.main(recipe.make_parser().parse_args(argv))


@pytest.mark.parametrize("name", ["llada_8b/grpo/gsm8k_step_merge", "tiny_llada/sft/sudoku"])
def test_one_is_printed_complete(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(name)
    assert capsys.readouterr().out == render_recipe(recipe_paths()[name])


def test_without_a_name_all_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run()
    printed = capsys.readouterr().out
    for name in recipe_paths():
        folder, _, short = name.rpartition("/")
        assert folder in printed and f"│ {short} " in printed, "whole, even on a narrow terminal"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "did you mean tiny_sdar/sft/sudoku?"), ("base: none.yaml\n", "not a file beside it")]
)
def test_what_cannot_be_printed_is_one_line(text, message, tmp_path):
    path = tmp_path / "sft" / "sudoku.yaml"
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(SystemExit, match=f"^trl-dllm recipe: .*{message}"):
        cli.main(["recipe", "sft/sudoku" if text is None else str(path)])
