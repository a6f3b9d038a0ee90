import gzip
import json

import pytest

from trl_dllm.tasks import data
from trl_dllm.tasks.data import DATA_VARIABLE, choose, read_file, read_rows


ROWS = [{"n": n, "text": "é\n"} for n in range(5)]
FILES = {"train": "toy/train.jsonl", "test": "toy/test.jsonl"}
HUB = {"train": ("some/toy", "main", "train"), "test": ("some/toy", None, "validation")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def test_files_of_each_kind(folder):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines + "\n")
    (folder / "a.csv").write_text("Puzzle,Solution\n01,21\n")
    assert read_file(folder / "a.jsonl.gz") == read_file(folder / "toy" / "test.jsonl") == ROWS
    assert read_file(folder / "a.csv") == [{"Puzzle": "01", "Solution": "21"}]


def test_folder_by_argument_and_by_environment(folder, monkeypatch):
    assert read_rows("toy", "test", FILES, HUB, str(folder)) == ROWS
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    assert read_rows("toy", "test", FILES, HUB) == ROWS
    (folder / "toy" / "test.jsonl").rename(folder / "toy" / "kept")
    with gzip.open(folder / "toy" / "test.jsonl.gz", "wt") as file:
        file.write('{"n": 1}\n')
    assert read_rows("toy", "test", FILES, HUB) == [{"n": 1}]
    monkeypatch.setenv(DATA_VARIABLE, str(folder / "nowhere"))
    with pytest.raises(ValueError, match=f"nowhere.*is not a folder.*{DATA_VARIABLE}"):
        read_rows("toy", "test", FILES, HUB)


def test_never_trains_on_test_data_silently(folder):
    with pytest.raises(ValueError, match=r"toy/train.jsonl does not exist.*allow_test_as_train"):
        read_rows("toy", "train", FILES, HUB, str(folder))
    with pytest.warns(UserWarning, match="toy: training on its test split"):
        assert read_rows("toy", "train", FILES, HUB, str(folder), allow_test_as_train=True) == ROWS
    with pytest.raises(ValueError, match=r"validation.* does not exist. Splits that can be read: test"):
        read_rows("toy", "validation", FILES, HUB, str(folder), allow_test_as_train=True)


def test_hub(folder, monkeypatch):
    asked = []

    class Loaded:
        def to_list(self):
            return ROWS

    monkeypatch.setattr(data, "load_dataset", lambda *where, **split: asked.append((where, split)) or Loaded())
    assert read_rows("toy", "test", FILES, HUB) == ROWS
    assert asked == [(("some/toy", None), {"split": "validation"})]
    with pytest.raises(ValueError, match="the Hub has no 'train' split"):
        read_rows("toy", "train", FILES, {"test": HUB["test"]})


def test_choose():
    assert choose(ROWS, "test", 2, seed=1) == ROWS[:2]
    assert choose(ROWS, "test", None, seed=1) == ROWS
    shuffled = choose(ROWS, "train", None, seed=1)
    assert sorted(row["n"] for row in shuffled) == list(range(5)) and choose(ROWS, "train", 2, seed=1) == shuffled[:2]
    assert any(choose(ROWS, "train", None, seed=seed) != shuffled for seed in range(5))
    with pytest.raises(ValueError, match="num_examples=6, but the 'test' split has 5 rows"):
        choose(ROWS, "test", 6, seed=0)
