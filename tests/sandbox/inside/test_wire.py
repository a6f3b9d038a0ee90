import collections
import contextlib
import decimal
import enum
import math
import os
import struct
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dllm.sandbox.inside import wire
from trl_dllm.sandbox.inside.wire import MAX_BYTES, MAX_DEPTH, Closed, Opaque, WireError, decode, encode, receive, send


scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-(1 << 300), 1 << 300), st.binary(max_size=20)),
    *(st.floats(), st.complex_numbers(), st.text(st.characters(), max_size=20), st.builds(bytearray, st.binary())),
    st.builds(range, st.integers(), st.integers(), st.integers(1, 9)),
)
hashable = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5)),
    st.tuples(st.integers(), st.text(max_size=5)),
    st.frozensets(st.integers(), max_size=4),
)
values = st.recursive(
    st.one_of(scalars, st.sets(hashable, max_size=5), st.frozensets(hashable, max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(hashable, inner, max_size=5),
    ),
    max_leaves=30,
)


def bits(value):
    """A value with everything that `==` overlooks: types, signs of zero, NaN, order."""
    kind = type(value)
    if kind in (float, complex):
        return kind, struct.pack(">dd", complex(value).real, complex(value).imag)
    if kind in (list, tuple):
        return kind, [bits(item) for item in value]
    if kind is dict:
        return kind, [(bits(key), bits(item)) for key, item in value.items()]
    if kind in (set, frozenset):
        return kind, sorted(repr(bits(item)) for item in value)
    return kind, value


@settings(max_examples=300, deadline=None)
@given(values)
def test_values_arrive_as_they_are(value):
    assert bits(decode(encode(value))) == bits(value)
    assert bits(decode(encode(value, strict=True))) == bits(value)


NEARLY_DATA = [
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (collections.OrderedDict([(2, 1), (1, 2)]), {2: 1, 1: 2}),
    (collections.defaultdict(list, {1: [2]}), {1: [2]}),
    (collections.namedtuple("P", "x y")(1, 2), (1, 2)),
    (enum.IntEnum("E", "A B").B, 2),
    (type("T", (str,), {"__str__": lambda s: "lie", "__eq__": lambda *a: True, "encode": 1})("truth"), "truth"),
    (type("I", (int,), {"__index__": lambda s: 9, "__eq__": lambda *a: True})(3), 3),
    (type("F", (float,), {"__float__": lambda s: 9.0})(2.5), 2.5),
    (type("L", (list,), {"__iter__": lambda s: iter([9])})([1]), [1]),
    (type("D", (dict,), {"items": lambda s: [(9, 9)]})({1: 2}), {1: 2}),
    (type("S", (set,), {"__iter__": lambda s: iter([9])})({1}), {1}),
    (Fraction(1, 3), Fraction(1, 3)),
    (decimal.Decimal("0.1"), Fraction(1, 10)),
    ({1: 2}.keys(), {1: 0}.keys()),
    ({1: 2}.items(), {(1, 2): 0}.keys()),
]


def test_what_is_nearly_data():
    for value, arrives in NEARLY_DATA:
        found = decode(encode(value))
        assert found == arrives and type(found) is type(arrives)


def test_iterators_arrive_as_iterators():
    for value in (iter([1, 2]), (n for n in (1, 2)), map(int, "12"), reversed([2, 1]), filter(None, [1, 2])):
        found = decode(encode(value))
        assert next(found) == 1 and list(found) == [2] and found != [1, 2]


def test_other_objects_arrive_opaque():
    found = decode(encode({1: collections.deque([1, 2]), 2: object, 3: decimal.Decimal("nan"), 4: len}))
    assert all(type(value) is Opaque for value in found.values())
    assert list(found[1]) == [1, 2] and len(found[1]) == 2 and found[1] != [1, 2] and str(found[1]) == "deque([1, 2])"
    assert bool(found[1]) and not decode(encode(collections.deque()))
    assert found[3] != found[3].text and not hasattr(found[2], "mro")
    with pytest.raises(TypeError, match="'type' object is not iterable"):
        iter(found[2])
    with pytest.raises(TypeError):
        found[4]([])


@pytest.mark.parametrize("value", [object(), len, collections.deque(), Opaque("x", "x", True, None), type, [print]])
def test_strictly_only_data(value):
    with pytest.raises(WireError, match="is not data"):
        encode(value, strict=True)


def test_an_opaque_object_is_never_passed_off_as_something():
    with pytest.raises(WireError, match="'Opaque' is not data"):
        encode(Opaque("int", "9", True, [9]))


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def endless():
    while True:
        yield None


def test_limits():
    assert decode(encode(nested(MAX_DEPTH - 1))) == nested(MAX_DEPTH - 1)
    cycle = []
    cycle.append(cycle)
    for value, message in [
        (nested(MAX_DEPTH), "100 levels"),
        (cycle, "100 levels"),
        ("x" * MAX_BYTES, "8388608 bytes"),
        (1 << (8 * MAX_BYTES), "8388608 bytes"),
        ([b"x" * 1000] * 9000, "8388608 bytes"),
        (endless(), "8388608 items"),
    ]:
        with pytest.raises(WireError, match=message):
            encode(value)
    assert decode(encode("x" * MAX_BYTES, limit=2 * MAX_BYTES)) == "x" * MAX_BYTES


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60), st.lists(st.sampled_from(b"NTFificsbaltSZdkIrqo\0\1\5\xff"), max_size=60).map(bytes)
    )
)
def test_any_bytes_are_a_value_or_refused(message):
    try:
        value = decode(message)
    except WireError:
        return
    assert isinstance(value, (*CLOSED, type(iter([])), type({}.keys()), Fraction, Opaque, type(None)))


