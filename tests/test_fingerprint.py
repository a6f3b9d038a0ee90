"""What a result belongs to, as a file, and how a difference is told."""

import json

import pytest

from trl_dllm.fingerprint import FINGERPRINT, Fingerprint, differences, in_a_line, refuse


def test_it_is_read_back_as_it_was_written(tmp_path):
    meaning = {"seed": 1, "betas": (0.9, 0.98), "none": None, "nested": {"a": [1.5]}, "path": tmp_path}
    written = Fingerprint(meaning, {"max_steps": 3}, {"world_size": 2}, {"global_step": 3})
    written.write(tmp_path / "new")
    assert Fingerprint.read(tmp_path / "new") == written
    assert written.meaning["betas"] == [0.9, 0.98] and written.meaning["path"] == str(tmp_path)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FINGERPRINT], "nothing half-written is left"
    assert Fingerprint.read(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"meaning": {}, "colour": "red"}'])
def test_a_file_that_is_no_fingerprint_is_named(tmp_path, text):
    (tmp_path / FINGERPRINT).write_text(text)
    with pytest.raises(ValueError, match=f"{FINGERPRINT} cannot be read .* Delete the file"):
        Fingerprint.read(tmp_path)


def test_differences_are_in_the_order_of_what_is_now():
    was, now = {"gone": 1, "same": 2, "b": [1], "a": None}, {"a": 0, "same": 2, "b": [2], "new": "x"}
    assert differences(was, now) == [("a", None, 0), ("b", [1], [2]), ("new", None, "x"), ("gone", 1, None)]
    assert differences(was, dict(reversed(was.items()))) == []
    assert in_a_line(differences(was, now)[:2]) == "a null → 0, b [1] → [2]"


def test_a_refusal_has_a_table_and_the_remedies():
    different = [("learning_rate", 1e-5, 3e-5), ("weights", "a" * 32, "b" * 32), ("[bold]", "[red]", ["x"])]
    with pytest.raises(ValueError) as error:
        refuse("runs/a holds a run", different, "Choose another.")
    first, *table, last = str(error.value).splitlines()
    assert first == "runs/a holds a run with other settings (learning_rate, weights, [bold] differ)."
    assert last == "Choose another."
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in table]
    assert ["field", "was", "is"] in cells and ["learning_rate", "1e-05", "3e-05"] in cells
    assert ["weights", "aaaaaaaaaaaa…", "bbbbbbbbbbbb…"] in cells and ["[bold]", "[red]", '["x"]'] in cells
    assert refuse("nothing", [], "differs") is None


def test_a_result_of_another_kind_is_told_by_that_alone():
    with pytest.raises(ValueError, match=r"other settings \(command differ\)") as error:
        refuse("it holds a run", [("seed", 1, 2), ("command", "grpo", "sft")], "Choose another.")
    assert "seed" not in str(error.value)


def test_a_long_value_is_shown_whole(tmp_path):
    value = json.dumps(list(range(60)))
    with pytest.raises(ValueError) as error:
        refuse("it holds a run", [("names", value, "x")], "")
    text = "".join(line.split("│")[2].strip() for line in str(error.value).splitlines() if line.count("│") == 4)
    assert text.replace(" ", "") == value.replace(" ", "")
