"""Payloads: an event is packed once on its caller's thread, and found again whole."""

from __future__ import annotations

import datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventlog_handler._encode import encode
from eventlog_handler._payload import event_of, head_of, pack, pack_body, unpack
from eventlog_handler._stamp import LAST_SECOND, new_id, process_id
from eventlog_handler.typing import EncodedEvent, EventHead

# Of all characters, and of those that look like the end of something.
TEXT = st.text(st.characters(), max_size=20) | st.text('\n{}[],:"\\7', max_size=20)
VALUES = st.none() | st.integers() | st.floats() | TEXT | st.just({"a": [{}]}) | st.just({1})
FIELDS = st.dictionaries(TEXT | st.sampled_from(["type", "session_id"]), VALUES, max_size=4)
HEADS = st.tuples(st.none() | TEXT, TEXT, st.integers(1, 2**40), st.floats(0, LAST_SECOND))


def told(head: EventHead, fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields that say session and type as the head does."""
    return {"type": head[1], "session_id": head[0], **fields}


def same(head: EventHead, payload: bytes, body: bytes) -> None:
    """Fail where a payload is not that event, for who has its head and for who has not."""
    session_id, kind, number, seconds = head
    expected = EncodedEvent(session_id, kind, f"p-{number}", seconds, body)
    assert event_of(head, payload, process="p") == expected
    assert event_of(head, b"{[\n7" + payload, 4, "p") == expected
    assert unpack(payload, "p") == expected


@given(HEADS, FIELDS)
def test_an_event_survives_packing(head: EventHead, fields: dict[str, Any]) -> None:
    """Session, type, number, time and the fields' JSON come back, whatever is in them."""
    same(head, pack(head, fields), encode(fields))


@given(HEADS, FIELDS)
def test_an_event_that_tells_its_session_survives_packing(
    head: EventHead, fields: dict[str, Any]
) -> None:
    """So do those of an event whose fields say session and type themselves."""
    fields = told(head, fields)
    same(head, pack(head, fields), encode(fields))


@given(HEADS, st.binary(max_size=50))
def test_an_encoded_event_survives_packing(head: EventHead, body: bytes) -> None:
    """A body that is encoded already comes back to the byte."""
    same(head, pack_body(head, body), body)


def test_usual_payload_is_one_array() -> None:
    """Where the fields tell session and type these are not written twice."""
    head = ("s", "log", 7, 1.5)
    assert orjson.loads(pack(head, told(head, {"n": 1}))) == [7, 1.5, told(head, {"n": 1})]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "log"},
        {"session_id": "s"},
        {"type": "log", "session_id": "other"},
        {"type": "log", "session_id": None},
        {"type": "other", "session_id": "s"},
    ],
)
def test_what_the_fields_do_not_tell_is_written_beside_them(fields: dict[str, Any]) -> None:
    """Session and type stand in a line of their own then."""
    line, _, body = pack(("s", "log", 7, 1.5), fields).partition(b"\n")
    assert (orjson.loads(line), orjson.loads(body)) == (["s", "log", 7, 1.5], fields)


def test_no_session_and_the_empty_session_differ() -> None:
    """None and the empty id are told apart after packing."""
    heads: list[EventHead] = [(None, "log", 1, 1.5), ("", "log", 1, 1.5)]
    assert [unpack(pack(head, {}), "p").session_id for head in heads] == [None, ""]


def test_surrogates_and_line_feeds_survive_packing() -> None:
    """A lone surrogate and a line feed in a session's id and type come back."""
    head = ("a\ud800\nb", "t\udfff\n", 7, 1.5)
    same(head, pack(head, {"n": 1}), b'{"n":1}')
    same(head, pack(head, told(head, {})), encode(told(head, {})))


def test_values_that_json_has_no_word_for_survive_packing() -> None:
    """What JSON has no word for is replaced as everywhere, in the same bytes."""
    head = ("s", "log", 7, 1.5)
    fields = told(head, {"at": datetime.datetime(2026, 11, 27), "tags": {1}})
    same(head, pack(head, fields), encode(fields))


def test_event_of_this_process_has_its_id() -> None:
    """The id is made of the process's and of the number."""
    assert event_of(("s", "log", 7, 1.5), b"[7,1.5,{}]").id == f"{process_id()}-7"


def test_head_of_an_event_is_the_one_that_it_was_packed_with() -> None:
    """An event that has its id already can be packed again."""
    event = EncodedEvent("s", "log", new_id(), 1.5, b"{}")
    assert event_of(head_of(event), pack_body(head_of(event), event.body)) == event


@pytest.mark.parametrize("told_by_fields", [True, False])
def test_large_body_is_a_part_of_its_payload(told_by_fields: bool) -> None:
    """A history of 100 kB is not copied again on its way to the file."""
    head = ("s", "log", 7, 1.5)
    fields = {"history": "x" * 100_000}
    if told_by_fields:
        fields = told(head, fields)
    payload = pack(head, fields)
    same(head, payload, encode(fields))
    body = event_of(head, payload).body
    assert isinstance(body, memoryview)
    assert body.obj is payload
