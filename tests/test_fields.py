"""A dataclass's values and docstring follow from what its fields declare."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from trl_dllm.fields import check_fields, check_kind, document_fields


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


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (bool, [True, False], [0, 1, "true", None]),
        (int, [0, -3, np.int64(4)], [True, 4.0, "4", None, math.nan, np.float32(1)]),
        (float, [0.5, -1, 3, np.float32(0.5)], [True, "0.5", None, math.nan, math.inf, -math.inf, 1j]),
        (str, ["", "red"], [1, None, ["red"]]),
    ],
)
def test_kinds(kind, good, bad):
    for value in good:
        check_kind("name", value, kind)
        check_kind("name", value, kind, or_none=True)
    for value in bad:
        with pytest.raises(ValueError, match=r"name=.* must be [^.]*\.$"):
            check_kind("name", value, kind)
    check_kind("name", None, kind, or_none=True)


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


@pytest.mark.parametrize("others", [{"a": 1}, "{}", None, 3])
def test_a_field_of_another_type_may_hold_anything(others):
    check_fields(Settings(others=others), ["others"])


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
