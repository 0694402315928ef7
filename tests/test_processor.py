"""EventLogProcessor, and structlog through standard logging."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from eventlog_handler import EventLogHandler, EventLogProcessor, EventSessionLogger, _context
from eventlog_handler.testing import capture_events
from tests.conftest import events_of

Make = Callable[..., EventLogHandler]


@pytest.fixture
def processor(base: Path) -> Iterator[EventLogProcessor]:
    """A processor that passes events on."""
    made = EventLogProcessor(log_base_dir=base)
    yield made
    made.close()


def through_logging(*processors: Any) -> None:
    """Configure structlog in front of the test's standard logger."""
    structlog.configure(
        processors=list(processors),
        logger_factory=lambda *args: logging.getLogger("tests.app"),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def test_an_event_dict_becomes_an_event(processor: EventLogProcessor, base: Path) -> None:
    """The `event` key is the message, the method is the level, the rest stays."""
    structlog.configure(processors=[processor, structlog.processors.JSONRenderer()])
    structlog.get_logger().bind(session_id="s1").info("hello", event_type="greeting", n=1)
    processor.flush()
    assert events_of(base) == [
        {"type": "greeting", "session_id": "s1", "level": "info", "message": "hello", "n": 1}
    ]


def test_the_event_dict_passes_unchanged(processor: EventLogProcessor) -> None:
    """The next processor gets the same dict, with the same contents."""
    event_dict = {"event": "hello", "session_id": "s1", "exc_info": False}
    returned = processor(None, "info", event_dict)
    assert returned is event_dict
    assert event_dict == {"event": "hello", "session_id": "s1", "exc_info": False}


def test_the_chain_can_end_here(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `passthrough=False` the event is written and nothing is printed."""
    processor = EventLogProcessor(passthrough=False, log_base_dir=base)
    structlog.configure(processors=[processor, structlog.processors.JSONRenderer()])
    structlog.get_logger().info("hello", session_id="s1")
    processor.close()
    assert [e["message"] for e in events_of(base)] == ["hello"]
    assert capsys.readouterr().out == ""


def test_an_exception_has_structure(processor: EventLogProcessor, base: Path) -> None:
    """`log.exception` gives type, message and traceback, at level error."""
    structlog.configure(processors=[processor, structlog.processors.KeyValueRenderer()])
    try:
        raise ValueError("wrong")
    except ValueError:
        structlog.get_logger().exception("failed", session_id="s1")
    processor.flush()
    event = events_of(base)[0]
    assert event["level"] == "error"
    assert event["exception"]["type"] == "ValueError"
    assert "exc_info" not in event


def test_bound_contextvars_tell_the_session(processor: EventLogProcessor, base: Path) -> None:
    """A session that structlog's contextvars bind is found without `merge_contextvars`."""
    structlog.configure(processors=[processor, structlog.processors.KeyValueRenderer()])
    with structlog.contextvars.bound_contextvars(session_id="s1"):
        structlog.get_logger().info("hello")
    processor.flush()
    assert [e["message"] for e in events_of(base / "s1")] == ["hello"]


def test_a_failing_snapshot_does_not_reach_the_application(processor: EventLogProcessor) -> None:
    """Whatever goes wrong inside is counted, and the event dict goes on."""
    processor._feed.put = None  # type: ignore[method-assign,assignment]
    event_dict = {"event": "hello"}
    assert processor(None, "info", event_dict) is event_dict
    assert processor.stats().dropped == {"internal_error": 1}


def test_after_close_events_pass_and_are_counted(base: Path) -> None:
    """A closed processor is still a tee, without the file."""
    processor = EventLogProcessor(log_base_dir=base)
    processor.close()
    assert processor(None, "info", {"event": "late"}) == {"event": "late"}
    assert processor.stats().dropped == {"closed": 1}


def test_what_is_logged_during_a_delivery_is_left_out(processor: EventLogProcessor) -> None:
    """A transport that uses structlog makes no events about itself."""

    def deliver() -> list[dict[str, Any]]:
        _context.deliver()
        with capture_events() as events:
            processor(None, "info", {"event": "sending"})
        return events

    assert contextvars.copy_context().run(deliver) == []


def test_wrapped_for_a_formatter_is_no_text(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """`wrap_for_formatter` into the handler: bound values are fields, exceptions are structure."""
    handler = make_handler()
    logger.addHandler(handler)
    through_logging(
        structlog.stdlib.add_log_level, structlog.stdlib.ProcessorFormatter.wrap_for_formatter
    )
    try:
        raise ValueError("wrong")
    except ValueError:
        structlog.get_logger().bind(session_id="s1", tenant="t").exception("failed")
    handler.flush()
    event = events_of(base)[0]
    assert event.pop("exception")["message"] == "wrong"
    assert event == {
        "type": "log",
        "session_id": "s1",
        "level": "error",
        "logger": "tests.app",
        "message": "failed",
        "tenant": "t",
    }


def test_log_kwargs_become_fields(make_handler: Make, logger: logging.Logger, base: Path) -> None:
    """`render_to_log_kwargs` into the handler gives the same fields."""
    handler = make_handler()
    logger.addHandler(handler)
    through_logging(structlog.stdlib.add_log_level, structlog.stdlib.render_to_log_kwargs)
    try:
        raise ValueError("wrong")
    except ValueError:
        structlog.get_logger().bind(session_id="s1", tenant="t").exception("failed")
    handler.flush()
    event = events_of(base)[0]
    assert event.pop("exception")["message"] == "wrong"
    assert event == {
        "type": "log",
        "session_id": "s1",
        "level": "ERROR",
        "logger": "tests.app",
        "message": "failed",
        "tenant": "t",
    }


def test_a_processor_formatter_decides_the_fields(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """A `ProcessorFormatter` that renders JSON, on the handler, shapes both kinds of records."""
    handler = make_handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("msg"),
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=["session_id"])],
        )
    )
    logger.addHandler(handler)
    through_logging(structlog.stdlib.ProcessorFormatter.wrap_for_formatter)
    structlog.get_logger().info("bound", session_id="s1")
    logger.info("plain", extra={"session_id": "s1"})
    handler.flush()
    assert events_of(base) == [
        {"msg": "bound", "session_id": "s1"},
        {"msg": "plain", "session_id": "s1"},
    ]


