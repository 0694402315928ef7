"""EventLogHandler as users of `logging` meet it."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import logging.config
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pythonjsonlogger.orjson import OrjsonFormatter

from eventlog_handler import (
    EventLogHandler,
    EventSessionLogger,
    LoggingTransport,
    SessionEvent,
    _context,
    redact_keys,
    redact_patterns,
    session_context,
)
from eventlog_handler.testing import RecordingTransport
from tests.conftest import events_of, lines_of

Make = Callable[..., EventLogHandler]
S1 = {"session_id": "s1"}


def written(handler: EventLogHandler, session_id: str | None = "s1") -> list[dict[str, Any]]:
    """Return a session's events."""
    handler.flush()
    return [line["event"] for line in lines_of(handler.gateway.get_log_file_path(session_id))]


def test_a_record_becomes_an_event_of_its_session(
    make_handler: Make, logger: logging.Logger
) -> None:
    """Type, session, level, logger, message and extras stand in the session's file."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.info("hello %s", "world", extra={"session_id": "s1", "event_type": "greeting", "n": 1})
    assert written(handler) == [
        {
            "type": "greeting",
            "session_id": "s1",
            "level": "INFO",
            "logger": "tests.app",
            "message": "hello world",
            "n": 1,
        }
    ]


def test_a_line_has_time_id_and_number(make_handler: Make, logger: logging.Logger) -> None:
    """Each line carries a UTC timestamp, an id of its own, and its number within the file."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.info("one", extra=S1)
    logger.info("two", extra=S1)
    handler.flush()
    first, second = lines_of(handler.gateway.get_log_file_path("s1"))
    assert list(first) == ["timestamp", "id", "seq", "event"]
    assert first["timestamp"].endswith("+00:00")
    assert (first["seq"], second["seq"]) == (1, 2)
    assert first["id"] != second["id"]


@pytest.mark.parametrize("formatter", [None, OrjsonFormatter("%(message)s")])
def test_what_is_logged_during_a_delivery_is_left_out(
    make_handler: Make, formatter: logging.Formatter | None
) -> None:
    """A driver's records make no events, also inside a session that a transport has bound."""
    handler = make_handler()
    handler.setFormatter(formatter)

    def deliver() -> None:
        _context.deliver()
        handler.handle(logging.makeLogRecord({"msg": "sending", **S1}))
        with session_context("s1"):
            handler.handle(logging.makeLogRecord({"msg": "still sending", **S1}))

    contextvars.copy_context().run(deliver)
    handler.handle(logging.makeLogRecord({"msg": "said", **S1}))
    assert [each["message"] for each in written(handler)] == ["said"]


def test_the_event_is_a_snapshot(make_handler: Make, logger: logging.Logger) -> None:
    """What is changed after the call is written as it was at the call."""
    handler = make_handler()
    logger.addHandler(handler)
    basket = ["apple"]
    logger.info("basket", extra={**S1, "basket": basket})
    basket.append("pear")
    assert written(handler)[0]["basket"] == ["apple"]


def test_levels_and_filters_apply(make_handler: Make, logger: logging.Logger) -> None:
    """A record below the handler's level, or refused by its filter, is no event."""
    handler = make_handler(level="WARNING")
    handler.addFilter(lambda record: "secret" not in record.getMessage())
    logger.addHandler(handler)
    logger.info("too low", extra=S1)
    logger.warning("secret", extra=S1)
    logger.warning("kept", extra=S1)
    assert [e["message"] for e in written(handler)] == ["kept"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="filters replace records from 3.12 on")
def test_a_filter_may_replace_the_record(make_handler: Make, logger: logging.Logger) -> None:
    """The record that a filter returns is the one that is logged."""
    handler = make_handler()
    other = logging.makeLogRecord({"msg": "other", "session_id": "s1"})
    handler.addFilter(lambda record: other)
    logger.addHandler(handler)
    logger.info("first", extra=S1)
    assert [e["message"] for e in written(handler)] == ["other"]


def test_what_the_filter_method_returns_is_logged(make_handler: Make) -> None:
    """Before 3.12 too, a handler whose `filter` returns a record logs that one."""
    handler = make_handler()
    other = logging.makeLogRecord({"msg": "other", "session_id": "s1"})
    handler.filter = lambda record: other  # type: ignore[method-assign]
    assert handler.handle(logging.makeLogRecord({"msg": "first", "session_id": "s1"}))
    assert [e["message"] for e in written(handler)] == ["other"]


