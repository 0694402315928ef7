"""Any value becomes JSON; ids are unique; timestamps are ISO 8601 in UTC."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
import uuid
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventlog_handler._encode import (
    as_text,
    encode,
    encode_and_load,
    object_fields,
    plain,
    public_attributes,
)


class Hostile:
    """Defends itself against being read."""

    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class HostileClass:
    """Raises even where its class is asked for, as a proxy that lost its target does."""

    @property
    def __class__(self) -> Any:
        raise ReferenceError("the target is gone")

    def __str__(self) -> str:
        return "a dead proxy"


class ReprOnly:
    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __repr__(self) -> str:
        return "<only a repr>"


@dataclass
class Point:
    x: int
    y: Any


@attrs.define
class Attrs:
    name: str
    size: int


class Model(pydantic.BaseModel):
    name: str
    size: int


Pair = namedtuple("Pair", ["left", "right"])


class OddModel:
    """Has a `model_dump` that is no pydantic's."""

    def model_dump(self) -> list[int]:
        return [1]

    def __str__(self) -> str:
        return "odd"


class Float(float):
    """A float that orjson does not take by itself."""


class Text(str):
    """Overrides what encoding would call."""

    __slots__ = ()

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("no encode")


class Integer(int):
    """An integer whose text raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Color(enum.Enum):
    RED = "red"


class BrokenList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no items")


def in_json(value: Any) -> Any:
    """Return what a reader of `{"v": value}` finds under `v`."""
    return json.loads(encode({"v": value}))["v"]


def refuse_constant(name: str) -> None:
    """Fail where Python reads NaN or Infinity, which are no JSON."""
    raise AssertionError(f"{name} is not JSON")


def circular_list(items: list[Any]) -> list[Any]:
    """Return the list with itself as its last item."""
    items.append(items)
    return items


def circular_dict(items: dict[Any, Any]) -> dict[Any, Any]:
    """Return the dict with itself below one of its keys."""
    items["itself"] = [items]
    return items


def nested(depth: int, leaf: Any) -> Any:
    """Return `leaf` inside so many dicts and lists, by turns."""
    for level in range(depth):
        leaf = [leaf] if level % 2 else {"deeper": leaf}
    return leaf


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=0, max_value=15_000).map(lambda bits: -(2**bits)),
    st.floats(),
    st.floats().map(Float),
    st.text(alphabet=st.characters()),
    st.text(alphabet=st.characters()).map(Text),
    st.binary(),
    st.binary().map(bytearray),
    st.datetimes(),
    st.datetimes(timezones=st.timezones()),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.decimals(),
    st.uuids(),
    st.complex_numbers(),
    st.sampled_from([Color.RED, Color, int, len, object(), ValueError("\ud800"), Ellipsis]),
    st.builds(Hostile),
    st.builds(ReprOnly),
)
keys = st.one_of(
    st.text(alphabet=st.characters()),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(),
    st.datetimes(),
    st.uuids(),
    st.tuples(st.integers(), st.text()),
    st.builds(Hostile),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return what holds values of `inner`."""
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(deque),
        st.lists(inner, max_size=3).map(circular_list),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(UserDict),
        st.dictionaries(keys, inner, max_size=3).map(circular_dict),
        st.frozensets(keys, max_size=4),
        st.builds(Point, x=st.integers(), y=inner),
        st.builds(Pair, inner, inner),
        st.builds(nested, st.integers(0, 400), inner),
    )


values = st.recursive(scalars, containers, max_leaves=8)


