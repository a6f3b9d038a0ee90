"""What every task has, and the few helpers that their parsers share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


SPLITS = ("train", "validation", "test")
PROMPT_FORMATS = ("text", "chat")


@dataclass(frozen=True)
class Task:
    """
    A benchmark.

    Attributes:
        name: what `get_task` and the command line call it.
        load: `load(split, num_examples, seed=0, prompt_format=..., data_dir=None, ...)`, a `datasets.Dataset` with a
            `prompt` column, the columns that the rewards read and, where the task can say what a right answer looks
            like, a `completion` column for SFT.
        rewards: TRL reward functions by name, the default first.
        score: `score(text, row)`, what evaluation records of one completion of one row; always has the key `correct`
            (bool).
    """

    name: str
    load: Callable[..., Any]
    rewards: Mapping[str, Callable[..., list[float]]]
    score: Callable[[str, Mapping[str, Any]], dict[str, Any]]


def check_load_arguments(split: str, num_examples: int, prompt_format: str) -> None:
    """Raise `ValueError` unless `load` was asked for something that exists."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format must be one of {PROMPT_FORMATS}, got {prompt_format!r}.")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}.")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL passes it: a string, or messages, of which the last one counts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # content in parts, as multimodal chat templates have it
        content = "".join(part.get("text") or "" for part in content)
    return content or ""


def last_answer(text: str) -> str | None:
    """What stands in the last closed `<answer>…</answer>` of `text`, None without one; takes linear time."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)]
