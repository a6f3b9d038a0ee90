"""
Values as bytes, between a program that is not trusted and the process that judges it.

A closed set of types: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict and
range; exact ratios (`Fraction`, `Decimal`), which arrive as `Fraction`; set-like views, which arrive as a view of
keys; iterators, which arrive as an iterator over what they give. An object of a subclass goes as what its base class
sees, any other object as an `Opaque`. Floats keep every bit, and 1, 1.0 and True, or a list and a tuple, stay apart.
What does not survive is identity: each call has values of its own.

`decode` takes anything: it returns a value or raises `WireError`, in time and memory linear in the length.
"""

import os
import struct
from collections.abc import Iterator, Set
from typing import Any


READ_FROM, WRITE_TO = 5, 6  # the descriptors of the channel, in either process
MAX_BYTES = 8 << 20  # of a message
MAX_DEPTH = 100
MAX_TEXT = 10_000  # characters of an opaque object's text

_read, _write = os.read, os.write


class WireError(ValueError):
    """A value that cannot be sent, or bytes that are no value."""


class Closed(Exception):
    """The other side has gone."""


class Opaque:
    """An object that is not data: it has a name, a text and a truth, perhaps items, and equals nothing."""

    def __init__(self, name: str, text: str, truth: bool, items: list | None):
        self.name, self.text, self.truth, self.items = name, text, truth, items

    def __bool__(self) -> bool:
        return self.truth

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<{self.name}: {self.text}>"

    def __iter__(self) -> Iterator:
        if self.items is None:
            raise TypeError(f"{self.name!r} object is not iterable")
        return iter(self.items)

    def __len__(self) -> int:
        return len(list(iter(self)))


# ---------------------------------------------------------------------------------------------------------------------
# Messages: a length and as many bytes


def send(fd: int, message: bytes) -> None:
    """Raises `Closed` where nobody reads any more."""
    view = memoryview(struct.pack(">I", len(message)) + message)
    try:
        while view:
            view = view[_write(fd, view) :]
    except BrokenPipeError:
        raise Closed from None


def receive(fd: int) -> bytes:
    """The next message. Raises `Closed` where there is none any more, `WireError` where it is too long."""
    (length,) = struct.unpack(">I", _read_exactly(fd, 4))
    if length > MAX_BYTES:
        raise WireError(f"a message of {length} bytes, {MAX_BYTES} at most are taken")
    return _read_exactly(fd, length)


