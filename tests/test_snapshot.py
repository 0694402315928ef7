"""What was logged becomes the fields of an event, and a line becomes a record again."""

from __future__ import annotations

import enum
import logging
import sys
from collections import namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attrs
import orjson
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler._encode import encode
from eventlog_handler._payload import event_of
from eventlog_handler._snapshot import (
    as_record,
    event_fields,
    json_object,
    record_fields,
    structlog_fields,
    usual_event,
)
from eventlog_handler.typing import EventFields


@dataclass
class Call:
    tool: str
    type: str = "tool_call"


@dataclass
class Plain:
    tool: str


@attrs.define
class Attrs:
    tool: str


class Model(pydantic.BaseModel):
    tool: str


Named = namedtuple("Named", ["tool"])


class Color(enum.Enum):
    RED = "red"


class UnreadableError(Exception):
    """Has a text that raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def record(message: Any = "hello %s", *args: Any, **attributes: Any) -> logging.LogRecord:
    """Return a record as a logger makes it, with these attributes on top."""
    made = logging.LogRecord("app.chat", logging.INFO, "chat.py", 1, message, args, None)
    made.__dict__.update(attributes)
    return made


def raised(error: BaseException) -> Any:
    """Return what `sys.exc_info()` is where `error` is handled."""
    try:
        raise error
    except BaseException:
        return sys.exc_info()


def test_record_is_a_log_event() -> None:
    """A plain record has type, session, level, logger and the message with its arguments."""
    assert record_fields(record("hello %s", "world")) == {
        "type": "log",
        "session_id": None,
        "level": "INFO",
        "logger": "app.chat",
        "message": "hello world",
    }


def test_extras_are_fields() -> None:
    """All that `extra=` gave is in the event, in its own type."""
    found = record_fields(record("hi", session_id="s", tokens=3, tags={"a"}))
    assert (found["session_id"], found["tokens"], found["tags"]) == ("s", 3, {"a"})


def test_attributes_of_the_interpreter_are_no_extras() -> None:
    """What logging, its formatters and structlog put on a record is not in the event."""
    found = record_fields(record("hi", taskName="Task-1", asctime="now", _logger=1))
    assert list(found) == ["type", "session_id", "level", "logger", "message"]


@pytest.mark.parametrize("name", ["event_type", "type"])
def test_type_comes_from_an_extra(name: str) -> None:
    """`event_type` or `type` is the event's type, and no field of its own."""
    found = record_fields(record("hi", **{name: "tool_call"}))
    assert found["type"] == "tool_call"
    assert "event_type" not in found


def test_event_type_beats_type() -> None:
    """Where both are given, `event_type` is the event's type."""
    assert record_fields(record("hi", event_type="tool_call", type="x"))["type"] == "tool_call"


def test_extra_does_not_hide_what_the_record_says() -> None:
    """An extra of the name of a field of ours is kept beside it, with an underscore."""
    found = record_fields(record("hi", level="verbose", logger="mine"))
    assert (found["level"], found["level_"]) == ("INFO", "verbose")
    assert (found["logger"], found["logger_"]) == ("app.chat", "mine")


def test_extra_that_says_the_same_is_not_told_twice() -> None:
    """A `level` that differs in case alone is not kept beside the record's."""
    found = record_fields(record("hi", level="info"))
    assert found["level"] == "INFO"
    assert "level_" not in found


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just([1, {"a": 2}])
NAMES = st.sampled_from(
    [
        "user",
        "session_id",
        "n",
        "type",
        "event_type",
        "level",
        "logger",
        "message",
        "asctime",
        "exception",
        "exc_info",
        "exc_text",
        "stack_info",
        "taskName",
        "_name",
        "process",
    ]
)
WORDS = st.tuples(st.text(max_size=9), st.just(())) | st.tuples(
    st.sampled_from(["%s", "%d of %s", "100%", "%(a)s"]),
    st.sampled_from([(), ("one",), (1, "two"), {"a": 1}]),
)


