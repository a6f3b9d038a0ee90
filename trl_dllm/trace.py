"""Completions as one HTML page: how a canvas was filled, step by step, and what estimators make of it.

`trace.html` holds the page; what it shows is one block of JSON in it, made here. The page asks nobody for anything.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rollout import Rollout


if TYPE_CHECKING:
    from .tasks.base import Grid


LARGEST = 1_000_000  # bytes of a page

Layout = Callable[[str, Mapping[str, Any]], "Grid | None"]


@dataclass(frozen=True)
class Estimate:
    """What an estimator says of a rollout.

    Args:
        name (`str`): of the estimator.
        forwards (`int`): model calls a row.
        logps (`Tensor` of shape (B, L)): nats.
        scored (`Tensor` of shape (B, L), bool): where it says anything.
        per_token (`bool`): False where a position's number is no more than its share of the row's.
    """

    name: str
    forwards: int
    logps: Tensor
    scored: Tensor
    per_token: bool = True


@dataclass(frozen=True)
class Traced:
    """The completions of one model, for a page.

    Args:
        name (`str`): what the page calls the model.
        rollout (`Rollout`): B rows; log-probs may be NaN.
        tokenizer: what makes text of the ids.
        block_length (`int`, *optional*): of a sampler that fills a whole canvas block by block, which `rollout.blocks`
            says nothing of.
        facts (`dict`): settings that the page lists.
        rewards (`list[dict]`, *optional*): a row's rewards by name: numbers, yes or no, or None for none.
        layout (`Callable`, *optional*): a task's `layout`.
        rows (`list[dict]`, *optional*): the data set's columns of each row, for `layout`.
        estimates (`list[Estimate]`): the exact one first; may be empty.
    """

    name: str
    rollout: Rollout
    tokenizer: Any
    block_length: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    rewards: Sequence[Mapping[str, float | bool | None]] | None = None
    layout: Layout | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    estimates: Sequence[Estimate] = ()


def token_texts(tokenizer, ids: Sequence[int]) -> dict[int, str]:
    """The text of each id by itself, with the space that it begins with; a part of a character as its token's name."""
    texts = {}
    for token in sorted(set(ids)):
        name = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if name is None:  # an id beyond the tokenizer's vocabulary, which the model's may have
            name = text = f"<{token}>"
        if name.startswith("▁") and not text.startswith(" "):  # which SentencePiece drops at the beginning of a text
            text = " " + text
        texts[token] = name if "\ufffd" in text else text
    return texts


def completion_text(texts: Mapping[int, str], ids: Sequence[int], special: Sequence[int]) -> tuple[str, list[int]]:
    """The text of a completion, and which of `ids` each of its characters belongs to."""
    owner: list[int] = []
    parts = []
    for place, token in enumerate(ids):
        if token not in special:
            parts.append(texts[token])
            owner += [place] * len(texts[token])
    return "".join(parts), owner


def page_data(title: str, models: Sequence[Traced]) -> dict[str, Any]:
    """What a page shows, as JSON: `models`, and `examples` with a completion of each model.

    Raises:
        ValueError: models with unequal numbers of completions.
    """
    sizes = [len(model.rollout) for model in models]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(f"models have {sizes} completions; each needs one for every example, and at least one.")
    heads, columns = zip(*(_model(model) for model in models), strict=True)
    examples = [list(row) for row in zip(*columns, strict=True)]
    return {"title": title, "left_out": 0, "models": list(heads), "examples": examples}


def write_page(path: str | Path, data: Mapping[str, Any], largest: int = LARGEST) -> int:
    """Write a page, with its last completions left out, which it then says, where it would be larger than `largest`.

    Args:
        path (`str` or `Path`): of the file; its folder is made, and what is there is written over.
        data (`dict`): from `page_data`.
        largest (`int`): bytes; the first completion is always there.

    Returns:
        The number of completions on the page.
    """
    head, tail = resources.files(__package__).joinpath("trace.html").read_text(encoding="utf-8").split("{{data}}")
    examples = data["examples"]

    def page(shown: int) -> bytes:
        part = {**data, "examples": examples[:shown], "left_out": len(examples) - shown}
        return (head + _embedded(part) + tail).encode()

    shown, content = len(examples), page(len(examples))
    if len(content) > largest:
        shown = max(1, bisect_right(range(1, shown), largest, key=lambda n: len(page(n))))
        content = page(shown)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return shown


