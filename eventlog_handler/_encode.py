"""Any Python value to JSON bytes, without ever failing."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

# Dataclasses go through `plain`: orjson itself leaves out fields that begin with an underscore.
_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS
_DEEPEST = 60
"""Levels that the careful way keeps. orjson itself stops at 254."""
_LONGEST_INT = 4300
"""Digits; above it CPython (3.11 on) refuses the conversion, as it is quadratic."""


def encode(fields: Mapping[str, Any]) -> bytes:
    """Return `fields` as one JSON object in UTF-8, on one line.

    What JSON has no word for is replaced: text for most objects, their fields for models and
    dataclasses, lists for sets, `null` for NaN and infinities. Never raises an `Exception`.

    Who keeps them copies them: orjson's bytes keep the buffer that they were made in, 4 kB or more.
    """
    try:
        # Without an option for keys that are no text: it costs as much as all the rest.
        return orjson.dumps(fields, None, orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError:
        pass
    try:
        return orjson.dumps(fields, default=plain, option=_options())
    except Exception:
        # A circle, a lone surrogate, an integer of more than 64 bits, an object that defends
        # itself: rare enough to pay a walk in Python, 10 to 50 times slower.
        return orjson.dumps(_careful(fields, ()))


def _options() -> int:
    """Return orjson's options: with those for numpy only where the application has imported it.

    orjson itself imports it for the first value that it does not know: a tenth of a second in the
    middle of somebody's `logger.info`, and a hang where a signal's exception cuts that import off.
    """
    return _OPTIONS | orjson.OPT_SERIALIZE_NUMPY if "numpy" in sys.modules else _OPTIONS


def encode_and_load(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `fields` made of nothing but JSON's own types."""
    loaded: dict[str, Any] = orjson.loads(encode(fields))
    return loaded


def plain(value: Any) -> Any:
    """Return something nearer to JSON than `value`: a dict, a list or text.

    This is orjson's hook for what it does not know; the result may hold such values again.
    """
    found = object_fields(value)
    if found is not None:
        return found
    if isinstance(value, (set, frozenset, tuple, deque)):
        return list(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, BaseException):
        return {"type": type(value).__name__, "message": as_text(value)}
    if isinstance(value, float):
        # orjson takes subclasses of str, int, list and dict, but none of float.
        return float.__float__(value)
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__ or 'builtins'}.{value.__qualname__}"
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        # What OPT_SERIALIZE_NUMPY leaves, such as arrays that are not contiguous.
        return value.tolist()
    return as_text(value)


def object_fields(value: Any) -> Mapping[str, Any] | None:
    """Return the fields of a mapping, model, dataclass, attrs or named-tuple object, else None."""
    if isinstance(value, Mapping):
        return value if isinstance(value, dict) else dict(value)
    if isinstance(value, type):
        return None
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        dumped = dump()
        return dumped if isinstance(dumped, Mapping) else None
    if dataclasses.is_dataclass(value):
        return _read(value, (f.name for f in dataclasses.fields(value)))
    attributes = getattr(type(value), "__attrs_attrs__", None)
    if attributes is not None:
        return _read(value, (a.name for a in attributes))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        named: Mapping[str, Any] = value._asdict()
        return named
    return None


def public_attributes(value: Any) -> dict[str, Any] | None:
    """Return what any object holds in `__dict__` and `__slots__`, or None where it has neither.

    Names that begin with an underscore are left out, and so are slots that were never set.
    """
    names: list[str] = []
    for cls in reversed(type(value).__mro__):
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    held = getattr(value, "__dict__", None)
    if not names and not isinstance(held, dict):
        return None
    names += held or ()
    return _read(value, (name for name in names if not name.startswith("_")))


def _read(value: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def as_text(value: Any) -> str:
    """Return `str(value)`, or else `repr(value)`, or else what class it is."""
    for render in (str, repr):
        try:
            return render(value)
        except Exception:  # noqa: S112 - a hostile __str__ costs its own text, not the event
            continue
    return f"<{type(value).__name__}: no text could be made of it>"


def _careful(value: Any, parents: tuple[int, ...]) -> Any:
    """Rebuild `value` from JSON's types alone: any depth, any circle, any failing method."""
    try:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _clean(value)
        if isinstance(value, int):
            return _integer(value)
        if isinstance(value, float):
            return float.__float__(value)
        if id(value) in parents:
            return f"<circular reference to {type(value).__name__}>"
        if len(parents) >= _DEEPEST:
            return f"<{type(value).__name__}: nested deeper than {_DEEPEST} levels>"
        return _careful_container(value, (*parents, id(value)))
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__} while it was read>"


def _careful_container(value: Any, parents: tuple[int, ...]) -> Any:
    if isinstance(value, Mapping):
        # Two keys may have one text (1 and "1"): JSON readers keep the last, and so do we.
        return {_key(k): _careful(v, parents) for k, v in list(value.items())}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_asdict"):
        return [_careful(item, parents) for item in list(value)]
    try:
        return orjson.loads(orjson.dumps(value, option=_options()))
    except Exception:
        return _careful(plain(value), parents)


def _key(key: Any) -> str:
    if key is None or isinstance(key, bool):
        return orjson.dumps(key).decode()
    if isinstance(key, int):
        return str(_integer(key))
    return _clean(key if isinstance(key, str) else as_text(key))


def _clean(text: str) -> str:
    # Lone surrogates have no UTF-8; a str subclass may override what encoding calls.
    return str.encode(text, "utf-8", "backslashreplace").decode("utf-8")


def _integer(value: int) -> int | str:
    value = int.__index__(value)
    if -(2**63) <= value < 2**64:
        return value
    return hex(value) if value.bit_length() > 3 * _LONGEST_INT else str(value)
