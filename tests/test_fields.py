"""A dataclass's values and docstring follow from what its fields declare."""

import math
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np
import pytest

from trl_dllm.fields import check_fields, check_kind, document_fields, imported


class Colour(str, Enum):  # noqa: UP042  as transformers declares its own
    RED = "red"
    GREEN = "green"


@dataclass
class Base:
    inherited: int = field(default=1, metadata={"help": "Of the base."})
    overridden: int = field(default=1, metadata={"help": "Of the base as well."})


@document_fields(beyond=Base)
@dataclass
class Settings(Base):
    """
    Some settings.

    They are few.
    """

    overridden: int = field(default=2, metadata={"help": "Of the class."})
    colour: str = field(default="red", metadata={"help": "Which one: 'red' or 'green'.", "choices": ["red", "green"]})
    share: float | None = field(default=None, metadata={"help": "At most 100 %% of it. " + "Long words. " * 12})
    others: dict[str, Any] | str | None = field(default=None, metadata={"help": "Anything."})


@dataclass
class Enumerated:
    tone: Colour | str = "red"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (bool, [True, False], [0, 1, "true", None]),
        (int, [0, -3, np.int64(4)], [True, 4.0, "4", None, math.nan, np.float32(1)]),
        (float, [0.5, -1, 3, np.float32(0.5)], [True, "0.5", None, math.nan, math.inf, -math.inf, 1j]),
        (str, ["", "red"], [1, None, ["red"]]),
        (float | None, [None, 1, 10**400], ["1", math.nan]),
        (list[str] | None, [[], ["a", "b"], None], ["a", [1], {"a": 1}]),
        (list[float], [[1, 0.5]], [0.5, [math.nan], [True]]),
        (dict[str, Any] | str, [{}, {"a": []}, "{}"], [None, [], 3]),
        (Literal[False] | str, [False, "no"], [True, None]),
        (Colour, [Colour.RED, "red"], ["blue", 3]),
        (Any, [None, object()], []),
    ],
)
def test_kinds(kind, good, bad):
    for value in good:
        check_kind("name", value, kind)
        check_kind("name", value, kind | None)
    for value in bad:
        with pytest.raises(ValueError, match=r"name=.* must be [^.]*\.$"):
            check_kind("name", value, kind)
    check_kind("name", None, kind | None)


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        (int | None, "a whole number or None"),
        (None | str | list[str], "a string or a list of which each is a string or None"),
        (dict[str, Any] | str | None, "a mapping or a string or None"),
    ],
)
def test_a_kind_is_called_by_plain_words(kind, called):
    with pytest.raises(ValueError) as error:
        check_kind("name", 0.5, kind)
    assert str(error.value) == f"name=0.5 must be {called}."


def test_only_the_named_fields_are_checked():
    settings = Settings(inherited="one", overridden=2)
    check_fields(settings, ["overridden", "colour", "share", "others"])
    with pytest.raises(ValueError, match="inherited='one' must be a whole number"):
        check_fields(settings, ["colour", "inherited"])


def test_an_unknown_choice_names_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"^colour='geen' is unknown \(did you mean 'green'\?\); choose 'red' or 'gr"):
        check_fields(Settings(colour="geen"), ["colour"])
    with pytest.raises(ValueError, match=r"^colour='blue' is unknown; choose 'red' or 'green'\.$"):
        check_fields(Settings(colour="blue"), ["colour"])


def test_an_enumeration_is_a_choice_by_its_values():
    check_fields(Enumerated(tone=Colour.GREEN), ["tone"])
    check_fields(Enumerated(tone="green"), ["tone"])
    for wrong in ("geen", False, None, 3, ["green"]):  # YAML reads a bare `no` as False
        with pytest.raises(ValueError, match=r"^tone=.* is unknown.*; choose 'red' or 'green'\.$"):
            check_fields(Enumerated(tone=wrong), ["tone"])


def test_the_docstring_lists_the_fields_that_the_base_has_not():
    long = "Long words. " * 12
    assert Settings.__doc__ == "\n".join(
        [
            "Some settings.",
            "",
            "They are few.",
            "",
            "overridden (`int`, *optional*, defaults to `2`):",
            "    Of the class.",
            'colour (`str`, *optional*, defaults to `"red"`):',
            "    Which one: 'red' or 'green'.",
            "share (`float`, *optional*):",
            "    At most 100 % of it. " + long[: 12 * 7].rstrip() + " Long",
            "    words. " + long[: 12 * 4].rstrip(),
            "others (`dict[str, Any] | str`, *optional*):",
            "    Anything.",
        ]
    )


# ---------------------------------------------------------------------------------------------------- by a dotted path


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_what_stands_at_a_dotted_path_is_imported_from_the_working_folder(working_folder):
    (working_folder / "mine_to_find.py").write_text("class Thing:\n    part = 3\n")
    found = imported("field", "mine_to_find.Thing")
    assert found.part == 3 and imported("field", "mine_to_find.Thing") is found
    assert sys.path.count(str(working_folder)) == 1
    assert imported("field", "os.path.join") is __import__("os").path.join


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.Thing", "No module named 'no_such_module'. Write module.name, and run from the module's"),
        ("mine_to_miss.Thin", "mine_to_miss has no 'Thin'; did you mean mine_to_miss.Thing"),
        ("mine_to_miss.zzzz", "mine_to_miss has no 'zzzz'; it is read from .*mine_to_miss.py"),
        ("mine_to_break.Thing", "invalid syntax"),
        ("mine_to_need.Thing", "No module named 'no_such_dependency'"),
        ("..Thing", "it is no dotted path"),
        ("folder/mine.Thing", "it is no dotted path"),
        ("mine_to_miss.", "it is no dotted path"),
        ("✓.py", "it is no dotted path"),
    ],
)
def test_a_path_to_nothing_says_what_is_missing(working_folder, path, message):
    (working_folder / "mine_to_miss.py").write_text("class Thing: ...\n")
    (working_folder / "mine_to_break.py").write_text("class Thing ...\n")
    (working_folder / "mine_to_need.py").write_text("import no_such_dependency\n")
    with pytest.raises(ValueError, match=f"^field: {path!r} cannot be imported: .*{message}"):
        imported("field", path)
