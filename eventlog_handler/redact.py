"""Processors that keep secrets out of files and transports."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from eventlog_handler.typing import EventFields

REDACTED = "[redacted]"
_GONE = object()


def redact_keys(*names: str) -> Callable[[EventFields], EventFields]:
    """Return a processor that replaces the value of every key with one of these names.

    Args:
        *names: Compared without regard to case, at any depth, for example `"password"`.

    Raises:
        TypeError: No name was given, or one is not a str.
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"redact_keys takes one or more names, as in redact_keys('password'), not {names!r}"
        )
    hidden = frozenset(name.lower() for name in names)

    def change(key: str | None, value: Any) -> Any:
        return REDACTED if key is not None and key.lower() in hidden else value

    return functools.partial(_rebuild, change)


def redact_patterns(*regexes: str | re.Pattern[str]) -> Callable[[EventFields], EventFields]:
    """Return a processor that replaces what matches in any text of an event, at any depth.

    Args:
        *regexes: Searched in every value that is text (message and traceback too), for example
            `r"sk-[A-Za-z0-9]{20,}"`. Keys are left alone.

    Raises:
        TypeError: None was given, or one is not for text.
        ValueError: One cannot be compiled; the message says which.
    """
    if not regexes:
        raise TypeError(
            r"redact_patterns takes one or more regexes, as in redact_patterns(r'sk-\w+')"
        )
    for regex in regexes:
        if not isinstance(getattr(regex, "pattern", regex), str):
            raise TypeError(
                f"redact_patterns takes regexes of text, as in r'sk-\\w+', not {regex!r}"
            )
    try:
        compiled = [re.compile(regex) for regex in regexes]
    except re.error as error:
        raise ValueError(f"redact_patterns cannot compile {error.pattern!r}: {error}") from None

    def change(key: str | None, value: Any) -> Any:
        for regex in compiled if isinstance(value, str) else ():
            value = regex.sub(REDACTED, value)
        return value

    return functools.partial(_rebuild, change)


def drop_system_prompt(fields: EventFields) -> EventFields:
    """Drop an event of type `system_prompt`, and every field of that name at any depth.

    Raises:
        structlog.DropEvent: The event is a system prompt.
    """
    if fields.get("type") == "system_prompt":
        raise structlog.DropEvent

    def change(key: str | None, value: Any) -> Any:
        return _GONE if key == "system_prompt" else value

    kept: EventFields = _rebuild(change, fields)
    return kept


def _rebuild(change: Callable[[str | None, Any], Any], value: Any) -> Any:
    """Return a copy of JSON-like data in which `change(key, value)` took the place of each value.

    Items of lists have no key. A value changed to `_GONE` is left out with its key.
    """
    if isinstance(value, Mapping):
        changed = {k: _rebuild(change, change(k, v)) for k, v in value.items()}
        return {k: v for k, v in changed.items() if v is not _GONE}
    return [_rebuild(change, change(None, v)) for v in value] if isinstance(value, list) else value