def _read_exactly(fd: int, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        part = _read(fd, min(length - len(content), 1 << 20))
        if not part:
            raise Closed
        content += part
    return bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# From values to bytes: a letter for the type, then its content


def encode(value: Any, strict: bool = False, limit: int = MAX_BYTES) -> bytes:
    """Raises `WireError` for what is larger than `limit` or too deep, and if `strict` for what is not data."""
    writer = _Writer(strict, limit)
    writer.value(value, MAX_DEPTH)
    writer.check(0)
    return bytes(writer.out)


class _Writer:
    def __init__(self, strict: bool, limit: int):
        self.out, self.strict, self.limit = bytearray(), strict, limit

    def check(self, more: int) -> None:
        if len(self.out) + more > self.limit:
            raise WireError(f"the value takes more than {self.limit} bytes")

    def flat(self, letter: bytes, content: bytes) -> None:
        self.check(len(content))
        self.out += letter + struct.pack(">I", len(content)) + content

    def items(self, letter: bytes, items: list, depth: int) -> None:
        self.out += letter + struct.pack(">I", len(items))
        for item in items:
            self.value(item, depth - 1)

    def value(self, value: Any, depth: int) -> None:
        self.check(0)
        if depth == 0:
            raise WireError(f"the value has more than {MAX_DEPTH} levels")
        kind = type(value)
        if value is None or kind is bool:
            self.out += {None: b"N", True: b"T", False: b"F"}[value]
        elif issubclass(kind, int):
            self.flat(b"i", int.to_bytes(value, (int.bit_length(value) + 8) // 8, "big", signed=True))
        elif issubclass(kind, float):
            self.out += b"f" + struct.pack(">d", value)
        elif issubclass(kind, complex):
            self.out += b"c" + struct.pack(">dd", value.real, value.imag)
        elif issubclass(kind, str):
            self.flat(b"s", str.encode(value, "utf-8", "surrogatepass"))
        elif issubclass(kind, bytes):
            self.flat(b"b", value)
        elif issubclass(kind, bytearray):
            self.flat(b"a", bytes(value))
        elif kind is range:
            self.out += b"r"
            for part in (value.start, value.stop, value.step):
                self.value(part, depth - 1)
        elif issubclass(kind, dict):
            self.out += b"d" + struct.pack(">I", dict.__len__(value))
            for pair in dict.items(value):
                for part in pair:
                    self.value(part, depth - 1)
        else:
            for letter, base in (b"l", list), (b"t", tuple), (b"S", set), (b"Z", frozenset):
                if issubclass(kind, base):
                    return self.items(letter, list(base.__iter__(value)), depth)
            self.other(value, kind, depth)

    def other(self, value: Any, kind: type, depth: int) -> None:
        ratio = _exact_ratio(value) if hasattr(kind, "as_integer_ratio") else None
        iterable = hasattr(kind, "__iter__")
        if ratio is not None:
            self.out += b"q"
            for number in ratio:
                self.value(number, depth - 1)
        elif issubclass(kind, Set):
            self.items(b"k", list(value), depth)
        elif iterable and hasattr(kind, "__next__"):
            self.items(b"I", self.some(value), depth)
        elif self.strict or kind is Opaque:
            raise WireError(f"an object of type {kind.__name__!r} is not data")
        else:
            self.out += b"o"
            items = self.some(value) if iterable else None
            for part in (kind.__name__, str(value)[:MAX_TEXT], bool(value), items):
                self.value(part, depth - 1)

    def some(self, values: Any) -> list:
        """The items of an iterable, which may never end."""
        items = []
        for item in values:
            items.append(item)
            if len(items) > self.limit:
                raise WireError(f"the iterator gives more than {self.limit} items")
        return items


def _exact_ratio(value: Any) -> tuple[int, int] | None:
    try:
        return value.as_integer_ratio()
    except (ValueError, OverflowError):  # a Decimal that is not finite
        return None


# ---------------------------------------------------------------------------------------------------------------------
# From bytes to values


def decode(message: bytes) -> Any:
    """The value, of exactly the types above. Raises `WireError`."""
    reader = _Reader(message)
    try:
        value = reader.value(MAX_DEPTH)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:  # such as a list in a set
        raise WireError(f"no value: {error}") from None
    if reader.start != len(message):
        raise WireError("no value: it goes on behind its end")
    return value


class _Reader:
    def __init__(self, message: bytes):
        self.message, self.start = message, 0

    def take(self, length: int) -> bytes:
        content = self.message[self.start : self.start + length]
        if len(content) != length:
            raise WireError("no value: it ends too early")
        self.start += length
        return content

    def length(self) -> int:
        (length,) = struct.unpack(">I", self.take(4))
        if length > len(self.message) - self.start:  # each item takes a byte at least
            raise WireError("no value: it ends too early")
        return length

    def items(self, count: int, depth: int) -> list:
        return [self.value(depth - 1) for _ in range(count)]

    def value(self, depth: int) -> Any:
        if depth == 0:
            raise WireError(f"no value: more than {MAX_DEPTH} levels")
        letter = self.take(1)
        if letter in _SINGLE:
            return _SINGLE[letter]
        if letter == b"f":
            return struct.unpack(">d", self.take(8))[0]
        if letter == b"c":
            return complex(*struct.unpack(">dd", self.take(16)))
        if letter in _FLAT:
            return _FLAT[letter](self.take(self.length()))
        if letter in _NESTED:
            return _NESTED[letter](self.items(self.length(), depth))
        if letter == b"d":
            items = self.items(2 * self.length(), depth)
            return dict(zip(items[::2], items[1::2], strict=True))
        if letter in (b"r", b"q"):
            parts = self.items(3 if letter == b"r" else 2, depth)
            if any(type(part) is not int for part in parts):
                raise WireError("no value: a range or ratio of something else than integers")
            return range(*parts) if letter == b"r" else _ratio(*parts)
        if letter == b"o":
            name, text, truth, items = self.items(4, depth)
            if (type(name), type(text), type(truth)) != (str, str, bool) or type(items) not in (list, type(None)):
                raise WireError("no value: an object of something else than its texts, truth and items")
            return Opaque(name, text, truth, items)
        raise WireError(f"no value: {letter!r} is no type")


def _ratio(above: int, below: int) -> Any:
    from fractions import Fraction

    return Fraction(above, below)


_SINGLE = {b"N": None, b"T": True, b"F": False}
_FLAT: dict[bytes, Any] = {
    b"i": lambda content: int.from_bytes(content, "big", signed=True),
    b"s": lambda content: content.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"a": bytearray,
}
_NESTED: dict[bytes, Any] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"Z": frozenset,
    b"k": lambda items: dict.fromkeys(items).keys(),
    b"I": iter,
}
