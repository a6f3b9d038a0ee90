"""What every task has, and the few helpers that their parsers share."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


SPLITS = ("train", "validation", "test")
PROMPT_FORMATS = ("text", "chat")


@dataclass(frozen=True)
class Grid:
    """A completion as a table of cells, for `trl-dllm trace`; each field but two has an entry a cell, row by row.

    Attributes:
        columns: cells of a row.
        places: the character of the completion that a cell shows; None where the completion has none for it.
        given: what the prompt has there; None where it is to be filled in.
        expected: what is right there; None where that is not known.
        box: rows and columns of the boxes that thicker lines surround; None for no boxes.
    """

    columns: int
    places: tuple[int | None, ...]
    given: tuple[str | None, ...]
    expected: tuple[str | None, ...]
    box: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sizes = [len(cells) for cells in (self.places, self.given, self.expected)]
        if self.columns < 1 or len(set(sizes)) != 1 or sizes[0] % self.columns:
            raise ValueError(
                f"places, given and expected have {', '.join(map(str, sizes))} cells; they must have as many as each "
                f"other, in whole rows of columns={self.columns}."
            )


@dataclass(frozen=True)
class Task:
    """
    A benchmark. One of your own needs no change of this package: `task: my_module.TASK` (docs/extending.md).

    Attributes:
        name: what `get_task`, the command line and the records of an evaluation call it.
        load: `load(split, num_examples=None, seed=0, prompt_format=..., data_dir=None, ...)`, a `datasets.Dataset`
            with a `prompt` column, the columns that the rewards read and, where the task can say what a right answer
            looks like, a `completion` column for SFT. `split` is "train", "validation" or "test", of which no two
            share an answer; `num_examples` None means all, or as many as the task thinks right; the same arguments
            give the same rows. `prompt_format` is "text" or "chat" (messages). Whatever else it takes are the
            `task_kwargs`, checked against the annotations before anything is loaded; ValueError is for what no row
            can be made of.
        rewards: TRL reward functions by name, the default first: `reward(completions, **columns)` is called with the
            columns as lists and returns a number a completion, None for none. A completion is a string or messages
            (`completion_text`), of any content: rewards never raise, and take linear time.
        score: `score(text, row)`, what evaluation records of one completion of one row; always has the key `correct`
            (bool), and never raises.
        parsers: ways to score by name, each called like `score`: "default" is `score` itself, "d1" does as d1's
            published evaluation does, quirks included.
        stored_row: `stored_row(record)`, the columns that the parsers read, made from a record of stored outputs in
            d1's form (`question`, `ground_truth`); None where a task has no such form.
        layout: `layout(text, row)`, the completion as a `Grid`, or None for one that has no such form; `row` may also
            be a line of stored trajectories, whose `prompt` is text. Never raises, and takes linear time. None for a
            task whose completions are text.
    """

    name: str
    load: Callable[..., Any]
    rewards: Mapping[str, Callable[..., list[float]]]
    score: Callable[[str, Mapping[str, Any]], dict[str, Any]]
    parsers: Mapping[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    stored_row: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    layout: Callable[[str, Mapping[str, Any]], Grid | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsers", {"default": self.score, **self.parsers})


def check_load_arguments(split: str, num_examples: int | None, prompt_format: str) -> None:
    """Raise `ValueError` unless `load` was asked for something that exists."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format must be one of {PROMPT_FORMATS}, got {prompt_format!r}.")
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}.")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL passes it: a string, or messages, of which the last one counts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # content in parts, as multimodal chat templates have it
        content = "".join(part.get("text") or "" for part in content)
    return content or ""


def last_answer_span(text: str) -> tuple[int, int] | None:
    """Where in `text` that stands, from and up to; None without one."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return start, text.find("</answer>", start)


def last_answer(text: str) -> str | None:
    """What stands in the last closed `<answer>…</answer>` of `text`, None without one; takes linear time."""
    span = last_answer_span(text)
    return None if span is None else text[slice(*span)]


# ---------------------------------------------------------------------------------------------------------------------
# Finding answers, all in linear time: a completion may be anything

_END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")


def without_end_tokens(text: str) -> str:
    """`text` up to the first end-of-text token, for outputs that were stored with their special tokens."""
    return _END.split(text, maxsplit=1)[0]


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{…}` (or `\\fbox{…}`) of `text`; None without one or where it never closes."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def marked_answers(text: str) -> Iterator[str]:
    """
    What `text` marks as its answer, the clearest mark first, stripped and never empty.

    In order: the last closed `<answer>…</answer>`, the last `\\boxed{…}`, the rest of the line of a last box that
    never closes, what follows a last `<answer>` that never closes, the line behind the last `####`. A box inside an
    answer is opened. Never raises.
    """
    text = without_end_tokens(text)
    tail = text.rsplit("<answer>", 1)[1] if "<answer>" in text else None
    line = text.rsplit("####", 1)[1].strip().split("\n", 1)[0] if "####" in text else None
    open_box = re.split(r"[\n<]", text.rsplit("\\boxed{", 1)[1], maxsplit=1)[0] if "\\boxed{" in text else None
    for answer in (last_answer(text), last_boxed(text), open_box, tail, line):
        for found in (last_boxed(answer or ""), answer):
            if found and found.strip():
                yield found.strip()