@given(WORDS, st.dictionaries(NAMES, VALUES, max_size=5))
@settings(max_examples=2000)
def test_usual_event_is_that_of_the_record(words: tuple[str, Any], extras: dict[str, Any]) -> None:
    """The short way leads where the long one does, to the byte, or nowhere."""
    message, args = words
    if isinstance(extras.get("exc_info"), (list, str, int)) and extras["exc_info"]:
        extras["exc_info"] = (ValueError, ValueError("odd"), None)
    given_record = logging.makeLogRecord(
        {"msg": message, "args": args, **extras, "session_id": "s1"}
    )
    try:
        found = usual_event(given_record, "session_id")
    except (TypeError, ValueError, KeyError):
        # Arguments that do not fit; `Feed.put_record` goes the long way then.
        return
    if found is not None:
        fields = record_fields(given_record)
        assert list(fields)[:5] == ["type", "session_id", "level", "logger", "message"]
        event = event_of(*found)
        assert (event.session_id, event.type) == ("s1", fields["type"])
        assert (event.seconds, event.body) == (given_record.created, encode(fields))


def test_most_records_are_usual() -> None:
    """A message with arguments, extras and a type of its own is read the short way."""
    given_record = record("hello %s", "you", session_id="s1", event_type="step", n=1)
    found = usual_event(given_record, "session_id")
    assert found is not None
    assert event_of(*found).body == encode(record_fields(given_record))


def test_a_value_that_json_has_no_word_for_is_usual() -> None:
    """It is replaced as on the long way."""
    given_record = record("hello", session_id="s1", tags={2})
    found = usual_event(given_record, "session_id")
    assert found is not None
    assert orjson.loads(event_of(*found).body)["tags"] == [2]


def test_record_that_was_formatted_before_is_usual() -> None:
    """What another handler's formatter has set on a record costs it the short way no more."""
    given_record = record(n=1, session_id="s1")
    logging.Formatter("%(asctime)s %(message)s").format(given_record)
    found = usual_event(given_record, "session_id")
    assert found is not None
    assert event_of(*found).body == encode(record_fields(given_record))


@pytest.mark.parametrize(
    "odd",
    [
        {"exc_text": "Traceback …"},
        {"stack_info": "Stack …"},
        {"exc_info": (ValueError, ValueError("x"), None)},
        {"type": "step"},
        {"level": "high"},
        {"msg": {"type": "step"}},
        {"created": float("nan")},
        {"created": -1.0},
        {"created": "today"},
        {"session_id": 7},
        {"session_id": None},
        {"event_type": 7},
    ],
)
def test_other_records_are_not_usual(odd: dict[str, Any]) -> None:
    """Whatever asks for more than copying goes the long way."""
    given_record = logging.makeLogRecord({"msg": "m", "session_id": "s1", **odd})
    assert usual_event(given_record, "session_id") is None


def test_record_whose_attributes_are_out_of_order_is_not_usual() -> None:
    """Where a standard attribute was taken away and put back, extras cannot be told by place."""
    odd = record(n=1, session_id="s1")
    name = odd.__dict__.pop("name")
    odd.name = name
    assert usual_event(odd, "session_id") is None
    assert record_fields(odd)["n"] == 1


def test_record_that_says_another_session_is_not_usual() -> None:
    """An extra `session_id` beside the field that tells the session is kept as it is."""
    odd = record(session_id="a", conversation="b")
    assert usual_event(odd, "conversation") is None


def test_record_of_a_class_of_its_own_is_not_usual() -> None:
    """A record class may format its message in another way (`{}`), and is asked to."""

    class Braces(logging.LogRecord):
        def getMessage(self) -> str:  # noqa: N802
            return str(self.msg).format(*(self.args or ()))

    odd = Braces("n", 20, "p", 1, "hello {}", ("you",), None)
    odd.session_id = "s1"
    assert usual_event(odd, "session_id") is None
    assert record_fields(odd)["message"] == "hello you"


def test_exception_is_told_with_type_message_and_traceback() -> None:
    """`exc_info` becomes an object with the traceback as text."""
    found = record_fields(record("hi", exc_info=raised(ValueError("wrong"))))["exception"]
    assert (found["type"], found["message"]) == ("ValueError", "wrong")
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    assert found["traceback"].endswith("ValueError: wrong")


def test_exception_type_is_its_qualified_name() -> None:
    """A nested exception class is told with the class around it."""

    class LocalError(Exception):
        pass

    found = record_fields(record("hi", exc_info=raised(LocalError())))["exception"]
    assert found["type"] == "test_exception_type_is_its_qualified_name.<locals>.LocalError"


def test_extra_named_exception_is_kept_beside_the_real_one() -> None:
    """`extra={"exception": …}` together with `exc_info` loses neither."""
    found = record_fields(record("hi", exception="mine", exc_info=raised(ValueError("wrong"))))
    assert found["exception"]["message"] == "wrong"
    assert found["exception_"] == "mine"