def read_page(path: str | Path) -> dict[str, Any]:
    """What a page shows: the JSON in it."""
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">', 1)[1].split("</script>", 1)[0])


def _embedded(data: Any) -> str:
    """JSON that no HTML parser takes for markup: ASCII, and `<`, `>` and `&` as escapes."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _model(model: Traced) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a page says of a model, and of each of its completions."""
    rollout = model.rollout.to("cpu")
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    canvases = rollout.completion_ids.tolist()
    texts = token_texts(model.tokenizer, [token for row in (*prompts, *canvases) for token in row])
    special = sorted({rollout.mask_token_id, *model.tokenizer.all_special_ids} & set(texts))
    estimates = [(line, line.logps.cpu(), line.scored.cpu()) for line in model.estimates]
    starts = _block_starts(rollout, model.block_length)
    completions = []
    for row, (prompt, canvas) in enumerate(zip(prompts, canvases, strict=True)):
        revealed, counted = rollout.revealed[row], rollout.counted[row]
        completions.append(
            {
                "prompt": prompt,
                "ids": canvas,
                "step": rollout.unmask_step[row].tolist(),
                "logp": _numbers(rollout.logps[row], revealed),
                "counted": counted.int().tolist(),
                "blocks": starts[row],
                "rewards": {} if model.rewards is None else {k: _value(v) for k, v in model.rewards[row].items()},
                "grid": _grid(model, row, texts, canvas, counted.tolist(), special),
                "estimates": [
                    {
                        "name": line.name,
                        "forwards": line.forwards,
                        "per_token": line.per_token,
                        "logps": _numbers(logps[row], scored[row]),
                    }
                    for line, logps, scored in estimates
                ],
            }
        )
    head = {"name": model.name, "facts": dict(model.facts), "vocab": texts, "special": special}
    return head, completions


def _numbers(values: Tensor, where: Tensor) -> list[float | None]:
    """To four decimals; None elsewhere, and where there is no finite number."""
    known = (where & values.isfinite()).tolist()
    return [round(value, 4) if is_known else None for value, is_known in zip(values.tolist(), known, strict=True)]


def _value(value: float | bool | None) -> float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    return round(float(value), 4) if math.isfinite(value) else None


def _block_starts(rollout: Rollout, block_length: int | None) -> list[list[int]]:
    """The first position of each block of each row's canvas; none where the canvas is not cut."""
    canvas_length = rollout.completion_ids.shape[1]
    if rollout.blocks is not None:
        number = rollout.blocks.number(rollout.prompt_mask, canvas_length)[:, rollout.prompt_mask.shape[1] :]
    elif block_length:
        number = (torch.arange(canvas_length) // block_length).expand(len(rollout), -1)
    else:
        return [[] for _ in range(len(rollout))]
    return [[i for i in range(canvas_length) if i == 0 or row[i] != row[i - 1]] for row in number.tolist()]


def _grid(
    model: Traced, row: int, texts: Mapping[int, str], canvas: list[int], counted: list[bool], special: list[int]
) -> dict[str, Any] | None:
    """The cells of a completion that its task lays out, each with the position of the canvas that it shows."""
    if model.layout is None or model.rows is None:
        return None
    places = [i for i, counts in enumerate(counted) if counts]
    text, owner = completion_text(texts, [canvas[i] for i in places], special)
    grid = model.layout(text, model.rows[row])
    if grid is None:
        return None
    cells = [
        {
            "at": None if place is None else places[owner[place]],
            "text": None if place is None else text[place],
            "given": given,
            "expected": expected,
        }
        for place, given, expected in zip(grid.places, grid.given, grid.expected, strict=True)
    ]
    return {"columns": grid.columns, "box": grid.box, "cells": cells}
