"""What a result belongs to: a small file beside every checkpoint, finished model and evaluation.

A fact is of one of three classes. Under another *meaning* a result is another result, and nothing is reused. The
*schedule* says how far a run goes and how often it saves; it may change. The *machine* is where and how it was
computed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any


FINGERPRINT = "fingerprint.json"

Difference = tuple[str, Any, Any]  # field, was, is


class OtherSettings(ValueError):
    """A result that belongs to something else: a line, a table of what differs, and the remedies."""


@dataclass
class Fingerprint:
    """What a result belongs to.

    Args:
        meaning (`dict`): what another value of makes it another result.
        schedule (`dict`): how far a run goes, and how often it saves and evaluates.
        machine (`dict`): where and how it was computed, as far as anything asks for it.
        finished (`dict`, *optional*): of a finished model, its `global_step`, and its `files` with their sizes.
    """

    meaning: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # As they are read back: lists for tuples, strings for what JSON has no word for.
        for name, value in asdict(self).items():
            setattr(self, name, json.loads(json.dumps(value, default=str)))

    @classmethod
    def read(cls, folder: str | Path) -> "Fingerprint | None":
        """The fingerprint in a folder, None where there is none.

        Raises:
            ValueError: a file that is no fingerprint.
        """
        path = Path(folder) / FINGERPRINT
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Delete the file, or the folder.") from error

    def write(self, folder: str | Path) -> None:
        """Write it to a folder, all of it or nothing."""
        path = Path(folder) / FINGERPRINT
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(temporary, path)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The facts that are not the same, as (field, was, is); one that is missing counts as None."""
    names = [*now, *(name for name in was if name not in now)]
    return [(name, was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)]


def in_a_line(found: Sequence[Difference]) -> str:
    """`learning_rate 1e-05 → 3e-05, …`"""
    return ", ".join(f"{name} {_short(was)} → {_short(now)}" for name, was, now in found)


def refuse(what: str, found: Sequence[Difference], remedies: str) -> None:
    """Raise OtherSettings, a ValueError, with a table of what differs.

    Args:
        what (`str`): beginning of the sentence, such as "output_dir='runs/a' holds a run".
        found (`list`): from `differences`; nothing is raised where it is empty.
        remedies (`str`): what the user can do.
    """
    if not found:
        return
    found = [fact for fact in found if fact[0] == "command"] or found  # of another kind, all the rest differs too
    names = ", ".join(name for name, *_ in found)
    raise OtherSettings(f"{what} with other settings ({names} differ).\n{_table(found)}\n{remedies}")


def _table(found: Sequence[Difference]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("field", "was", "is")
    for name, was, now in found:
        table.add_row(Text(name), Text(_short(was)), Text(_short(now)))
    console = Console(file=StringIO(), width=110)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef"):
        return f"{value[:12]}…"  # a hash
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