@settings(
    max_examples=2000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(value=values)
def test_any_value_becomes_one_json_object_on_one_line(value: Any) -> None:
    """Whatever a field holds, the result is one valid JSON object without a line feed."""
    line = encode({"v": value})
    assert list(json.loads(line.decode("utf-8"), parse_constant=refuse_constant)) == ["v"]
    assert b"\n" not in line


@settings(max_examples=500, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_json_values_come_back_as_they_were(value: Any) -> None:
    """What JSON has a word for is not changed."""
    assert in_json(value) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (Float("2.5"), 2.5),
        ({1}, [1]),
        (frozenset({"a"}), ["a"]),
        (deque([1, 2]), [1, 2]),
        ((1, 2), [1, 2]),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (bytearray(b"ab"), "ab"),
        (memoryview(b"ab"), "ab"),
        (ValueError("wrong"), {"type": "ValueError", "message": "wrong"}),
        (int, "builtins.int"),
        (json.dumps, "json.dumps"),
        (Decimal("1.50"), "1.50"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc), "2026-01-02T03:04:05+00:00"),
        (Color.RED, "red"),
        (1 + 2j, "(1+2j)"),
        (Pair(1, {2}), {"left": 1, "right": [2]}),
        (UserDict(a=1), {"a": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (Point(1, {2}), {"x": 1, "y": [2]}),
        (Attrs("a", 1), {"name": "a", "size": 1}),
        (Model(name="a", size=1), {"name": "a", "size": 1}),
        (OddModel(), "odd"),
        pytest.param(Text("text"), "text", id="str subclass"),
        (ReprOnly(), "<only a repr>"),
        (Hostile(), "<Hostile: no text could be made of it>"),
        ({None: 1, True: 2, 3: 4, (5, 6): 7}, {"null": 1, "true": 2, "3": 4, "(5, 6)": 7}),
    ],
)
def test_value_is_replaced_by_what_is_nearest(value: Any, expected: Any) -> None:
    """A value that JSON has no word for becomes text, a list, an object or null."""
    assert in_json(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\ud800b", "a\\ud800b"),
        (2**64, str(2**64)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        pytest.param(2**20_000, hex(2**20_000), id="too many digits"),
        (2**64 - 1, 2**64 - 1),
        (True, True),
        (None, None),
        (1.5, 1.5),
        (float("-inf"), None),
        (Float("nan"), None),
        pytest.param(Integer(7), 7, id="int subclass"),
        pytest.param(Text("text"), "text", id="str subclass"),
        ((1, "a"), [1, "a"]),
        ({2}, [2]),
        (Pair(1, "\ud800"), {"left": 1, "right": "\\ud800"}),
        (Point(1, "\ud800"), {"x": 1, "y": "\\ud800"}),
        (Attrs("\ud800", 1), {"name": "\\ud800", "size": 1}),
        (Color.RED, "red"),
        (datetime(2026, 1, 2), "2026-01-02T00:00:00"),
        (ValueError("\ud800"), {"type": "ValueError", "message": "\\ud800"}),
        (Hostile(), "<Hostile: no text could be made of it>"),
        (BrokenList([1]), "<BrokenList: RuntimeError while it was read>"),
        ({None: 1, True: 2, 2**70: 3}, {"null": 1, "true": 2, str(2**70): 3}),
        ({1.5: 1, "\ud800": 2, b"x": 3}, {"1.5": 1, "\\ud800": 2, "b'x'": 3}),
    ],
)
def test_value_beside_a_hard_one_is_kept(value: Any, expected: Any) -> None:
    """A lone surrogate in one field costs no other field what it holds."""
    found = json.loads(encode({"hard": "\udfff", "v": value}))
    assert found == {"hard": "\\udfff", "v": expected}


def test_circle_is_named_where_it_closes() -> None:
    """A list that holds itself is written once, and then named."""
    assert in_json(circular_list([1])) == [1, "<circular reference to list>"]


def test_same_object_twice_is_no_circle() -> None:
    """An object that stands in two places is written in both."""
    shared = {"a": "\ud800"}
    assert in_json([shared, shared]) == [{"a": "\\ud800"}, {"a": "\\ud800"}]


def test_depth_past_the_limit_is_named() -> None:
    """Of a value that is nested too deep, 60 levels are kept and the rest is named."""
    found = in_json(nested(1000, 1))
    levels = 0
    while not isinstance(found, str):
        found = found["deeper"] if isinstance(found, dict) else found[0]
        levels += 1
    assert levels == 59  # and the object around it
    assert found == "<dict: nested deeper than 60 levels>"


def test_two_keys_of_one_text_keep_the_last() -> None:
    """The keys 1 and "1" are one in JSON, whose readers keep the last."""
    assert in_json({1: "first", "1": "\ud800"}) == {"1": "\\ud800"}


def test_hostile_object_costs_only_its_own_field() -> None:
    """An object whose class cannot even be asked for does not take the event's other fields."""
    found = json.loads(encode({"kept": 1, "v": HostileClass()}))
    assert found["kept"] == 1


def test_copy_is_of_json_types_and_shares_nothing() -> None:
    """A processor's copy can be changed without changing the application's objects."""
    inner = {"set": {1}}
    copy = encode_and_load({"inner": inner})
    copy["inner"]["set"].append(2)
    assert copy == {"inner": {"set": [1, 2]}}
    assert inner == {"set": {1}}


def test_numpy_value_that_orjson_leaves_becomes_its_list() -> None:
    """A numpy object that orjson refuses, such as a strided array, is asked for its list."""
    strided = type("ndarray", (), {"__module__": "numpy", "tolist": lambda self: [1, 3]})
    assert plain(strided()) == [1, 3]


def test_numpy_object_without_a_list_becomes_text() -> None:
    """A numpy object that has no list is taken as text."""
    kind = type("dtype", (), {"__module__": "numpy", "__str__": lambda self: "int64"})
    assert plain(kind()) == "int64"


@pytest.mark.parametrize(
    "value", [1, "text", [1], (1, 2), Point, Attrs, Model, OddModel(), object()]
)
def test_value_without_fields_has_none(value: Any) -> None:
    """Scalars, sequences, classes and objects of no known kind have no fields."""
    assert object_fields(value) is None


def test_dict_is_its_own_fields() -> None:
    """A dict is not copied on the way to being encoded."""
    event = {"a": 1}
    assert object_fields(event) is event


def test_unset_attribute_is_left_out() -> None:
    """A dataclass whose attribute was deleted has the others."""
    point = Point(1, 2)
    del point.y
    assert object_fields(point) == {"x": 1}


class Base:
    __slots__ = "a"


class Slotted(Base):
    __slots__ = ("_hidden", "b", "never_set")


class Loose(Slotted):
    pass


def test_public_attributes_are_those_of_slots_and_dict() -> None:
    """Slots of all classes come first, then the dict; underscored and unset names are left out."""
    loose = Loose()
    loose.a, loose.b, loose._hidden, loose.c, loose._d = 1, 2, 3, 4, 5  # type: ignore[attr-defined]
    found = public_attributes(loose)
    assert found == {"a": 1, "b": 2, "c": 4}
    assert list(found or ()) == ["a", "b", "c"]


def test_slots_without_a_dict_are_public_attributes() -> None:
    """An object that has slots alone is read from them."""
    slotted = Slotted()
    slotted.b = 2  # type: ignore[attr-defined]
    assert public_attributes(slotted) == {"b": 2}


def test_object_without_attributes_has_none() -> None:
    """A value with neither dict nor slots has no attributes to tell of."""
    assert public_attributes(3) is None


def test_text_is_str_then_repr_then_the_class() -> None:
    """What cannot be rendered at all is named by its class."""
    assert [as_text(v) for v in (1, ReprOnly(), Hostile())] == [
        "1",
        "<only a repr>",
        "<Hostile: no text could be made of it>",
    ]


def test_interrupt_while_rendering_is_not_swallowed() -> None:
    """Ctrl-C in the middle of an object's `__str__` still stops the program."""
    interrupted = type("Slow", (), {"__str__": lambda self: (_ for _ in ()).throw(SystemExit)})()
    with pytest.raises(SystemExit):
        as_text(interrupted)


def test_no_value_makes_us_import_anything(tmp_path: Path) -> None:
    """A value that JSON has no word for costs its caller no import, of numpy least of all."""
    (tmp_path / "numpy.py").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from eventlog_handler._encode import encode\n"
        "before = set(sys.modules)\n"
        "encode({'x': object(), 'y': {1}})\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
