"""An event on its way to the listener: bytes that are made in one step on its caller's thread.

They are the JSON array `[number, seconds, fields]`. Where the fields do not say the same of session
and type as the head, it is the array `[session, type, number, seconds]`, a line feed, the fields.
The text of the fields is the event's body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from eventlog_handler._encode import encode
from eventlog_handler._stamp import event_id
from eventlog_handler.typing import Bytes, EncodedEvent, EventHead

_DIGITS = b"0123456789"
"""The second byte of an array that begins with a number."""

_UNCOPIED_BYTES = 16384
"""From which on a body stays where its payload is; below it, the copy costs less than a view."""


def pack(head: EventHead, fields: Mapping[str, Any]) -> bytes:
    """Return an event as a payload. Never raises an `Exception`.

    Who keeps it copies it: orjson's bytes keep the buffer that they were made in, 4 kB or more.

    Args:
        head: All of the event but its fields.
        fields: Its fields.
    """
    session_id, kind, number, seconds = head
    own = fields.get("session_id")
    if type(own) is type(session_id) and own == session_id and fields.get("type") is kind:
        try:
            # Without an option for keys that are no text: it costs as much as all the rest.
            return orjson.dumps((number, seconds, fields), None, orjson.OPT_PASSTHROUGH_DATACLASS)
        except TypeError:
            pass
    return pack_body(head, encode(fields))


def pack_body(head: EventHead, body: Bytes) -> bytes:
    """Return an event as a payload, where its fields are encoded already."""
    try:
        return orjson.dumps(head, None, orjson.OPT_APPEND_NEWLINE) + body
    except TypeError:
        # Lone surrogates, which UTF-8 has not, are escaped by the slower one.
        return json.dumps(head).encode() + b"\n" + body


def event_of(head: EventHead, payload: bytes, skip: int = 0, process: str = "") -> EncodedEvent:
    """Return the event of a payload.

    Args:
        head: The one that it was packed with.
        payload: As `pack` has made it, perhaps behind something else.
        skip: How many bytes that takes.
        process: What the event's id begins with; this process's unless given.
    """
    session_id, kind, number, seconds = head
    whole = payload if len(payload) < _UNCOPIED_BYTES else memoryview(payload)
    if payload[skip + 1] in _DIGITS:
        # Numbers have no brace.
        body = whole[payload.index(b"{", skip) : -1]
    else:
        body = whole[payload.index(b"\n", skip) + 1 :]
    unique = event_id(number, process)
    # Without the call in Python that the constructor of a named tuple is.
    return tuple.__new__(EncodedEvent, (session_id, kind, unique, seconds, body))


def unpack(payload: bytes, process: str) -> EncodedEvent:
    """Return the event of a payload of which nothing else is known.

    Args:
        payload: As `pack` has made it.
        process: What the event's id begins with.
    """
    if payload[1] in _DIGITS:
        number, seconds, fields = _decoded(payload)
        head = fields.get("session_id"), fields["type"], number, seconds
    else:
        head = tuple(_decoded(payload.partition(b"\n")[0]))
    return event_of(head, payload, process=process)


def _decoded(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Lone surrogates: orjson takes none, not even escaped.
        return json.loads(text)


def head_of(event: EncodedEvent) -> EventHead:
    """Return the head of an event of this process."""
    return event.session_id, event.type, int(event.id.rpartition("-")[2]), event.seconds