def test_exception_without_a_text_is_told() -> None:
    """An exception whose `__str__` raises costs nothing but its own text."""
    found = record_fields(record("hi", exc_info=raised(UnreadableError())))["exception"]
    assert found["type"] == "UnreadableError"
    assert found["message"] == "UnreadableError()"


def test_traceback_that_cannot_be_formatted_is_told() -> None:
    """An exception on which `traceback` itself fails still has its type and message."""

    class UnprintableError(Exception):
        @property
        def __cause__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("no cause")

    found = record_fields(record("hi", exc_info=raised(UnprintableError("x"))))["exception"]
    assert found["message"] == "x"
    assert found["traceback"] == "<RuntimeError while the traceback was formatted>"


def test_exc_info_of_nothing_is_no_exception() -> None:
    """`exc_info=True` where nothing is handled leaves null."""
    assert record_fields(record("hi", exc_info=(None, None, None)))["exception"] is None


def test_text_of_an_exception_is_kept_where_only_that_is_left() -> None:
    """A record that crossed a queue has the traceback's text and no more."""
    found = record_fields(record("hi", exc_text="Traceback …"))
    assert found["exception"] == {"type": None, "message": None, "traceback": "Traceback …"}


def test_stack_is_told() -> None:
    """`stack_info=True` puts the stack's text into the event."""
    assert record_fields(record("hi", stack_info="Stack …"))["stack_info"] == "Stack …"


def test_arguments_that_do_not_fit_lose_no_message() -> None:
    """Where message and arguments do not match, both are told, and what went wrong."""
    assert record_fields(record("%d and %d", 1))["message"] == (
        "%d and %d (1,) <TypeError: not enough arguments for format string>"
    )


@pytest.mark.parametrize("message", [7, None, ["a"], ValueError("wrong")])
def test_message_without_fields_is_taken_as_text(message: Any) -> None:
    """An object without fields is logged as `str()` has it."""
    assert record_fields(record(message))["message"] == str(message)


@pytest.mark.parametrize(
    "message", [{"tool": "x"}, MappingProxyType({"tool": "x"}), Plain("x"), Attrs("x"), Named("x")]
)
def test_message_with_fields_is_the_event(message: Any) -> None:
    """A mapping, dataclass, attrs object or named tuple gets what a record has beside it."""
    assert record_fields(record(message, session_id="s")) == {
        "tool": "x",
        "type": "log",
        "level": "INFO",
        "logger": "app.chat",
        "session_id": "s",
    }


def test_model_as_message_is_the_event() -> None:
    """A pydantic model is dumped."""
    assert record_fields(record(Model(tool="x")))["tool"] == "x"


def test_message_keeps_its_own_fields() -> None:
    """What a mapping says of type, level and logger stays, and the mapping is not changed."""
    message = {"type": "tool_call", "level": "loud", "logger": "mine"}
    assert record_fields(record(message, exc_text="t")) == {
        **message,
        "exception": {"type": None, "message": None, "traceback": "t"},
    }
    assert list(message) == ["type", "level", "logger"]


def test_message_keeps_its_own_exception() -> None:
    """A mapping's `exception` is not lost to the record's."""
    found = record_fields(record({"exception": "mine"}, exc_info=raised(ValueError("wrong"))))
    assert "mine" in found.values()


def test_extra_fills_a_field_that_a_message_has_empty() -> None:
    """A mapping's `message` of None gives way to an extra."""
    found = record_fields(record({"exception": None}, exception="text"))
    assert found["exception"] == "text"


def test_record_of_structlog_is_read_as_structlog_would() -> None:
    """A record that `wrap_for_formatter` made holds an event dict, whose event is the message."""
    found = record_fields(record({"event": "hi", "user": "ann"}, _name="warn", _logger=None))
    assert found == {
        "type": "log",
        "session_id": None,
        "level": "warning",
        "logger": "app.chat",
        "message": "hi",
        "user": "ann",
    }


def test_event_dict_is_an_event() -> None:
    """The `event` key is the message, the rest stays, and the dict is not changed."""
    event_dict = {"event": "hi", "user": "ann", "session_id": "s"}
    assert structlog_fields(event_dict, "info", "app") == {
        "type": "log",
        "session_id": "s",
        "level": "info",
        "logger": "app",
        "message": "hi",
        "user": "ann",
    }
    assert event_dict == {"event": "hi", "user": "ann", "session_id": "s"}