def test_logger_adapter_fields_are_extras(make_handler: Make, logger: logging.Logger) -> None:
    """What a LoggerAdapter adds is in the event."""
    handler = make_handler()
    logger.addHandler(handler)
    logging.LoggerAdapter(logger, {"session_id": "s1", "tenant": "t"}).info("hello")
    assert written(handler)[0]["tenant"] == "t"


def test_exceptions_and_stacks_have_structure(make_handler: Make, logger: logging.Logger) -> None:
    """`exc_info` becomes type, message and traceback; `stack_info` is kept as text."""
    handler = make_handler()
    logger.addHandler(handler)
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("failed", extra=S1, stack_info=True)
    event = written(handler)[0]
    assert event["exception"]["type"] == "ValueError"
    assert event["exception"]["message"] == "wrong"
    assert event["exception"]["traceback"].startswith("Traceback (most recent call last):")
    assert event["stack_info"].startswith("Stack (most recent call last):")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="taskName is new in 3.12")
def test_task_names_are_for_formatters(make_handler: Make, logger: logging.Logger) -> None:
    """A task's name is no field by itself, and there for a formatter that asks for it."""
    handler = make_handler()
    logger.addHandler(handler)

    async def log() -> None:
        logger.info("plain", extra=S1)
        handler.setFormatter(OrjsonFormatter("%(taskName)s %(message)s"))
        logger.info("asked", extra=S1)

    async def main() -> None:
        await asyncio.create_task(log(), name="turn-1")

    asyncio.run(main())
    plain, asked = written(handler)
    assert "taskName" not in plain
    assert asked["taskName"] == "turn-1"


def test_a_mapping_as_message_is_the_event(make_handler: Make, logger: logging.Logger) -> None:
    """A message that is a mapping keeps its fields and gets level and logger."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.warning({"type": "tool_call", "session_id": "s1", "tool": "search"})
    assert written(handler) == [
        {
            "type": "tool_call",
            "session_id": "s1",
            "tool": "search",
            "level": "WARNING",
            "logger": "tests.app",
        }
    ]


def test_an_event_object_as_message_is_the_event(
    make_handler: Make, logger: logging.Logger
) -> None:
    """A SessionEvent logged as a message goes to its own session."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.info(SessionEvent("answer", "s1", role="assistant", data={"text": "hi"}))
    event = written(handler)[0]
    assert (event["type"], event["role"], event["data"]) == ("answer", "assistant", {"text": "hi"})


def test_any_dataclass_as_message_is_the_event(make_handler: Make, logger: logging.Logger) -> None:
    """A dataclass without a session of its own takes the bound one."""

    @dataclasses.dataclass
    class Step:
        number: int

    handler = make_handler()
    logger.addHandler(handler)
    with session_context("s1"):
        logger.info(Step(3))
    assert written(handler)[0]["number"] == 3


def test_the_record_beats_the_context(make_handler: Make, logger: logging.Logger) -> None:
    """A record's own session wins over session_context."""
    handler = make_handler()
    logger.addHandler(handler)
    with session_context("s2"):
        logger.info("mine", extra=S1)
    assert [e["message"] for e in written(handler)] == ["mine"]


def test_events_without_a_session_share_one_directory(
    make_handler: Make, logger: logging.Logger
) -> None:
    """Records without a session go to one directory a gateway."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.info("one")
    logger.info("two")
    assert [e["message"] for e in written(handler, None)] == ["one", "two"]
    assert handler.gateway.get_session_directory(None).name.startswith("unknown_")


def test_events_without_a_session_can_be_ignored(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """`missing_session="ignore"` writes nothing and counts them."""
    handler = make_handler(missing_session="ignore")
    logger.addHandler(handler)
    logger.info("nobody's")
    handler.flush()
    assert events_of(base) == []
    assert handler.stats().dropped == {"no_session": 1}


def test_the_session_field_can_have_another_name(
    make_handler: Make, logger: logging.Logger
) -> None:
    """`session_id_field` names the attribute that tells the session."""
    handler = make_handler(session_id_field="conversation")
    logger.addHandler(handler)
    logger.info("hello", extra={"conversation": "s1"})
    event = written(handler)[0]
    assert (event["conversation"], event["session_id"]) == ("s1", "s1")


def test_a_json_formatter_decides_the_fields(make_handler: Make, logger: logging.Logger) -> None:
    """python-json-logger's options shape the event, and nothing is added."""
    handler = make_handler()
    handler.setFormatter(
        OrjsonFormatter(
            "%(levelname)s %(message)s",
            rename_fields={"levelname": "severity", "session_id": "sid"},
            static_fields={"service": "chat"},
            defaults={"region": "eu"},
            timestamp="at",
        )
    )
    logger.addHandler(handler)
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("failed", extra=S1)
    event = written(handler)[0]
    assert event.pop("at").startswith("20")
    assert event.pop("exc_info").startswith("Traceback")
    assert event == {
        "region": "eu",
        "severity": "ERROR",
        "message": "failed",
        "service": "chat",
        "sid": "s1",
    }


