"""The contract of transports, the built-in ones, how an option becomes them, and the fakes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from eventlog_handler import (
    CallbackTransport,
    EventSessionLogger,
    LoggingTransport,
    NullTransport,
    TransportConnectionError,
    TransportInterface,
)
from eventlog_handler.testing import (
    FailingTransport,
    GatedTransport,
    RecordingTransport,
    capture_events,
)
from eventlog_handler.transports import named_transports

LINE = b'{"event":{"n":1}}'


async def nothing(event: Any) -> None:
    """Take an event."""


async def raising(event: Any) -> None:
    """Refuse an event."""
    raise ValueError("no")


MAKERS: list[Callable[[], TransportInterface]] = [
    lambda: CallbackTransport(nothing),
    LoggingTransport,
    NullTransport,
    RecordingTransport,
    lambda: FailingTransport(failures=0),
]
NAMES = ["callback", "logging", "null", "recording", "failing"]


class Model:
    """Has what a model of pydantic has."""

    def __init__(self, dump: Callable[[], Any]) -> None:
        self.model_dump = dump


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, from INFO on."""
    caplog.set_level(logging.INFO)
    return caplog


def test_the_contract_is_four_members() -> None:
    """A transport has to have exactly what the specification names."""
    assert TransportInterface.__abstractmethods__ == {
        "send",
        "close",
        "health_check",
        "is_connected",
    }
    assert str(inspect.signature(TransportInterface.send)) == (
        "(self, event: 'Any', metadata: 'dict[str, Any] | None' = None) -> 'bool'"
    )


def test_half_a_transport_cannot_be_made() -> None:
    """A subclass that lacks a member is refused by Python itself."""

    class Half(TransportInterface):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            return True

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


@pytest.mark.anyio
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
async def test_a_transport_takes_an_event(make: Callable[[], TransportInterface]) -> None:
    """`send` returns True with and without metadata."""
    transport = make()
    assert await transport.send(LINE) is True
    assert await transport.send(LINE, {"id": "1"}) is True


@pytest.mark.anyio
@pytest.mark.parametrize("make", MAKERS[:4], ids=NAMES[:4])
async def test_a_transport_is_connected_until_it_is_closed(
    make: Callable[[], TransportInterface],
) -> None:
    """Connected and healthy before `close`, neither after."""
    transport = make()
    assert transport.is_connected is True
    assert await transport.health_check() is True
    await transport.close()
    assert transport.is_connected is False
    assert await transport.health_check() is False


@pytest.mark.anyio
async def test_a_callback_transport_hands_on_what_it_got() -> None:
    """The callback gets the very object that `send` was given."""
    got: list[Any] = []

    async def callback(event: Any) -> None:
        got.append(event)

    transport = CallbackTransport(callback)
    assert transport.callback is callback
    await transport.send(LINE, {"id": "1"})
    assert got == [LINE]


@pytest.mark.anyio
async def test_a_callback_transport_turns_errors_into_false() -> None:
    """A callback that raises has not taken the event."""
    assert await CallbackTransport(raising).send(LINE) is False


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("event", "text"),
    [
        (LINE, 'Transport event: {"event":{"n":1}}'),
        ("text", "Transport event: text"),
        (Model(lambda: {"a": 1}), "Transport event: {'a': 1}"),
    ],
    ids=["bytes", "text", "model"],
)
async def test_a_logging_transport_logs_each_event(
    logged: pytest.LogCaptureFixture, event: Any, text: str
) -> None:
    """An event is one INFO record of the logger."""
    await LoggingTransport().send(event)
    assert logged.record_tuples == [("event_transport", logging.INFO, text)]


@pytest.mark.anyio
async def test_a_logging_transport_takes_another_logger(
    logged: pytest.LogCaptureFixture,
) -> None:
    """The logger is an option."""
    transport = LoggingTransport("elsewhere")
    assert transport.logger is logging.getLogger("elsewhere")
    await transport.send(LINE)
    assert [record.name for record in logged.records] == ["elsewhere"]


