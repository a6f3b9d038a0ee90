import pytest
from helpers_tasks import write_reviews

from trl_dllm.tasks import TASKS, get_task


def test_all_tasks_are_there():
    assert set(TASKS) == {"gsm8k", "math", "countdown", "sudoku", "humaneval", "mbpp", "reviews"}
    for task in TASKS.values():
        names = list(task.rewards)
        assert not names[0].startswith("d1_") and names == sorted(names, key=lambda name: name.startswith("d1_"))
        assert task.parsers["default"] is task.score
    assert all("d1" in TASKS[name].parsers for name in ("gsm8k", "math", "countdown", "sudoku"))


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_every_task_loads_and_names_its_own_right_answers(data_dir, tmp_path, name, prompt_format):
    task = get_task(name)
    if name == "reviews":
        pytest.importorskip(
            "vaderSentiment", reason="vaderSentiment is not installed: pip install 'trl-dllm[language]'"
        )
        texts = [f"The {word} film{i} is great fun" for word in ("old", "new") for i in range(50)]
        data_dir = write_reviews(tmp_path, texts)  # `make language` fetches the real ones
    if name == "math":
        pytest.importorskip("math_verify")
    rows = task.load("test", 3, prompt_format=prompt_format, data_dir=str(data_dir))
    assert len(rows) == 3
    for row in rows:
        assert isinstance(row["prompt"], str if prompt_format == "text" else list)
        if "completion" in row and name not in ("humaneval", "mbpp"):
            text = row["completion"] if prompt_format == "text" else row["completion"][0]["content"]
            assert task.score(text, row)["correct"]
    with pytest.raises(ValueError, match="split must be"):
        task.load("dev", 3, data_dir=str(data_dir))
    with pytest.raises(ValueError, match="prompt_format must be"):
        task.load("test", 3, prompt_format="html", data_dir=str(data_dir))
    with pytest.raises(ValueError, match="num_examples"):
        task.load("test", 0, data_dir=str(data_dir))


def test_unknown_task():
    with pytest.raises(ValueError, match=r"'gsm'.*did you mean 'gsm8k'\?.*countdown, gsm8k"):
        get_task("gsm")