CLOSED = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range)


@settings(max_examples=300, deadline=None)
@given(values, st.data())
def test_damaged_messages(value, data):
    message = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    for damaged in (bytes(message), bytes(message[:-1]), bytes(message) + b"N"):
        with contextlib.suppress(WireError):
            decode(damaged)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x",
        b"NN",
        b"i\xff\xff\xff\xff",
        b"l\xff\xff\xff\xff" + b"N" * 100,
        b"d\0\0\0\1N",
        b"S\0\0\0\1l\0\0\0\0",  # a list in a set
        b"d\0\0\0\1l\0\0\0\0N",  # and as a key
        b"k\0\0\0\1l\0\0\0\0",
        b"s\0\0\0\1\xff",
        b"rNNN",
        b"r" + encode(0) + encode(1) + encode(0),
        b"r" + encode(0) + encode(True) + encode(1),
        b"q" + encode(1) + encode(0),
        b"q" + encode(1) + encode(1.5),
        b"o" + encode("x") + encode("x") + encode(1) + encode(None),
        b"o" + encode("x") + encode("x") + encode(True) + encode((1,)),
        b"l\0\0\0\1" * (MAX_DEPTH + 1) + b"N",
        b"l\0\0\0\1" * 100_000 + b"N",
    ],
)
def test_refused(message):
    with pytest.raises(WireError):
        decode(message)


def test_decoding_takes_memory_by_the_length():
    with pytest.raises(WireError, match="ends too early"):
        decode(b"l" + struct.pack(">I", MAX_BYTES) + b"N" * 10)
    assert math.isnan(decode(encode(math.nan)))


def test_messages_through_a_pipe():
    reading, writing = os.pipe()
    for message in (b"", b"abc", bytes(10_000)):
        send(writing, message)
        assert receive(reading) == message
    os.write(writing, b"\xff\xff\xff\xff")
    with pytest.raises(WireError, match="a message of 4294967295 bytes"):
        receive(reading)
    os.write(writing, b"\0\0\0\5ab")
    os.close(writing)
    with pytest.raises(Closed):
        receive(reading)
    os.close(reading)
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(Closed):
        send(writing, b"abc")
    os.close(writing)


def test_hostile_objects_raise_what_they_raise():
    class Hostile:
        def __str__(self):
            raise KeyError

        __bool__ = __iter__ = __str__

    with pytest.raises(KeyError):
        encode([Hostile()])
    assert len(decode(encode(type("T", (), {"__str__": lambda s: "x" * 10**6})())).text) <= wire.MAX_TEXT
