"""Dataclass fields that say once what they are: values are checked and docstrings written from the declarations."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from textwrap import fill
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints


C = TypeVar("C", bound=type)

# What a value of each kind is called where it is not one.
_KINDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}


def check_kind(name: str, value: object, kind: type, or_none: bool = False) -> None:
    """Raise ValueError unless `value` is a `kind`: bool, int, float or str, or None where that is allowed.

    A bool is no number, 8.0 is not whole, a whole number is a float too, and a float must be finite.
    """
    if value is None and or_none:
        return
    number = {int: numbers.Integral, float: numbers.Real}.get(kind)
    fits = isinstance(value, number or kind) and (number is None or not isinstance(value, bool))
    if not fits or (isinstance(value, numbers.Real) and not math.isfinite(value)):
        raise ValueError(f"{name}={value!r} must be {_KINDS[kind]}{' or None' if or_none else ''}.")


def check_fields(config: Any, names: Iterable[str]) -> None:
    """Check the named fields of a dataclass instance against their types and the `choices` in their metadata.

    A field that is neither a bool, an int, a float nor a str, nor one of them or None, may hold anything.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """
    hints, declared = get_type_hints(type(config)), {f.name: f for f in fields(config)}
    for name in names:
        value, choices = getattr(config, name), declared[name].metadata.get("choices")
        kinds = get_args(hints[name]) or (hints[name],)
        kind, *more = [kind for kind in kinds if kind is not NoneType]
        if kind in _KINDS and not more:
            check_kind(name, value, kind, or_none=NoneType in kinds)
        if choices and value is not None and value not in choices:
            near = get_close_matches(value, choices, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            *others, last = map(repr, choices)
            raise ValueError(f"{name}={value!r} is unknown{hint}; choose {' or '.join([', '.join(others), last])}.")


def document_fields(beyond: type | None = None) -> Callable[[C], C]:
    """A decorator that lists a dataclass's fields in its docstring as TRL does, from their types, defaults and help.

    Args:
        beyond (`type`, *optional*): a base class whose fields are not listed.
    """

    def decorate(cls: C) -> C:
        hints = get_type_hints(cls)
        known = fields(beyond) if beyond else ()
        lines = [inspect.cleandoc(cls.__doc__ or ""), ""]
        for f in fields(cls):
            if any(f is other for other in known):  # inherited as it is
                continue
            kind = inspect.formatannotation(hints[f.name]).removesuffix(" | None").replace("typing.", "")
            default = f'"{f.default}"' if isinstance(f.default, str) else f.default
            optional = "*optional*" if default is None else f"*optional*, defaults to `{default}`"
            text = f.metadata["help"].replace("%%", "%")  # doubled for argparse
            indent = " " * 4
            lines += [
                f"{f.name} (`{kind}`, {optional}):",
                fill(text, 115, initial_indent=indent, subsequent_indent=indent),
            ]
        cls.__doc__ = "\n".join(lines)
        return cls

    return decorate
