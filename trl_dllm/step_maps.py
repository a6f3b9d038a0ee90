"""Trajectories as JSON lines: what a sampler drew, step by step, for a scorer that may be another program's.

A line is a completion:

- `prompt_ids`, and `canvas_ids` (L): the whole canvas, also behind the EOS; the mask token where nothing was revealed;
- `step_maps` (L): the decoding step that revealed each position, counted from 1 over the whole canvas, 0 for never.
  The name is SGLang's; `Rollout.unmask_step` is one less;
- `completion_ids`: the canvas's tokens that count, up to and with the EOS. Without it all that were revealed do;
- `logprobs`: nats at `temperature` that they were drawn with, one for each position of the canvas or of the
  completion, null where there is none;
- `mask_token_id`, `temperature` (1 if missing), `steps` of the schedule (null if each row took its own number);
- `blocks`, of a block-causal model or a canvas that grew: the fields of `Blocks`;
- `support`, where the draw was truncated (top-k, top-p, min-p): the tokens that could be drawn, a list a position;
- `decoding`, which says whose log-probs `trl-dllm report` compares with ("denoising" if missing), and `cfg_scale` of
  guidance, which no estimator follows (0 if missing);
- `rewards` by name and `block_length` of the sampler, which `trl-dllm trace` shows;
- `prompt` and `completion` as text, and whatever else: nobody reads it.

A trace is taken as it is or refused, never repaired.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks
from .noise import Purpose, hash64
from .rollout import Rollout, left_pad, widen


_NEEDED = ("prompt_ids", "canvas_ids", "step_maps")


def write_rollout(path: str | Path, rollout: Rollout, tokenizer=None, **facts: Any) -> None:
    """Write a rollout, a line a row; a file that is there is written over.

    Args:
        path (`str` or `Path`): of the file; its folder is made.
        rollout (`Rollout`): B rows.
        tokenizer (*optional*): what makes text of the ids.
        facts: what else a line says: a list has a value a row, anything else is every row's.
    """
    rollout = rollout.to("cpu")
    lines = []
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        completion = rollout.completion_ids[row][rollout.counted[row]].tolist()
        texts = {}
        if tokenizer is not None:
            texts["prompt"] = tokenizer.decode(prompt, skip_special_tokens=True)
            texts["completion"] = tokenizer.decode(completion, skip_special_tokens=True)
        logps = [None if math.isnan(value) else value for value in rollout.logps[row].tolist()]
        line = {
            **texts,
            "step_maps": (rollout.unmask_step[row] + 1).tolist(),
            "logprobs": logps,
            "prompt_ids": prompt,
            "completion_ids": completion,
            "canvas_ids": rollout.completion_ids[row].tolist(),
            "mask_token_id": rollout.mask_token_id,
            "temperature": rollout.temperature,
            "steps": rollout.steps,
            "blocks": None if rollout.blocks is None else asdict(rollout.blocks),
        }
        if rollout.support is not None:
            line["support"] = [[token for token in tokens if token >= 0] for tokens in rollout.support[row].tolist()]
        line |= {name: value[row] if isinstance(value, list) else value for name, value in facts.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_rollout(path: str | Path, mask_token_id: int | None = None, vocab_size: int | None = None) -> Rollout:
    """The rollout of a file of JSON lines, for `token_logps` and the reports. All lines have one canvas length.

    `counted` are the tokens of `completion_ids`; `view_seed` are hashes of the lines' numbers; `logps` are NaN where a
    line has none.

    Args:
        path (`str` or `Path`): of the file.
        mask_token_id (`int`, *optional*): of the model that will score; None takes the file's.
        vocab_size (`int`, *optional*): of that model, to check ids against.

    Raises:
        ValueError: naming the file, the line, the field and what is wrong with it.
    """
    lines = read_lines(path)
    rows = [_read_line(where, line, lines[0][1], mask_token_id, vocab_size) for where, line in lines]
    first = rows[0]
    for (where, _), row in zip(lines, rows, strict=True):
        for name in ("mask_token_id", "temperature", "steps", "blocks"):
            if row[name] != first[name]:
                raise ValueError(f"{where}{name}={row[name]} differs from the first line's, {first[name]}.")
        if (row["support"] is None) != (first["support"] is None):
            raise ValueError(f"{where}support stands in some lines and not in others. Give it in all of them.")
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], pad_token_id=0)
    support = None
    if first["support"] is not None:
        support = torch.stack(widen([row["support"] for row in rows]))
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.stack([row["canvas"] for row in rows]),
        unmask_step=torch.stack([row["taken"] for row in rows]),
        logps=torch.stack([row["logps"] for row in rows]),
        counted=torch.stack([row["counted"] for row in rows]),
        view_seed=hash64(Purpose.ROW, torch.arange(len(rows))),
        mask_token_id=first["mask_token_id"],
        temperature=first["temperature"],
        steps=first["steps"],
        blocks=first["blocks"],
        support=support,
    ).validate()


def read_lines(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """("FILE, line N: ", the object of that line) for each line that is not empty.

    Raises:
        ValueError: a line that is no JSON object, or a file without any.
    """
    found = []
    for number, text in enumerate(Path(path).read_bytes().splitlines(), start=1):  # text has further ends of lines
        where = f"{path}, line {number}: "
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}it is no JSON: {error}.") from error
        if not isinstance(line, dict):
            raise ValueError(f"{where}it is no JSON object: {text[:40].decode()!r}.")
        found.append((where, line))
    if not found:
        raise ValueError(f"{path} has no lines: a trajectory is a line with {', '.join(_NEEDED)}.")
    return found


def _read_line(
    where: str, line: Mapping[str, Any], first: Mapping[str, Any], mask_token_id: int | None, vocab_size: int | None
) -> dict[str, Any]:
    """The fields of one line, checked against each other."""
    missing = [name for name in _NEEDED if name not in line]
    if missing:
        raise ValueError(
            f"{where}no {', '.join(missing)}: a likelihood is that of a trajectory. Each line needs "
            f"{', '.join(_NEEDED)}, the latter two for the whole canvas."
        )
    for name in (*_NEEDED, "completion_ids", "logprobs", "support"):
        if not isinstance(line.get(name, []), list) and not (name == "logprobs" and line[name] is None):
            raise ValueError(f"{where}{name}={line[name]!r} must be a list.")
    mask = _number(where, "mask_token_id", line.get("mask_token_id", mask_token_id), int, 0)
    if mask_token_id not in (None, mask):
        raise ValueError(
            f"{where}mask_token_id={mask}, and the model's is {mask_token_id}: they do not belong together. Score "
            "with the model that drew these, or one of its vocabulary."
        )
    end = 2**31 if vocab_size is None else vocab_size
    length = len(first["canvas_ids"])
    if not length:
        raise ValueError(f"{where}canvas_ids=[] has no positions: give the whole canvas, also behind the EOS.")
    whole = f"the canvas of the first line {length}"
    check_numbers(f"{where}prompt_ids", line["prompt_ids"], None, 0, end)
    check_numbers(f"{where}canvas_ids", line["canvas_ids"], length, 0, end, whole)
    check_numbers(f"{where}step_maps", line["step_maps"], length, 0, length + 1, whole)
    canvas, taken = torch.tensor(line["canvas_ids"]), torch.tensor(line["step_maps"]) - 1
    revealed = taken >= 0
    counted = revealed
    if "completion_ids" in line:
        counted = revealed & (revealed.cumsum(dim=0) <= len(line["completion_ids"]))
    completion = line.get("completion_ids", canvas[revealed].tolist())
    blocks = _read_blocks(where, line.get("blocks"))
    number = torch.zeros(length, dtype=torch.int64)
    if blocks is not None:
        number = blocks.number(torch.ones(1, len(line["prompt_ids"]), dtype=torch.bool), length)[0, -length:]
    check_trace(where, canvas, taken, counted, 0, completion, mask, number, length if blocks is None else blocks.size)
    steps = None if line.get("steps") is None else _number(where, "steps", line["steps"], int, 1)
    if steps is not None and int(taken.max()) >= steps:
        raise ValueError(f"{where}step_maps goes up to {int(taken.max()) + 1}, and steps={steps}.")
    support = None
    if "support" in line:
        if len(line["support"]) != length:
            raise ValueError(
                f"{where}support has {len(line['support'])} entries, and {whole}: give a list a position."
            )
        for place, tokens in enumerate(line["support"]):
            if not isinstance(tokens, list):
                raise ValueError(f"{where}support[{place}]={tokens!r} must be a list of ids.")
            check_numbers(f"{where}support[{place}]", tokens, None, 0, end)
            if revealed[place] and int(canvas[place]) not in tokens:
                raise ValueError(f"{where}support[{place}] leaves out the token that was drawn, {int(canvas[place])}.")
        width = max(map(len, line["support"]))
        filled = [[*tokens, *[-1] * (width - len(tokens))] for tokens in line["support"]]
        support = torch.tensor(filled, dtype=torch.int32)
    return {
        "prompt_ids": line["prompt_ids"],
        "canvas": canvas,
        "taken": taken,
        "counted": counted,
        "logps": read_logps(where, line.get("logprobs"), counted, revealed),
        "mask_token_id": mask,
        "temperature": _number(where, "temperature", line.get("temperature", 1.0), float, 0),
        "steps": steps,
        "blocks": blocks,
        "support": support,
    }


def _read_blocks(where: str, value: Any) -> Blocks | None:
    """The field of that name."""
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("causal"), bool):
        raise ValueError(f"{where}blocks={value!r} must be null or say size, alignment and causal.")
    size = _number(where, "blocks: size", value.get("size"), int, 1)
    try:
        return Blocks(size, value.get("alignment", "position"), value["causal"])
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _number(where: str, name: str, value: Any, kind: type, least: float) -> Any:
    """A field that is one number, at least `least`."""
    fits = isinstance(value, int | kind) and not isinstance(value, bool)
    if not fits or not least <= value < math.inf:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"{where}{name}={value!r} must be a {what} of at least {least}.")
    return value


def check_numbers(name: str, numbers: Sequence, length: int | None, low: int, end: int, whole: str = "") -> None:
    """Refuse a row that has not `length` whole numbers in [low, end); `whole` says why so many."""
    if length is not None and len(numbers) != length:
        raise ValueError(
            f"{name} has {len(numbers)} entries, and {whole}: return the whole canvas, also behind the EOS."
        )
    for place, number in enumerate(numbers):
        if type(number) is not int or not low <= number < end:
            raise ValueError(f"{name}[{place}]={number!r} must be a whole number from {low} to {end - 1}.")


def check_trace(
    where: str,
    canvas: Tensor,
    steps: Tensor,
    counted: Tensor,
    end: int,
    completion: list[int],
    mask_token_id: int,
    blocks: Tensor,
    block_length: int,
) -> None:
    """Refuse a row whose steps are not those of a canvas that was revealed once, block by block, up to its EOS."""
    masked, revealed = canvas == mask_token_id, steps >= 0
    wrong = (masked == revealed).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where}canvas_ids[{wrong[0]}]={int(canvas[wrong[0]])} and unmask_step[{wrong[0]}]="
            f"{int(steps[wrong[0]])} contradict each other: where nothing was revealed stand the mask token "
            f"({mask_token_id}) and -1."
        )
    lost = masked[:end].nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"{where}position {lost[0]} was never revealed, and no EOS stands before it: the trace is incomplete. "
            "Return every step that the engine took."
        )
    found = canvas[counted].tolist()
    if completion != found:
        raise ValueError(
            f"{where}completion_ids has {len(completion)} tokens that are not those of canvas_ids up to and with its "
            f"first EOS, of which there are {len(found)}. Cut the canvas there."
        )
    used = steps[revealed].unique().tolist()
    if used != list(range(len(used))):
        gap = next(step for step in range(len(used)) if used[step] != step)
        raise ValueError(
            f"{where}unmask_step says that nothing was revealed in step {gap}. Number the steps from 0 without gaps; "
            "an engine that revises tokens has no such trace."
        )
    last = -1
    for number, block in enumerate(steps[blocks == n] for n in blocks.unique()):
        taken = block[block >= 0]
        if len(taken) and int(taken.min()) <= last:
            raise ValueError(
                f"{where}step {int(taken.min())} revealed a position of block {number} (block_length={block_length}), "
                f"and the block before it was complete only in step {last}. Count the steps over the whole canvas and "
                "not anew in each block, or set block_length to the engine's."
            )
        last = max(last, int(block.max()))


def read_logps(where: str, given: Sequence | None, counted: Tensor, revealed: Tensor) -> Tensor:
    """A sampler's log-probs of a row at the canvas's width, float32 (L,): NaN where it has none, 0 where nothing was
    drawn.

    Raises:
        ValueError: another length than the completion's and the canvas's, or a number that is no log-prob.
    """
    logps = torch.zeros(revealed.shape).masked_fill(revealed, torch.nan)
    if given is None:
        return logps
    wrong = [v for v in given if v is not None and (type(v) not in (int, float) or v == -math.inf or v > 1e-3)]
    if wrong:  # above 0 by more than rounding
        raise ValueError(
            f"{where}logprobs holds {wrong[0]!r}, which is no log-probability (nats) of a token that was drawn. "
            "Return None or NaN where the engine has none."
        )
    values = torch.tensor([math.nan if value is None else float(value) for value in given], dtype=torch.float32)
    places = next((p for p in (counted, torch.ones_like(counted)) if len(values) == int(p.sum())), None)
    if places is None:
        raise ValueError(
            f"{where}logprobs has {len(values)} numbers; it needs one for each of the {int(counted.sum())} tokens of "
            f"the completion or {len(counted)} of the canvas."
        )
    logps[places] = values
    return logps.masked_fill(~revealed, 0)