def test_context_fields_reach_a_formatted_event(make_handler: Make, logger: logging.Logger) -> None:
    """session_context's fields are added beside what a formatter decided."""
    handler = make_handler()
    handler.setFormatter(OrjsonFormatter("%(message)s"))
    logger.addHandler(handler)
    with session_context("s1", user="ada"):
        logger.info("hello")
    assert written(handler) == [{"message": "hello", "user": "ada"}]


def test_a_text_formatter_has_no_say(make_handler: Make, logger: logging.Logger) -> None:
    """The formatter that `basicConfig` gives every handler leaves the message alone."""
    handler = make_handler()
    handler.setFormatter(logging.Formatter("%(levelname)s:%(message)s"))
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    assert written(handler)[0]["message"] == "hello"


def test_a_formatter_that_makes_other_json_has_no_say(
    make_handler: Make, logger: logging.Logger
) -> None:
    """A formatter of another class whose text is no JSON object leaves the fields alone."""

    class Upper(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return super().format(record).upper()

    handler = make_handler()
    handler.setFormatter(Upper())
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    assert written(handler)[0]["message"] == "hello"


def test_a_formatter_that_fails_costs_no_event(make_handler: Make, logger: logging.Logger) -> None:
    """Where the formatter raises, the event has the usual fields and the error is told."""

    class Broken(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            raise UnicodeError("surrogates")

    heard: list[str] = []
    handler = make_handler(error_handler=lambda error, context: heard.append(context))
    handler.setFormatter(Broken())
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    assert written(handler)[0]["message"] == "hello"
    assert heard == ["formatter"]


def test_a_custom_format_is_made_by_the_formatter(
    make_handler: Make, logger: logging.Logger
) -> None:
    """With `log_format="custom"` the handler's formatter makes the file's lines."""
    handler = make_handler(log_format="custom")
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s [%(seq)d]"))
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.flush()
    path = handler.gateway.get_log_file_path("s1")
    assert (path.suffix, path.read_text()) == (".log", "INFO tests.app hello [1]\n")


def test_a_custom_format_has_a_default(make_handler: Make, logger: logging.Logger) -> None:
    """Without a formatter a custom file has time, level and message."""
    handler = make_handler(log_format="custom")
    handler.setFormatter(None)
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.flush()
    assert handler.gateway.get_log_file_path("s1").read_text().endswith(" INFO hello\n")


def test_a_shared_gateway_keeps_its_options(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """`gateway=` writes through an existing gateway and refuses options for it."""
    gateway = EventSessionLogger(base)
    handler = make_handler(gateway=gateway)
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    assert written(handler)[0]["message"] == "hello"
    with pytest.raises(TypeError, match=r"gateway= has its own options: give \['log_format'\]"):
        EventLogHandler(gateway=gateway, log_format="json")


def test_two_handlers_of_one_gateway_keep_one_order(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """Handlers that share a gateway share its listener, until the last is closed."""
    gateway = EventSessionLogger(base)
    first, second = make_handler(gateway=gateway), make_handler(gateway=gateway)
    for number in range(100):
        record = logging.makeLogRecord({"msg": number, "session_id": "s1"})
        (first, second)[number % 2].handle(record)
    first.close()
    second.handle(logging.makeLogRecord({"msg": 100, "session_id": "s1"}))
    assert [e["message"] for e in written(second)] == [str(n) for n in range(101)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"durabilty": "memory"}, TypeError, "'durabilty' is not an option: did you mean 'dur"),
        ({"durability": "ram"}, ValueError, "durability='ram' does not exist; write one of 'mem"),
        ({"sync_level": "LOUD"}, ValueError, "sync_level='LOUD' is no level; write 'ERROR'"),
        ({"ring_bytes": 100}, ValueError, "ring_bytes=100 is out of range: write 4096 or more"),
        ({"overflow": "raise"}, ValueError, "overflow='raise' does not exist; write one of 'block"),
        ({"missing_session": "no"}, ValueError, "missing_session='no' does not exist"),
        ({"handoff_capacity": 0}, ValueError, "handoff_capacity=0 is out of range"),
        ({"block_timeout_seconds": -1}, ValueError, "block_timeout_seconds=-1 is out of range"),
        ({"level": "LOUD"}, ValueError, "Unknown level: 'LOUD'"),
    ],
)
def test_bad_options_are_refused_when_configured(
    base: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A wrong option is an error of the constructor that says what to type."""
    with pytest.raises(error, match=message.replace("'", ".")):
        EventLogHandler(**{"log_base_dir": base, **options})


def test_a_refused_handler_leaves_nothing_for_shutdown(base: Path) -> None:
    """A handler whose options were refused is not flushed at exit."""
    before = list(logging._handlerList)
    with pytest.raises(TypeError):
        EventLogHandler(log_base_dir=base, nonsense=1)
    assert logging._handlerList == before


def test_emit_never_raises(make_handler: Make, logger: logging.Logger) -> None:
    """Whatever goes wrong inside is counted and told, and the application goes on."""
    heard: list[str] = []
    handler = make_handler(error_handler=lambda error, context: heard.append(context))
    logger.addHandler(handler)
    handler._feed.put_record = None  # type: ignore[method-assign,assignment]
    logger.info("hello", extra=S1)
    assert heard == ["emit"]
    assert handler.stats().dropped == {"internal_error": 1}


def test_arguments_that_do_not_fit_lose_no_event(make_handler: Make, base: Path) -> None:
    """A message that cannot be formatted is an event with both, and with why."""
    handler = make_handler()
    handler.handle(logging.makeLogRecord({"msg": "%d apples", "args": ("no",), **S1}))
    assert handler.flush()
    [found] = events_of(base)
    assert found["message"].startswith("%d apples ('no',) <TypeError: ")
    assert handler.stats().local_errors == 0


def test_a_transport_that_logs_makes_no_events(make_handler: Make, base: Path) -> None:
    """With our handler on the root logger, what a transport logs does not come back."""
    root = logging.getLogger()
    root.setLevel(logging.DEBUG)
    handler = make_handler(downstream_transport=LoggingTransport())
    root.addHandler(handler)
    logging.getLogger("tests.feedback").info("once", extra=S1)
    handler.close()
    assert [e["message"] for e in events_of(base)] == ["once"]
    assert handler.stats().transports["LoggingTransport"].sent == 1


def test_our_own_loggers_make_no_events(make_handler: Make, base: Path) -> None:
    """Records of loggers below `eventlog_handler` are left out."""
    handler = make_handler()
    handler.handle(logging.makeLogRecord({"name": "eventlog_handler.x", "msg": "m"}))
    handler.flush()
    assert events_of(base) == []


def test_a_callback_gets_the_fields_of_a_record(make_handler: Make, logger: logging.Logger) -> None:
    """A downstream callback is called with a record's event as a dict."""
    seen: list[Any] = []

    async def callback(event: Any) -> None:
        seen.append(event)

    handler = make_handler(downstream_callback=callback)
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.close()
    assert [event["message"] for event in seen] == ["hello"]


def test_what_the_callback_refuses_goes_to_the_transport(
    make_handler: Make, logger: logging.Logger
) -> None:
    """A record's event reaches the transport when the callback fails."""

    async def callback(event: Any) -> None:
        raise ValueError("no")

    transport = RecordingTransport()
    handler = make_handler(
        downstream_callback=callback, downstream_transport=transport, max_retry_attempts=0
    )
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.close()
    assert [event["message"] for event in transport.events] == ["hello"]


def test_processors_get_what_most_records_are(make_handler: Make) -> None:
    """No record is so usual that its way past the processors is shorter."""
    handler = make_handler(processors=[redact_keys("key")])
    handler.handle(logging.makeLogRecord({"msg": "hello", "key": "secret", **S1}))
    [event] = written(handler)
    assert event["key"] != "secret"


def test_processors_redact_before_the_hand_off(make_handler: Make, logger: logging.Logger) -> None:
    """A secret in a message or a traceback is in no file."""
    handler = make_handler(processors=[redact_patterns(r"sk-\w+")])
    logger.addHandler(handler)
    try:
        raise ValueError("key sk-123")
    except ValueError:
        logger.exception("with sk-456", extra=S1)
    handler.flush()
    assert b"sk-" not in handler.gateway.get_log_file_path("s1").read_bytes()


def test_a_record_after_close_is_counted(make_handler: Make, logger: logging.Logger) -> None:
    """After `close()` a record is dropped silently, and counted."""
    handler = make_handler()
    logger.addHandler(handler)
    handler.close()
    handler.close()
    logger.info("late", extra=S1)
    assert handler.stats().dropped == {"closed": 1}


def test_a_record_after_the_gateways_close_is_counted(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """A handler whose shared gateway was closed drops and counts."""
    gateway = EventSessionLogger(base)
    handler = make_handler(gateway=gateway)
    logger.addHandler(handler)
    logger.info("in time", extra=S1)
    asyncio.run(gateway.close())
    logger.info("late", extra=S1)
    assert [e["message"] for e in events_of(base)] == ["in time"]
    assert handler.stats().dropped == {"closed": 1}


def test_a_record_after_the_handlers_own_close_is_counted(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """A handler that was closed takes nothing more, though its shared gateway is open."""
    gateway = EventSessionLogger(base)
    handler, other = make_handler(gateway=gateway), make_handler(gateway=gateway)
    handler.close()
    handler.handle(logging.makeLogRecord({"msg": "late", **S1}))
    other.handle(logging.makeLogRecord({"msg": "in time", **S1}))
    assert [e["message"] for e in written(other)] == ["in time"]
    assert handler.stats().dropped == {"closed": 1}


def test_a_late_record_after_logging_shutdown_is_written(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """`logging.shutdown()` closes the handler; a record that comes later is written at once."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.info("early", extra=S1)
    logging.shutdown()
    logger.info("late", extra=S1)
    assert [e["message"] for e in events_of(base)] == ["early", "late"]


def configuration(base: Path) -> dict[str, Any]:
    """Return a dictConfig with our handler on the test's logger."""
    events = {"class": "eventlog_handler.EventLogHandler", "log_base_dir": str(base)}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"events": events},
        "loggers": {"tests.app": {"level": "INFO", "handlers": ["events"], "propagate": False}},
    }


def test_dict_config_twice_loses_nothing(logger: logging.Logger, base: Path) -> None:
    """What was logged before the second dictConfig, and after it, is all written."""
    logging.config.dictConfig(configuration(base))
    first = logger.handlers[0]
    logger.info("one", extra=S1)
    logging.config.dictConfig(configuration(base))
    logger.info("two", extra=S1)
    logger.handlers[0].close()
    assert logger.handlers[0] is not first
    assert sorted(e["message"] for e in events_of(base)) == ["one", "two"]


def test_logging_yaml_works_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shipped logging.yaml writes the session's file and forwards the line."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "logging.yaml").read_text()
    logging.config.dictConfig(yaml.safe_load(text))
    logging.getLogger("tests.yaml").info("hello", extra=S1)
    handler = logging.getHandlerByName("events") if sys.version_info >= (3, 12) else None
    handler = handler or logging.getLogger().handlers[-1]
    assert isinstance(handler, EventLogHandler)
    handler.close()
    for name in ("event_transport",):
        logging.getLogger(name).handlers.clear()
    assert [e["message"] for e in events_of(tmp_path / "logs" / "sessions")] == ["hello"]
    assert "Transport event: " in capfd.readouterr().err


def test_names_of_loggers_do_not_pile_up(make_handler: Make) -> None:
    """A name for each call costs no memory, and a record of any name is written."""
    handler = make_handler()
    for number in range(2500):
        handler.handle(
            logging.makeLogRecord({"msg": "m", "name": f"n{number}", "session_id": "s1"})
        )
    handler.handle(logging.makeLogRecord({"msg": "m", "name": ["odd"], "session_id": "s1"}))
    assert len(_context.silenced) <= 1000
    assert len(written(handler)) == 2501


@pytest.mark.parametrize("before", [(), ("first",), ("session_id", "first")])
def test_standard_attributes_may_stand_in_any_order(
    make_handler: Make, before: tuple[str, ...]
) -> None:
    """Who takes an attribute of a record away and puts it back costs it none of its extras."""
    handler = make_handler()
    record = logging.makeLogRecord({"msg": "m", "session_id": "s1", "first": 1, "last": 2})
    held = {name: record.__dict__.pop(name) for name in (*before, "created")}
    others = dict(record.__dict__)
    record.__dict__.clear()
    record.__dict__.update({name: held.pop(name) for name in before} | others | held)
    handler.handle(record)
    [found] = written(handler)
    assert (found["first"], found["last"], found["session_id"]) == (1, 2, "s1")
    assert "created" not in found
