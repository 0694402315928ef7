"""An event's fields become its snapshot: session, bound fields, processors, redaction."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from eventlog_handler import (
    EventSessionLogger,
    SerializationError,
    redact_keys,
    redact_patterns,
    session_context,
)
from eventlog_handler._config import resolve
from eventlog_handler._intake import Intake
from eventlog_handler._payload import event_of, pack
from eventlog_handler._report import Report
from eventlog_handler._snapshot import record_fields, usual_event
from eventlog_handler.redact import drop_system_prompt
from eventlog_handler.testing import capture_events
from eventlog_handler.typing import EncodedEvent, EventHead
from tests.conftest import events_of

Told = list[tuple[Exception, str]]


def intake(told: Told | None = None, **options: Any) -> Intake:
    """Return an intake; what it reports is appended to `told`."""
    collect = None if told is None else lambda error, context: told.append((error, context))
    return Intake(resolve(options), Report(collect))


def encoded(found: tuple[EventHead, Mapping[str, Any]] | None) -> EncodedEvent:
    """Return what an intake has found as an event."""
    assert found is not None
    return event_of(found[0], pack(*found))


def body(taken: Intake, fields: dict[str, Any], session_id: str | None = None) -> Any:
    """Return the event's JSON object as it would stand in the file."""
    found = taken.snapshot(fields, session_id, 0.0)
    return None if found is None else orjson.loads(encoded(found).body)


class Broken:
    """A model that fails to dump itself."""

    def model_dump(self) -> dict[str, Any]:
        raise RuntimeError("no dump")

    def __str__(self) -> str:
        return "a broken model"


def test_event_that_cannot_be_read_keeps_its_text() -> None:
    """An object that raises while it is read is an event of its class, with its text."""
    assert intake().read(Broken()) == {"type": "Broken", "message": "a broken model"}


def test_event_that_cannot_be_read_is_told() -> None:
    """The error handler hears why an object could not be read."""
    told: Told = []
    intake(told).read(Broken())
    ((error, context),) = told
    assert (type(error), str(error)) == (SerializationError, "event cannot be read: no dump")
    assert context == "reading"


def test_session_is_the_events_own() -> None:
    """An event's own session beats the bound one."""
    with session_context("bound"):
        assert intake().session_of({"session_id": "own"}) == "own"


def test_session_that_is_known_apart_beats_the_field() -> None:
    """What the caller has found elsewhere counts first."""
    assert intake().session_of({"session_id": "own"}, "found") == "found"


@pytest.mark.parametrize("fields", [{}, {"session_id": None}])
def test_session_is_the_bound_one_where_the_event_has_none(fields: dict[str, Any]) -> None:
    """A missing session, or None, leaves it to the context."""
    with session_context("bound"):
        assert intake().session_of(fields) == "bound"


def test_session_is_none_where_none_is_known() -> None:
    """Neither event nor context: the session is unknown."""
    assert intake().session_of({}) is None


@pytest.mark.parametrize(
    ("given", "expected"), [(7, "7"), ("", ""), (b"a", "b'a'"), (False, "False")]
)
def test_session_of_another_type_is_its_text(given: Any, expected: str) -> None:
    """A number, such as a database key, is a session too."""
    assert intake().session_of({"session_id": given}) == expected


def test_session_field_can_be_named() -> None:
    """`session_id_field` is looked for in the event and in structlog's contextvars."""
    taken = intake(session_id_field="conversation")
    assert taken.session_of({"session_id": "no", "conversation": "yes"}) == "yes"
    structlog.contextvars.bind_contextvars(conversation="bound")
    assert taken.session_of({"session_id": "no"}) == "bound"


def test_snapshot_is_the_encoded_event() -> None:
    """Session, type, id, time and JSON object are fixed when the call is made."""
    found = encoded(intake().snapshot({"type": "a", "n": 1}, "s", 1.5))
    assert found[:2] == ("s", "a")
    assert re.fullmatch(r"[0-9a-f]{20}-[0-9a-f]+", found.id)
    assert found.timestamp == "1970-01-01T00:00:01.500000+00:00"
    assert found.body == b'{"type":"a","n":1,"session_id":"s"}'


@pytest.mark.parametrize(("fields", "kind"), [({}, "event"), ({"type": 7}, "7")])
def test_type_is_text(fields: dict[str, Any], kind: str) -> None:
    """An event without a type is routed as `event`, and any type as its text."""
    found = encoded(intake().snapshot(fields, None, 0.0))
    assert found.type == kind


def record(**extra: Any) -> logging.LogRecord:
    """Return a record with some extras."""
    return logging.makeLogRecord({"msg": "hello %s", "args": ("you",), "n": 1, **extra})


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({"session_id": "s"}, {}),
        ({"session_id": ""}, {}),
        ({"session_id": "s", "event_type": "step"}, {}),
        ({"conversation": "yes"}, {"session_id_field": "conversation"}),
        ({}, {"session_id_field": "threadName"}),
    ],
)
def test_the_short_way_of_a_record_leads_where_the_long_one_does(
    extra: dict[str, Any], options: dict[str, Any]
) -> None:
    """A usual record is the same event, without what the long way asks for other ones."""
    taken, given = intake(**options), record(**extra)
    session_id = getattr(given, taken.session_field, None)
    long = taken.snapshot(record_fields(given), session_id, given.created)
    short = usual_event(given, taken.session_field)
    assert short is not None
    assert event_of(*short)._replace(id="") == encoded(long)._replace(id="")