@pytest.mark.parametrize(
    "last",
    [
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        structlog.stdlib.render_to_log_kwargs,
        structlog.processors.JSONRenderer(),
    ],
)
def test_no_event_twice(
    make_handler: Make,
    logger: logging.Logger,
    base: Path,
    processor: EventLogProcessor,
    last: Any,
) -> None:
    """With processor and handler both in the way, an event has one line, and so has a plain one."""
    handler = make_handler()
    logger.addHandler(handler)
    through_logging(processor, last)
    structlog.get_logger().info("bound", session_id="s1")
    logger.info("plain", extra={"session_id": "s1"})
    handler.flush()
    processor.flush()
    assert sorted(e["message"] for e in events_of(base)) == ["bound", "plain"]
    assert _context.teed == {}


def test_another_base_gets_its_own_line(
    make_handler: Make, logger: logging.Logger, base: Path, tmp_path: Path
) -> None:
    """A handler with another base directory is no duplicate."""
    other = tmp_path / "other"
    handler = make_handler(log_base_dir=other)
    logger.addHandler(handler)
    processor = EventLogProcessor(log_base_dir=base)
    through_logging(processor, structlog.stdlib.render_to_log_kwargs)
    structlog.get_logger().info("hello", session_id="s1")
    handler.flush()
    processor.close()
    assert (len(events_of(base)), len(events_of(other))) == (1, 1)


def test_a_dropped_call_does_not_hide_the_next(
    make_handler: Make, logger: logging.Logger, base: Path, processor: EventLogProcessor
) -> None:
    """If a later processor drops a call after the tee, the next plain record is still written."""

    def drop(*args: Any) -> Any:
        raise structlog.DropEvent

    handler = make_handler()
    logger.addHandler(handler)
    through_logging(processor, drop)
    structlog.get_logger().info("teed", session_id="s1")
    logger.info("plain", extra={"session_id": "s1"})
    handler.flush()
    processor.flush()
    assert sorted(e["message"] for e in events_of(base)) == ["plain", "teed"]


def test_a_disabled_level_holds_no_frame(
    make_handler: Make, logger: logging.Logger, processor: EventLogProcessor
) -> None:
    """An event that the standard logger will filter out leaves nothing behind."""
    logger.addHandler(make_handler())
    logger.setLevel(logging.ERROR)
    through_logging(processor, structlog.stdlib.render_to_log_kwargs)
    structlog.get_logger().info("hello", session_id="s1")
    assert _context.teed == {}


def test_handlers_of_parents_count_as_long_as_records_propagate(
    make_handler: Make, logger: logging.Logger, processor: EventLogProcessor
) -> None:
    """The look for a handler of ours follows `propagate`."""
    child = logging.getLogger("tests.app.child")
    logger.addHandler(logging.NullHandler())
    assert processor._looks(child, "info") == 0
    logger.addHandler(make_handler())
    assert processor._looks(child, "info") == 1
    child.propagate = False
    assert processor._looks(child, "info") == 0
    child.propagate = True


def test_a_shared_gateway_keeps_one_order(
    make_handler: Make, logger: logging.Logger, base: Path
) -> None:
    """Processor and handler of one gateway write one file, in the order of the calls."""
    gateway = EventSessionLogger(base)
    handler = make_handler(gateway=gateway)
    processor = EventLogProcessor(gateway=gateway, passthrough=False)
    logger.addHandler(handler)
    structlog.configure(processors=[processor])
    for number in range(0, 50, 2):
        logger.info(number, extra={"session_id": "s1"})
        structlog.get_logger().info(str(number + 1), session_id="s1")
    handler.flush()
    assert [e["message"] for e in events_of(base)] == [str(n) for n in range(50)]
    assert len(list(base.rglob("*.jsonl"))) == 1
    processor.close()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_async_methods_keep_session_and_exception(
    processor: EventLogProcessor, base: Path
) -> None:
    """Structlog's `aexception` runs in another thread and loses neither."""
    structlog.configure(
        processors=[processor, structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(0),
    )
    try:
        raise ValueError("wrong")
    except ValueError:
        with structlog.contextvars.bound_contextvars(session_id="s1"):
            await structlog.get_logger().aexception("failed")
    processor.flush()
    event = events_of(base)[0]
    assert (event["session_id"], event["exception"]["type"]) == ("s1", "ValueError")