@pytest.mark.parametrize(
    ("method", "level"),
    [
        ("debug", "debug"),
        ("warn", "warning"),
        ("exception", "error"),
        ("msg", "info"),
        ("critical", "critical"),
    ],
)
def test_level_is_what_the_method_stands_for(method: str, level: str) -> None:
    """Structlog's aliases are told by the level's own name."""
    assert structlog_fields({"event": "x"}, method, None)["level"] == level


def test_level_of_a_processor_wins() -> None:
    """What `add_log_level` or `add_logger_name` has added is kept."""
    found = structlog_fields({"event": "x", "level": "notice", "logger": "a"}, "info", "b")
    assert (found["level"], found["logger"]) == ("notice", "a")


def test_logger_without_a_name_is_left_out() -> None:
    """A logger that has no name, such as a print logger, is not told."""
    assert "logger" not in structlog_fields({"event": "x"}, "info", None)


def test_event_type_is_the_type() -> None:
    """`event_type` becomes the type, and `type` alone stays it."""
    assert structlog_fields({"event_type": "a", "type": "b"}, "info", None)["type"] == "a"
    assert structlog_fields({"type": "b"}, "info", None)["type"] == "b"
    assert "event_type" not in structlog_fields({"event_type": "a"}, "info", None)


def test_event_dict_loses_no_text_to_a_field_named_message() -> None:
    """`log.info("hello", message="x")` keeps both."""
    found = structlog_fields({"event": "hello", "message": "x"}, "info", None)
    assert found["message"] == "hello"
    assert "x" in found.values()


def test_event_dict_without_an_event_has_no_message() -> None:
    """`log.info(user="ann")` has a message of None."""
    assert structlog_fields({"user": "ann"}, "info", None)["message"] is None


def test_internal_keys_of_structlog_are_left_out() -> None:
    """What structlog passes to its own processors is not in the event."""
    internal = {"_record": 1, "_from_structlog": True, "_logger": 2, "_name": "info"}
    found = structlog_fields({"event": "x", **internal}, "info", None)
    assert list(found) == ["type", "session_id", "level", "message"]


@pytest.mark.parametrize("kind", ["exception", "tuple", "true"])
def test_exc_info_of_structlog_is_an_exception(kind: str) -> None:
    """An exception, its triple, and True inside an except block all tell of it."""
    try:
        raise ValueError("wrong")
    except ValueError as error:
        given = {"exception": error, "tuple": sys.exc_info(), "true": True}[kind]
        found = structlog_fields({"event": "x", "exc_info": given}, "error", None)
    assert found["exception"]["type"] == "ValueError"
    assert found["exception"]["message"] == "wrong"
    assert found["exception"]["traceback"].endswith("ValueError: wrong")
    assert "exc_info" not in found


@pytest.mark.parametrize("given", [True, False, None, (None, None, None), ()])
def test_exc_info_of_nothing_adds_no_exception(given: Any) -> None:
    """Where nothing was raised there is no `exception`."""
    assert "exception" not in structlog_fields({"event": "x", "exc_info": given}, "error", None)


def test_exc_info_false_hides_what_is_handled() -> None:
    """`exc_info=False` inside an except block tells of nothing."""
    try:
        raise ValueError("wrong")
    except ValueError:
        found = structlog_fields({"event": "x", "exc_info": False}, "error", None)
    assert "exception" not in found


@pytest.mark.parametrize("text", ['{"a": 1}', b'{"a": 1}', ' \n\t{"a": 1} '])
def test_json_object_is_loaded(text: str | bytes) -> None:
    """Text or bytes that hold a JSON object are that object."""
    assert json_object(text) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["", "hello", "[1]", '"a"', "1", "null", "{", "{a: 1}", b"{\xff}", "{\ud800", b""]
)
def test_text_that_is_no_json_object_is_none(text: str | bytes) -> None:
    """Other JSON, broken JSON and plain text are no object."""
    assert json_object(text) is None


class Thing:
    def __init__(self) -> None:
        self.size = 1
        self._secret = 2


class Typed:
    __slots__ = ("type",)

    def __init__(self) -> None:
        self.type = "own"