@pytest.mark.anyio
async def test_a_logging_transport_turns_errors_into_false(
    logged: pytest.LogCaptureFixture,
) -> None:
    """An event that cannot be logged is an ERROR record, and not taken."""
    assert await LoggingTransport().send(Model(lambda: 1 // 0)) is False
    assert [(r.levelname, r.getMessage()) for r in logged.records] == [
        ("ERROR", "Transport error: integer division or modulo by zero")
    ]


def test_no_transport_is_none() -> None:
    """None names no transports."""
    assert named_transports(None) == {}


@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_keeps_its_order_and_names(container: Callable[[Any], Any]) -> None:
    """Each transport of a list is known by its `name`, else by its class's."""
    null, recording = NullTransport(), RecordingTransport("mine")
    found = named_transports(container([null, recording]))
    assert list(found.items()) == [("NullTransport", null), ("mine", recording)]


def test_an_empty_name_is_none() -> None:
    """A transport with an empty name goes by its class's."""
    assert list(named_transports(RecordingTransport(""))) == ["RecordingTransport"]


def test_a_name_is_text() -> None:
    """A name that is no str is taken as text."""
    assert list(named_transports(RecordingTransport(7))) == ["7"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [NullTransport, lambda: NullTransport()],
    ids=["class", "function"],
)
def test_classes_and_functions_make_instances(make: Callable[[], Any]) -> None:
    """What makes a transport without arguments may stand for it, as `ext://` gives."""
    (found,) = named_transports(make).values()
    assert type(found) is NullTransport


def test_a_transport_that_can_be_called_is_not_called() -> None:
    """An instance with `__call__` is a transport all the same."""

    class Callable_(NullTransport):  # noqa: N801 - `Callable` is another's
        def __call__(self) -> Any:
            raise AssertionError

    transport = Callable_()
    assert list(named_transports(transport).values()) == [transport]


def test_a_transport_need_not_be_a_subclass() -> None:
    """Whatever has the four members is a transport."""

    class Duck:
        is_connected = True

        async def send(self, event: Any, metadata: Any = None) -> bool:
            return True

        async def close(self) -> None: ...

        async def health_check(self) -> bool:
            return True

    duck = Duck()
    assert list(named_transports(duck)) == ["test_a_transport_need_not_be_a_subclass.<locals>.Duck"]


@pytest.mark.parametrize("name", ["mine", 7])
def test_two_of_one_name_are_refused(name: Any) -> None:
    """Two transports under one name could not be told apart."""
    with pytest.raises(ValueError, match=f"two transports named '?{name}'?; give one"):
        named_transports([RecordingTransport(name), RecordingTransport(name)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            5,
            "has a int, which is no transport: it lacks send, close, health_check, is_connected;",
        ),
        (object, "has a object, which is no transport"),
        ([NullTransport(), 5], "has a int, which is no transport"),
    ],
    ids=["number", "class", "in-a-list"],
)
def test_what_is_no_transport_is_refused(wrong: Any, message: str) -> None:
    """The error says what was given, what it lacks and what to write."""
    with pytest.raises(TypeError, match=message) as caught:
        named_transports(wrong)
    assert str(caught.value).endswith("write a subclass of TransportInterface")


@pytest.mark.anyio
async def test_a_recording_transport_remembers() -> None:
    """Line and metadata of each event, in order; the events are there decoded."""
    transport = RecordingTransport()
    await transport.send(LINE, {"id": "1"})
    await transport.send(LINE)
    assert transport.sent == [(LINE, {"id": "1"}), (LINE, {})]
    assert transport.events == [{"n": 1}, {"n": 1}]


@pytest.mark.anyio
async def test_a_gated_transport_holds_events_back() -> None:
    """A send returns no earlier than the gate is opened."""
    transport = GatedTransport()
    async with anyio.create_task_group() as group:
        group.start_soon(transport.send, LINE)
        with anyio.fail_after(30):
            while not transport.arrived:
                await anyio.sleep(0)
        assert transport.sent == []
        transport.open()
    assert transport.events == [{"n": 1}]
    assert transport.arrived == 1


@pytest.mark.anyio
async def test_a_failing_transport_fails_a_number_of_times() -> None:
    """It returns False so many times, says that it is not well, and then takes everything."""
    transport = FailingTransport(failures=2)
    assert await transport.health_check() is False
    assert [await transport.send(LINE) for _ in range(3)] == [False, False, True]
    assert await transport.health_check() is True
    assert transport.attempts == 3
    assert transport.events == [{"n": 1}]


@pytest.mark.anyio
async def test_a_failing_transport_may_claim_health() -> None:
    """`healthy` is what the health check says while sends fail."""
    assert await FailingTransport(healthy=True).health_check() is True


@pytest.mark.anyio
async def test_a_transport_that_is_down_recovers() -> None:
    """`down()` cannot be reached until `recover()`."""
    transport = FailingTransport.down()
    for _ in range(3):
        with pytest.raises(TransportConnectionError, match="refused"):
            await transport.send(LINE)
    transport.recover()
    assert await transport.send(LINE) is True


@pytest.mark.anyio
async def test_captured_events_are_not_written(base: Path) -> None:
    """Inside `capture_events` events are collected; no file is written, nothing is sent."""
    transport = RecordingTransport()
    async with EventSessionLogger(base, downstream_transport=transport) as gateway:
        with capture_events() as events:
            assert await gateway({"type": "a", "session_id": "s"}) is True
        assert not base.exists()
        assert await gateway({"type": "b", "session_id": "s"}) is True
    assert events == [{"type": "a", "session_id": "s"}]
    assert [event["type"] for event in transport.events] == ["b"]


@pytest.mark.anyio
async def test_captures_may_be_nested(base: Path) -> None:
    """An inner capture does not take the outer one's events away."""
    async with EventSessionLogger(base) as gateway:
        with capture_events() as outer:
            with capture_events() as inner:
                await gateway({"n": 1})
            await gateway({"n": 2})
    assert [event["n"] for event in inner] == [1]
    assert [event["n"] for event in outer] == [1, 2]


@pytest.mark.anyio
async def test_a_capture_ends_with_an_error(base: Path) -> None:
    """After a test that failed, events are written again."""
    with pytest.raises(KeyError), capture_events():
        raise KeyError
    async with EventSessionLogger(base) as gateway:
        await gateway({"session_id": "s"})
        assert gateway.get_log_file_path("s").exists()
