"""Dataclass fields that say once what they are: values are checked and docstrings written from the declarations."""

import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


C = TypeVar("C", bound=type)

# What a value of each kind is called where it is not one.
_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    dict: "a mapping",
    NoneType: "None",
}


def check_kind(name: str, value: object, kind: Any) -> None:
    """Raise ValueError unless `value` is a `kind`, a type as annotations write it: `int | None`, `list[str]`, ….

    A bool is no number, 8.0 is not whole, a whole number is a float too, and a number must be finite.
    """
    if not _fits(value, kind):
        raise ValueError(f"{name}={value!r} must be {_called(kind)}.")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError, with the nearest choice, unless `value` is one of them."""
    choices = list(choices)
    if not any(value == choice and isinstance(value, bool) is isinstance(choice, bool) for choice in choices):
        near = get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r} is unknown{hint}; choose {' or '.join([', '.join(others), last])}.")


def check_fields(config: Any, names: Iterable[str]) -> None:
    """Check the named fields of a dataclass instance against their types and the `choices` in their metadata.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """
    hints, declared = get_type_hints(type(config)), {f.name: f for f in fields(config)}
    for name in names:
        value, hint = getattr(config, name), hints[name]
        kinds = get_args(hint) or (hint,)
        enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
        choices = declared[name].metadata.get("choices") or [member.value for enum in enums for member in enum]
        if not enums:  # beside which TRL declares any string
            check_kind(name, value, hint)
        if choices and not (isinstance(value, tuple(enums)) or (value is None and NoneType in kinds)):
            check_choice(name, value, choices)


def imported(name: str, path: str) -> Any:
    """What stands at a dotted path, such as `my_module.MyEstimator`; modules of the working folder are found too.

    Raises:
        ValueError: naming the field `name`, the path and what is missing.
    """
    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ImportError("it is no dotted path")
        found = importlib.import_module(module)
    except (ImportError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{name}: {path!r} cannot be imported: {error}. Write module.name, and run from the module's folder or "
            "install it."
        ) from error
    if not hasattr(found, attribute):
        near = get_close_matches(attribute, dir(found), n=1)
        hint = (
            f"did you mean {module}.{near[0]}?"
            if near
            else f"it is read from {getattr(found, '__file__', 'Python itself')}."
        )
        raise ValueError(f"{name}: {path!r} cannot be imported: {module} has no {attribute!r}; {hint}")
    return getattr(found, attribute)


def _fits(value: object, kind: Any) -> bool:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, inside[0]) for item in value)
    if kind in (int, float):
        if isinstance(value, bool | numbers.Integral):
            return not isinstance(value, bool)
        return kind is float and isinstance(value, numbers.Real) and math.isfinite(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in list(kind)
    return kind is Any or isinstance(value, origin or kind)


def _called(kind: Any) -> str:
    """What values of `kind` are called: `a whole number or None`."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_called, sorted(inside, key=lambda one: one is NoneType)))
    if origin is list:
        return "a list" if inside[0] is Any else f"a list of which each is {_called(inside[0])}"
    if origin is Literal:
        return " or ".join(map(repr, inside))
    kind = origin or kind
    return _KINDS.get(kind) or f"a {kind.__name__}"


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