THING = object()


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"a": 1}, {"a": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        ('{"a": 1}', {"a": 1}),
        (b'{"a": 1}', {"a": 1}),
        (Call("x"), {"tool": "x", "type": "tool_call"}),
        (Plain("x"), {"tool": "x", "type": "Plain"}),
        (Attrs("x"), {"tool": "x", "type": "Attrs"}),
        (Model(tool="x"), {"tool": "x", "type": "Model"}),
        (Named("x"), {"tool": "x", "type": "Named"}),
        (Thing(), {"type": "Thing", "size": 1}),
        (Typed(), {"type": "own"}),
        (SimpleNamespace(a=1), {"type": "SimpleNamespace", "a": 1}),
        ("hello", {"type": "message", "message": "hello"}),
        (b"hello", {"type": "message", "message": b"hello"}),
        ("[1]", {"type": "message", "message": "[1]"}),
        (7, {"type": "message", "message": 7}),
        (None, {"type": "message", "message": None}),
        ([1], {"type": "message", "message": [1]}),
        (Color.RED, {"type": "message", "message": Color.RED}),
        (THING, {"type": "message", "message": THING}),
        (Thing, {"type": "message", "message": Thing}),
        (len, {"type": "message", "message": len}),
    ],
)
def test_anything_is_an_event(event: Any, expected: EventFields) -> None:
    """What has fields keeps them; all else is the message of an event."""
    assert event_fields(event) == expected


def test_event_is_a_copy() -> None:
    """The caller's own dict is not the event, which will be changed."""
    event = {"a": 1}
    assert event_fields(event) is not event


def test_exception_is_an_event_of_its_own_type() -> None:
    """An exception that is handed over is told with its traceback."""
    _, error, _ = raised(ValueError("wrong"))
    found = event_fields(error)
    assert list(found) == ["type", "exception"]
    assert found["type"] == "exception"
    assert found["exception"]["type"] == "ValueError"
    assert "in raised" in found["exception"]["traceback"]


def line(**event: Any) -> EventFields:
    """Return a session file's line with this event."""
    return {"timestamp": "2026-11-22T06:31:56.123456+00:00", "id": "a-1", "seq": 7, "event": event}


def test_line_is_a_record_again() -> None:
    """Level, logger, message, extras, id and number of a line are a record's attributes."""
    found = as_record(
        line(type="log", level="warning", logger="app", message="100 %", user="ann", stack_info="S")
    )
    assert (found.levelname, found.levelno, found.name) == ("WARNING", 30, "app")
    assert found.getMessage() == "100 %"
    assert (found.stack_info, found.exc_text, found.exc_info) == ("S", None, None)
    extras = {k: found.__dict__[k] for k in ("type", "user", "event_id", "seq")}
    assert extras == {"type": "log", "user": "ann", "event_id": "a-1", "seq": 7}


def test_record_has_the_time_of_the_call() -> None:
    """A formatter shows when the event was logged, not when it was written."""
    found = as_record(line(message="x"))
    assert (found.created, found.msecs) == (1795329116.123456, 123)


@pytest.mark.parametrize(
    ("level", "name", "number"),
    [
        ("DEBUG", "DEBUG", 10),
        ("info", "INFO", 20),
        ("Error", "ERROR", 40),
        ("critical", "CRITICAL", 50),
        ("notice", "NOTICE", 20),
    ],
)
def test_record_has_a_level_number(level: str, name: str, number: int) -> None:
    """A level that logging does not know counts as INFO, under its own name."""
    found = as_record(line(level=level))
    assert (found.levelname, found.levelno) == (name, number)


def test_event_without_a_message_is_the_message() -> None:
    """An event that is no log record is shown as a whole, at INFO, from the root logger."""
    found = as_record(line(type="tool_call", tool="x"))
    assert found.msg == {"type": "tool_call", "tool": "x"}
    assert (found.name, found.levelname) == ("root", "INFO")


def test_record_has_the_text_of_the_exception() -> None:
    """A formatter appends the traceback as it would have at first."""
    found = as_record(line(message="x", exception={"type": "E", "traceback": "Traceback …"}))
    assert logging.Formatter().format(found) == "x\nTraceback …"


def test_exception_that_is_no_object_is_an_extra() -> None:
    """An application's own `exception` field is no traceback."""
    found = as_record(line(message="x", exception="mine"))
    assert found.exc_text is None
    assert found.__dict__["exception"] == "mine"


def test_field_with_a_name_of_logging_does_not_break_the_record() -> None:
    """An event's `args` or `created` are not taken for the record's."""
    found = as_record(line(message="%s", args=[1], created="never"))
    assert (found.getMessage(), found.created) == ("%s", 1795329116.123456)
