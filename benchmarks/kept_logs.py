"""Finished runs as files of JSON lines, which are kept: facts, one line a step, what was measured at the end."""

import json
from pathlib import Path
from typing import Any


def read_log(path: Path) -> tuple[dict, list[dict], dict]:
    """A finished run's facts, steps and held-out measures."""
    facts, *steps, end = [json.loads(line) for line in path.open()]
    return facts, steps, end


def write_log(path: Path, facts: dict[str, Any], steps: list[dict], end: dict[str, Any]) -> None:
    """All of a file or none of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in (facts, *steps, end)))
    temporary.replace(path)


def is_done(path: Path, facts: dict[str, Any]) -> bool:
    """Whether a run's log is there; raises ValueError for one that was made with other settings."""
    if not path.exists():
        return False
    found = read_log(path)[0]
    other = {key: (found.get(key), value) for key, value in facts.items() if found.get(key) != value}
    if other:
        said = ", ".join(f"{key}={was!r} there and {now!r} here" for key, (was, now) in other.items())
        raise ValueError(f"{path} holds another run: {said}. Choose another --logs, or delete it.")
    return True