def test_the_short_way_knows_the_bound_session() -> None:
    """A record without a session is the bound one's, also on the short way."""
    with session_context("bound"):
        short = usual_event(record(), "session_id")
    assert short is not None
    found = event_of(*short)
    assert (found.session_id, orjson.loads(found.body)["session_id"]) == ("bound", "bound")


def test_the_short_way_knows_no_session() -> None:
    """What to do with a record that has none is the long way's to decide."""
    assert usual_event(record(), "session_id") is None


def test_the_short_way_adds_no_fields() -> None:
    """Bound fields are the long way's."""
    with session_context("s", agent="a"):
        assert usual_event(record(session_id="s"), "session_id") is None


def test_unknown_session_is_not_added() -> None:
    """An event without a session gets no such field."""
    assert body(intake(), {"type": "a"}) == {"type": "a"}


def test_session_is_not_added_where_a_formatter_has_decided() -> None:
    """`complete=False` leaves the fields as a formatter has made them."""
    found = encoded(intake().snapshot({"type": "a"}, "s", 0.0, complete=False))
    assert (found.session_id, found.body) == ("s", b'{"type":"a"}')


def test_session_of_the_event_is_not_replaced() -> None:
    """The field keeps its type; only a missing one is added."""
    assert body(intake(), {"session_id": 7}, "7") == {"session_id": 7}


def test_bound_fields_are_added_and_hide_nothing() -> None:
    """Fields of session_context are in each event that has none of that name."""
    with session_context("s", user="ann", type="never"):
        assert body(intake(), {"type": "a"}, "s") == {"type": "a", "user": "ann", "session_id": "s"}


def test_captured_event_is_what_would_be_written() -> None:
    """`capture_events` collects the event as it would stand in the file."""
    with capture_events() as events:
        intake(processors=[redact_keys("key")]).snapshot({"key": 1, "tags": {2}}, "s", 0.0)
    assert events == [{"key": "[redacted]", "tags": [2], "session_id": "s"}]


def test_processors_run_in_order() -> None:
    """Each gets what the one before returned."""

    def first(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "seen": ["first"]}

    def second(fields: dict[str, Any]) -> dict[str, Any]:
        fields["seen"].append("second")
        return fields

    assert body(intake(processors=[first, second]), {}) == {"seen": ["first", "second"]}


def test_processor_gets_a_copy_of_json_types() -> None:
    """A processor cannot change the application's objects, and meets no others than JSON's."""
    inner = {"set": {1}}

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        fields["inner"]["set"].append(2)
        return fields

    assert body(intake(processors=[change]), {"inner": inner}) == {"inner": {"set": [1, 2]}}
    assert inner == {"set": {1}}


def test_processor_may_decide_the_type() -> None:
    """The type that transports route by is the processed one."""

    def rename(fields: dict[str, Any]) -> Mapping[str, Any]:
        return {**fields, "type": "renamed"}

    found = encoded(intake(processors=[rename]).snapshot({"type": "a"}, None, 0.0))
    assert found.type == "renamed"


def test_processor_may_drop_an_event() -> None:
    """Structlog's DropEvent leaves the event out, and that is counted, not told."""
    told: Told = []
    report = Report(lambda error, context: told.append((error, context)))

    def drop(fields: dict[str, Any]) -> dict[str, Any]:
        raise structlog.DropEvent

    assert Intake(resolve({"processors": [drop]}), report).snapshot({}, "s", 0.0) is None
    assert dict(report.dropped) == {"filtered": 1}
    assert told == []


def failing(fields: dict[str, Any]) -> dict[str, Any]:
    """Fail, as a processor with a bug does."""
    raise KeyError("bug")


def test_failed_processor_withholds_what_it_was_to_hide() -> None:
    """Of the event only type and session are written, and that there was one."""
    fields = {"type": "a", "session_id": "s", "password": "hunter2"}
    assert body(intake(processors=[failing]), fields) == {
        "type": "a",
        "session_id": "s",
        "message": "<withheld: processor failing failed>",
    }


def test_failed_processor_is_told_with_its_cause() -> None:
    """The error handler hears which processor failed, and how."""
    told: Told = []
    body(intake(told, processors=[failing]), {})
    ((error, context),) = told
    assert (type(error), str(error)) == (SerializationError, "processor failing: KeyError: 'bug'")
    assert isinstance(error.__cause__, KeyError)
    assert context == "processor"


def test_processor_that_returns_no_fields_has_failed() -> None:
    """A forgotten `return` is a failure, not an empty event."""
    told: Told = []

    def forgetful(fields: dict[str, Any]) -> Any:
        fields["a"] = 1

    name = forgetful.__qualname__
    found = body(intake(told, processors=[forgetful]), {})
    assert found["message"] == f"<withheld: processor {name} failed>"
    assert str(told[0][0]) == (
        f"processor {name}: TypeError: it returned a NoneType, not the event's fields"
    )


