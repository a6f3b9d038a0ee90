"""Movie reviews: go on from the first words of a sentence, in as positive a mood as VADER's word list finds.

The texts are the movie-review snippets of Hutto and Gilbert's VADER (ICWSM 2014), as lines `{"text": …}` of
`reviews/snippets.jsonl` in the data folder; `make language` writes that file. A hash of a snippet's opening, its first
three words, says which split it belongs to, so the splits share no prompt.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from datasets import Dataset

from .base import Task, check_load_arguments, completion_text
from .data import DATA_VARIABLE, choose, data_folder, read_file, to_dataset


FILE = "reviews/snippets.jsonl"
OPENING = 3  # words, by which the splits are told apart
POSITIVE = 0.05  # compound score from which VADER's authors call a text positive


def split_of(text: str) -> str:
    """The split that a snippet belongs to by its opening: train for 18 of 20, validation and test for one each."""
    opening = " ".join(text.lower().split()[:OPENING])
    bucket = int.from_bytes(hashlib.sha256(opening.encode()).digest()[:8], "big") % 20
    return "train" if bucket < 18 else "validation" if bucket == 18 else "test"


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    prompt_format: str = "text",
    data_dir: str | None = None,
    prompt_words: int = OPENING,
    max_words: int = 20,
) -> Dataset:
    """
    Snippets of one split: `prompt`, the first `prompt_words` words, and `completion`, the rest of at most `max_words`.

    20 words are 32 tokens of an English BPE or fewer nearly always. With `prompt_words=0` prompts are empty, and the
    completion is the whole snippet. Held-out prompts occur once; training ones as often as in the texts. None
    examples are all; training rows are shuffled by `seed`, the others stand in the file's order.

    Raises `ValueError` for an unknown split or format, a number out of range, and where the file is missing.
    """
    check_load_arguments(split, num_examples, prompt_format)
    if prompt_words != 0 and prompt_words < OPENING:
        raise ValueError(
            f"prompt_words={prompt_words} must be 0, for empty prompts, or at least {OPENING}: shorter ones would be "
            "in several splits."
        )
    if max_words < 1:
        raise ValueError(f"max_words={max_words} must be at least 1.")
    folder = data_folder(data_dir)
    if folder is None or not (folder / FILE).is_file():
        where = "no data folder is named" if folder is None else f"{folder / FILE} does not exist"
        raise ValueError(
            f"data_dir={data_dir!r}: {where}. `make language` writes {FILE}; name the folder that holds it as "
            f"data_dir or in {DATA_VARIABLE}."
        )
    rows, seen = [], set()
    for record in read_file(folder / FILE):
        words = record["text"].split()
        prompt, rest = " ".join(words[:prompt_words]), " ".join(words[prompt_words:])
        if not 1 <= len(words) - prompt_words <= max_words or split_of(record["text"]) != split:
            continue
        if split != "train" and prompt and prompt in seen:
            continue
        seen.add(prompt)
        rows.append((prompt, f" {rest}" if prompt else rest))
    rows = choose(rows, split, num_examples, seed)
    return to_dataset([prompt for prompt, _ in rows], [rest for _, rest in rows], {}, prompt_format)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@cache
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("The reward `vader` needs vaderSentiment: pip install 'trl-dllm[language]'.") from error
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """VADER's compound score of a text, from -1 (negative) to 1 (positive); 0 for one without a word that it knows."""
    return float(_analyzer().polarity_scores(text)["compound"])


def vader_reward(completions: list, **kwargs) -> list[float]:
    """The compound score of each completion, without its prompt, which the model has not written."""
    return [compound(completion_text(completion)) for completion in completions]


def score(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """`compound` of one completion, and `correct`: whether VADER calls it positive."""
    value = compound(text)
    return {"correct": value >= POSITIVE, "compound": value}


TASK = Task(name="reviews", load=load, rewards={"vader": vader_reward}, score=score)
