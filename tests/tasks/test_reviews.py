"""Movie reviews: prompts and rests of real snippets' form, splits that share no prompt, VADER's score as reward."""

import pytest
from helpers_tasks import chat, write_reviews

from trl_dllm.tasks import get_task
from trl_dllm.tasks.base import SPLITS
from trl_dllm.tasks.reviews import FILE, compound, split_of, vader_reward


TASK = get_task("reviews")


def vader():
    return pytest.importorskip(
        "vaderSentiment", reason="vaderSentiment is not installed: pip install 'trl-dllm[language]'"
    )


def test_prompt_and_completion_are_the_snippet(tmp_path):
    texts = [f"Word{i} two three four five six" for i in range(40)]
    rows = TASK.load("train", data_dir=str(write_reviews(tmp_path, texts)))
    assert {row["prompt"] + row["completion"] for row in rows} == {text for text in texts if split_of(text) == "train"}
    assert all(row["prompt"].split()[1:] == ["two", "three"] and row["completion"] == " four five six" for row in rows)
    longer = TASK.load("train", data_dir=str(tmp_path), prompt_words=4)
    assert all(row["prompt"].endswith(" four") and row["completion"] == " five six" for row in longer)
    free = TASK.load("train", data_dir=str(tmp_path), prompt_words=0)
    assert all(row["prompt"] == "" for row in free) and set(free["completion"]) <= set(texts)
    assert len(free) == len(rows)


def test_what_is_too_long_or_has_no_rest_is_left_out(tmp_path):
    texts = [f"Word{i} two three {'more ' * (i % 5)}".strip() for i in range(100)]
    rows = TASK.load("train", data_dir=str(write_reviews(tmp_path, texts)), max_words=3)
    assert {len(row["completion"].split()) for row in rows} == {1, 2, 3}


def test_splits_share_no_prompt_whatever_its_length(tmp_path):
    texts = [f"{a} {b} {c} ends {d}" for a in "abcdef" for b in "uvwxyz" for c in "klmn" for d in ("well", "badly")]
    write_reviews(tmp_path, texts)
    for words in (3, 4):
        prompts = {split: TASK.load(split, data_dir=str(tmp_path), prompt_words=words)["prompt"] for split in SPLITS}
        train, validation, test = (set(prompts[split]) for split in SPLITS)
        assert train and validation and test
        assert not train & validation and not train & test and not validation & test
        assert len(prompts["test"]) == len(test), "a held-out prompt counts once"
    free = [set(TASK.load(s, data_dir=str(tmp_path), prompt_words=0)["completion"]) for s in SPLITS]
    assert sum(map(len, free)) == len(set(texts)) == len(set.union(*free))
    assert all(split_of(f"The film{i} is old") == split_of(f"the  FILM{i} is new") for i in range(50))


def test_training_rows_are_shuffled_by_the_seed_and_held_out_ones_are_not(tmp_path):
    folder = str(write_reviews(tmp_path))
    train = [TASK.load("train", data_dir=folder, seed=seed)["prompt"] for seed in (0, 1)]
    assert train[0] != train[1] and sorted(train[0]) == sorted(train[1])
    test = [TASK.load("test", data_dir=folder, seed=seed)["prompt"] for seed in (0, 1)]
    assert test[0] == test[1]
    assert list(TASK.load("train", 5, data_dir=folder)["prompt"]) == list(train[0])[:5]


@pytest.mark.parametrize("words", [1, 2, -1])
def test_prompts_too_short_to_be_told_apart_are_refused(tmp_path, words):
    with pytest.raises(ValueError, match=rf"prompt_words={words} must be 0, .*, or at least 3"):
        TASK.load("train", data_dir=str(write_reviews(tmp_path)), prompt_words=words)


def test_a_missing_corpus_is_named_with_what_writes_it(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*snippets.jsonl does not exist. `make language` writes {FILE}"):
        TASK.load("train", data_dir=str(tmp_path))
    monkeypatch.delenv("TRL_DLLM_DATA", raising=False)
    with pytest.raises(ValueError, match=r"no data folder is named.*`make language`"):
        TASK.load("train")


def test_chat_prompts(tmp_path):
    row = TASK.load("train", 1, data_dir=str(write_reviews(tmp_path)), prompt_format="chat")[0]
    assert row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant"


def test_the_reward_is_the_compound_score_of_the_completion():
    vader()
    texts = ["a wonderful, joyous triumph", "a dull and horrible waste", "the door is made of wood", ""]
    rewards = vader_reward(prompts=["horrible"] * 4, completions=texts, trainer_state=None)
    assert rewards == vader_reward(completions=[chat(text) for text in texts])
    assert rewards[0] > 0.5 and rewards[1] < -0.5 and rewards[2:] == [0, 0]
    assert TASK.score(texts[0], {}) == {"correct": True, "compound": rewards[0]}
    assert [TASK.score(text, {})["correct"] for text in texts] == [True, False, False, False]
    assert compound("not " + "good") < 0 < compound("good")


def test_without_vader_the_reward_says_what_to_install(monkeypatch):
    import sys

    from trl_dllm.tasks import reviews

    reviews._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-dllm\[language\]'"):
        vader_reward(completions=["good"])