def test_processor_without_a_name_is_told_by_its_class() -> None:
    """A partial has no name of its own."""
    found = body(intake(processors=[functools.partial(failing)]), {})
    assert found["message"] == "<withheld: processor partial failed>"


def test_later_settings_count_from_then_on() -> None:
    """`use_settings` changes the processors of the next event."""
    taken = intake()
    taken.use_settings(resolve({"processors": [redact_keys("a")]}))
    assert body(taken, {"a": 1}) == {"a": "[redacted]"}


@pytest.mark.anyio
async def test_gateway_writes_no_system_prompt_where_it_is_not_wanted(base: Path) -> None:
    """`include_system_prompt=False` keeps events and fields of that name out of the file."""
    async with EventSessionLogger(base, include_system_prompt=False) as gateway:
        assert await gateway({"type": "system_prompt", "session_id": "s", "text": "x"}) is False
        assert await gateway({"type": "a", "session_id": "s", "data": {"system_prompt": "x"}})
        assert gateway.stats().dropped == {"filtered": 1}
    assert events_of(base) == [{"type": "a", "session_id": "s", "data": {}}]


@pytest.mark.anyio
async def test_gateway_writes_the_system_prompt_by_default(base: Path) -> None:
    """Without that option the system prompt is an event like others."""
    event = {"type": "system_prompt", "session_id": "s", "system_prompt": "x"}
    async with EventSessionLogger(base) as gateway:
        assert await gateway(event) is True
    assert events_of(base) == [event]


def test_processors_never_see_a_system_prompt_that_is_not_wanted() -> None:
    """The prompt is dropped before the application's own processors run."""
    seen: list[dict[str, Any]] = []

    def look(fields: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(fields))
        return fields

    body(intake(include_system_prompt=False, processors=[look]), {"a": 1, "system_prompt": "x"})
    assert seen == [{"a": 1}]


def test_prompt_is_dropped_at_any_depth() -> None:
    """A field of that name goes with its value, wherever it stands."""
    fields = {"type": "a", "list": [{"system_prompt": 1, "b": 2}], "system_prompt": {"c": 3}}
    assert drop_system_prompt(fields) == {"type": "a", "list": [{"b": 2}]}


def test_keys_are_redacted_at_any_depth_and_in_any_case() -> None:
    """The value of a named key is replaced whatever it is; all else stays."""
    redact = redact_keys("password", "API_Key")
    fields = {"Password": {"a": 1}, "list": [{"api_key": [1]}, "password"], "passwords": 2}
    assert redact(fields) == {
        "Password": "[redacted]",
        "list": [{"api_key": "[redacted]"}, "password"],
        "passwords": 2,
    }


def test_redaction_leaves_its_argument_alone() -> None:
    """A processor of ours returns a copy."""
    fields = {"a": {"password": "x"}}
    redact_keys("password")(fields)
    assert fields == {"a": {"password": "x"}}


@pytest.mark.parametrize(("names", "shown"), [((), "()"), (("a", 7), "('a', 7)")])
def test_keys_are_names(names: Any, shown: str) -> None:
    """No name, or one that is no str, is refused with an example."""
    with pytest.raises(TypeError) as caught:
        redact_keys(*names)
    assert str(caught.value) == (
        f"redact_keys takes one or more names, as in redact_keys('password'), not {shown}"
    )


def test_patterns_are_redacted_in_any_text() -> None:
    """Each match in a value is replaced; keys, numbers and other text stay."""
    redact = redact_patterns(r"sk-\w+", re.compile("SECRET", re.IGNORECASE))
    fields = {"sk-key": "use sk-abc now", "list": ["a secret sk-1", 7, None], "n": {"t": "fine"}}
    assert redact(fields) == {
        "sk-key": "use [redacted] now",
        "list": ["a [redacted] [redacted]", 7, None],
        "n": {"t": "fine"},
    }


def test_patterns_are_needed() -> None:
    """No regex is refused with an example."""
    with pytest.raises(TypeError) as caught:
        redact_patterns()
    assert str(caught.value) == (
        r"redact_patterns takes one or more regexes, as in redact_patterns(r'sk-\w+')"
    )


def test_pattern_that_cannot_be_compiled_is_named() -> None:
    """The message has the regex and what is wrong with it."""
    with pytest.raises(ValueError, match="redact_patterns") as caught:
        redact_patterns("fine", "(")
    assert str(caught.value) == (
        "redact_patterns cannot compile '(': missing ), unterminated subpattern at position 0"
    )


@pytest.mark.parametrize("regex", [b"sk-", re.compile(b"sk-"), 7])
def test_pattern_that_is_no_text_is_refused_at_once(regex: Any) -> None:
    """A regex of bytes would fail at each event; it is refused when it is given, by name."""
    with pytest.raises((TypeError, ValueError), match="redact_patterns"):
        redact_patterns(regex)
