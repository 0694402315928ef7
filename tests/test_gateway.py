"""The gateway on both event loops: file first, then callback, else transports; never an error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import orjson
import pytest
import trio

from eventlog_handler import (
    EventLogHandler,
    EventSessionLogger,
    EventSessionLoggerError,
    LocalLoggingError,
    LoggingTransport,
    NullTransport,
    SemiSessionEvent,
    SerializationError,
    SessionEvent,
    session_context,
    session_logger,
)
from eventlog_handler._waiter import Waiter
from eventlog_handler.testing import (
    FailingTransport,
    GatedTransport,
    RecordingTransport,
    capture_events,
)
from tests.conftest import events_of, lines_of

QUICK: dict[str, Any] = {
    "retry_delay_seconds": 0.001,
    "breaker_reset_seconds": 0.001,
    "shutdown_timeout_seconds": 20,
    "downstream_wait_seconds": 20,
}


class Heard(list[tuple[Exception, str]]):
    """An error handler that remembers."""

    def __call__(self, error: Exception, context: str) -> None:
        self.append((error, context))


@pytest.fixture
def heard() -> Heard:
    """What the error handler hears."""
    return Heard()


@pytest.fixture
def make_gateway(base: Path, heard: Heard) -> Callable[..., EventSessionLogger]:
    """Make gateways with hardly any pauses, which tell `heard` of their failures."""

    def make(**options: Any) -> EventSessionLogger:
        return EventSessionLogger(
            **{"log_base_dir": base, "error_handler": heard, **QUICK, **options}
        )

    return make


class Function:
    """A callback that fails a number of times."""

    def __init__(self, failures: int = 0, error: BaseException | None = None) -> None:
        self.failures = failures
        self.error = error or ValueError("no")
        self.got: list[Any] = []
        self.calls = 0

    async def __call__(self, given: Any) -> None:
        """Fail, or remember what was given."""
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise self.error
        self.got.append(given)


class Held:
    """A callback that holds its first event until it is let go."""

    def __init__(self) -> None:
        self.inside = anyio.Event()
        self.go_on = anyio.Event()
        self.got: list[Any] = []

    async def __call__(self, given: Any) -> None:
        """Remember what was given once it may go on."""
        if not self.inside.is_set():
            self.inside.set()
            await self.go_on.wait()
        self.got.append(given)


def event(number: int, session_id: str = "s") -> dict[str, Any]:
    """Return an event that is told by its number."""
    return {"type": "note", "session_id": session_id, "n": number}


def numbers(transport: RecordingTransport) -> list[int]:
    """Return the numbers of the events that a transport took."""
    return [sent["n"] for sent in transport.events]


def seqs(path: Path) -> list[tuple[int, int]]:
    """Return seq and number of each line of a file."""
    return [(line["seq"], line["event"]["n"]) for line in lines_of(path)]


async def wait_until(predicate: Callable[[], object]) -> None:
    """Wait for something to become true, with a bound against hanging only."""
    with anyio.fail_after(15):
        while not predicate():
            await anyio.sleep(0.001)


Make = Callable[..., EventSessionLogger]


@pytest.mark.anyio
async def test_true_means_that_the_line_is_in_the_file(make_gateway: Make, base: Path) -> None:
    """`await gateway(event)` returns True after the write, without any flush."""
    async with make_gateway() as gateway:
        assert await gateway(SessionEvent("hello", "s", role="user")) is True
        (line,) = lines_of(gateway.get_log_file_path("s"))
    assert line["seq"] == 1
    assert line["event"]["type"] == "hello"
    assert line["event"]["session_id"] == "s"
    assert line["event"]["role"] == "user"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        (SessionEvent("a", "s", data={"k": 1}), "type", "a"),
        (SemiSessionEvent("b", "s"), "type", "b"),
        ({"session_id": "s", "k": 2}, "k", 2),
        ('{"session_id": "s", "k": 3}', "k", 3),
    ],
    ids=["session-event", "semi-session-event", "mapping", "json-text"],
)
async def test_an_event_goes_to_its_sessions_file(
    make_gateway: Make, base: Path, given: Any, field: str, value: Any
) -> None:
    """Whatever its kind, an event that names a session is found there."""
    async with make_gateway() as gateway:
        await gateway(given)
    (found,) = events_of(base / "s")
    assert found[field] == value


@pytest.mark.anyio
async def test_an_event_without_a_session_goes_to_the_bound_one(
    make_gateway: Make, base: Path
) -> None:
    """`session_context` decides for an event that does not say."""
    async with make_gateway() as gateway:
        with session_context("bound"):
            await gateway(SemiSessionEvent("a"))
    assert [found["session_id"] for found in events_of(base / "bound")] == ["bound"]


@pytest.mark.anyio
async def test_events_of_no_session_share_a_directory(make_gateway: Make, base: Path) -> None:
    """Without any session an event goes to the gateway's directory of unknown ones."""
    async with make_gateway(unknown_session_pattern="lost_{uuid}") as gateway:
        await gateway({"n": 1})
        await gateway("just text")
        directory = gateway.get_session_directory(None)
    assert directory.name.startswith("lost_")
    assert len(lines_of(next(directory.iterdir()))) == 2


@pytest.mark.anyio
async def test_an_object_that_cannot_be_read_is_still_a_line(
    make_gateway: Make, base: Path, heard: Heard
) -> None:
    """An event that defends itself costs its fields, not its line."""

    class Hostile:
        def model_dump(self) -> Any:
            raise ZeroDivisionError

    async with make_gateway() as gateway:
        assert await gateway(Hostile()) is True
    assert [found["type"] for found in events_of(base)] == ["Hostile"]
    assert [type(error) for error, _ in heard] == [SerializationError]


@pytest.mark.anyio
async def test_paths_agree_with_the_disk(make_gateway: Make, base: Path) -> None:
    """What the gateway says before an event is where the event is found."""
    async with make_gateway(session_directory_pattern="a/{session_id}") as gateway:
        path, directory = gateway.get_log_file_path("x/y"), gateway.get_session_directory("x/y")
        assert not base.exists()
        await gateway(event(1, "x/y"))
        assert directory == base / "a" / "x%2Fy"
        assert path.parent == directory
        assert list(directory.iterdir()) == [path]
        assert gateway.get_log_file_path("x/y") == path


@pytest.mark.anyio
async def test_the_figures_are_those_of_the_disk(make_gateway: Make) -> None:
    """`stats()` counts events, bytes and the time that they took."""
    async with make_gateway() as gateway:
        assert gateway.stats().overhead_mean_seconds == 0.0
        await gateway(event(1))
        await gateway(event(2))
        stats = gateway.stats()
        size = gateway.get_log_file_path("s").stat().st_size
    assert (stats.received, stats.written, stats.bytes) == (2, 2, size)
    assert (stats.local_errors, stats.dropped, stats.handoff_depth) == (0, {}, 0)
    assert 0 < stats.overhead_mean_seconds <= stats.overhead_max_seconds
    assert (stats.durability, stats.transports) == ("memory", {})


@pytest.mark.anyio
async def test_the_figures_survive_a_new_directory(
    make_gateway: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stats()` counts since the gateway began, whatever was configured meanwhile."""
    monkeypatch.setenv("AGENT_LOG_DIR", str(tmp_path / "one"))
    async with make_gateway(log_base_dir=None) as gateway:
        await gateway(event(1))
        size = gateway.stats().bytes
        monkeypatch.setenv("AGENT_LOG_DIR", str(tmp_path / "two"))
        gateway.configure_from_env()
        await gateway(event(2))
        stats = gateway.stats()
    assert (stats.received, stats.written) == (2, 2)
    assert stats.bytes == 2 * size


@pytest.mark.anyio
async def test_a_failed_write_is_the_callers_to_hear(
    make_gateway: Make, base: Path, heard: Heard
) -> None:
    """Only a line that could not be written raises; nothing of it goes downstream."""
    transport, function = RecordingTransport(), Function()
    async with make_gateway(
        downstream_transport=transport, downstream_callback=function
    ) as gateway:
        base.write_bytes(b"in the way")
        with pytest.raises(LocalLoggingError, match="local logging failed: ") as caught:
            await gateway(event(1))
        stats = gateway.stats()
    assert isinstance(caught.value.__cause__, OSError)
    assert heard == [(caught.value.__cause__, "local logging")]
    assert (stats.written, stats.local_errors) == (0, 1)
    assert (transport.sent, function.got) == ([], [])


@pytest.mark.anyio
async def test_a_fault_that_clears_is_over(make_gateway: Make, base: Path) -> None:
    """After a failed write the next event is written as ever."""
    async with make_gateway() as gateway:
        base.write_bytes(b"in the way")
        with pytest.raises(LocalLoggingError):
            await gateway(event(1))
        base.unlink()
        assert await gateway(event(2)) is True
        assert seqs(gateway.get_log_file_path("s")) == [(1, 2)]


@pytest.mark.anyio
@pytest.mark.parametrize("log_format", ["jsonl", "json"])
async def test_a_formatter_is_for_custom_files_only(make_gateway: Make, log_format: str) -> None:
    """The other formats stay what they are, even where a formatter is given."""
    async with make_gateway(log_format=log_format, formatter=lambda line: "mine") as gateway:
        await gateway(event(1))
        await gateway(event(2))
        path = gateway.get_log_file_path("s")
    data = path.read_bytes()
    assert b"mine" not in data
    found = orjson.loads(data) if log_format == "json" else lines_of(path)
    assert [line["event"]["n"] for line in found] == [1, 2]


@pytest.mark.anyio
async def test_a_failing_formatter_is_told(make_gateway: Make, heard: Heard) -> None:
    """The error handler hears why the lines of a custom file are JSON."""
    async with make_gateway(log_format="custom", formatter=lambda line: 1 // 0) as gateway:
        assert await gateway(event(1)) is True
        assert gateway.stats().local_errors == 1
    ((error, context),) = heard
    assert type(error) is SerializationError
    assert str(error).startswith("formatter raised ZeroDivisionError: ")
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert context == "formatter"


@pytest.mark.anyio
async def test_an_event_that_a_processor_drops_is_no_line(make_gateway: Make, base: Path) -> None:
    """False says that there was none meant to be; transports do not get it either."""
    import structlog

    def drop(fields: dict[str, Any]) -> dict[str, Any]:
        raise structlog.DropEvent

    transport = RecordingTransport()
    async with make_gateway(processors=[drop], downstream_transport=transport) as gateway:
        assert await gateway(event(1)) is False
        stats = gateway.stats()
    assert not base.exists()
    assert transport.sent == []
    assert (stats.received, stats.dropped) == (1, {"filtered": 1})


@pytest.mark.anyio
@pytest.mark.parametrize("included", [True, False])
async def test_system_prompts_stay_out_where_asked_to(
    make_gateway: Make, base: Path, included: bool
) -> None:
    """`include_system_prompt=False` keeps prompts out of files and transports."""
    transport = RecordingTransport()
    async with make_gateway(
        include_system_prompt=included, downstream_transport=transport
    ) as gateway:
        assert await gateway({"type": "system_prompt", "session_id": "s", "x": 1}) is included
        await gateway({"type": "start", "session_id": "s", "system_prompt": "secret"})
    for found in (events_of(base), transport.events):
        assert ("system_prompt" in [e["type"] for e in found]) is included
        assert ("secret" in [e.get("system_prompt") for e in found]) is included
        assert found[-1]["type"] == "start"


@pytest.mark.anyio
async def test_without_local_logging_transports_still_get_events(
    make_gateway: Make, base: Path
) -> None:
    """`enable_local_logging=False` writes nothing, returns False, and forwards all the same."""
    transport = RecordingTransport()
    async with make_gateway(enable_local_logging=False, downstream_transport=transport) as gateway:
        assert await gateway(event(1)) is False
        await gateway({"n": 2})
        stats = gateway.stats()
        unknown = gateway.get_session_directory(None).name
    assert not base.exists()
    assert numbers(transport) == [1, 2]
    assert [metadata["session_id"] for _, metadata in transport.sent] == ["s", unknown]
    assert "seq" not in orjson.loads(transport.sent[0][0])
    assert (stats.received, stats.written) == (2, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("local", [True, False])
async def test_an_unknown_session_is_routed_by_its_directorys_name(
    make_gateway: Make, local: bool
) -> None:
    """The key of an event without a session is the same with and without files."""
    transport = RecordingTransport()
    async with make_gateway(
        enable_local_logging=local,
        downstream_transport=transport,
        unknown_session_pattern="no session",
    ) as gateway:
        await gateway({"n": 1})
        directory = gateway.get_session_directory(None)
    assert transport.sent[0][1]["session_id"] == directory.name


@pytest.mark.anyio
async def test_a_transport_gets_the_very_line(make_gateway: Make) -> None:
    """A transport is sent the file's line and what routes it, before the call returns."""
    transport = RecordingTransport()
    async with make_gateway(downstream_transport=transport) as gateway:
        await gateway(event(1))
        (line,) = gateway.get_log_file_path("s").read_bytes().splitlines()
        ((sent, metadata),) = transport.sent
    assert sent == line
    found = orjson.loads(line)
    assert metadata == {
        "id": found["id"],
        "session_id": "s",
        "type": "note",
        "timestamp": found["timestamp"],
    }


@pytest.mark.anyio
async def test_a_call_waits_for_a_transport_that_is_well(make_gateway: Make) -> None:
    """The call returns once all transports have decided."""
    gated = GatedTransport()
    done: list[int] = []
    async with make_gateway(downstream_transport=[gated, RecordingTransport()]) as gateway:

        async def call() -> None:
            await gateway(event(1))
            done.append(1)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await wait_until(lambda: gated.arrived)
            assert done == []
            gated.open()
    assert done == [1]
    assert numbers(gated) == [1]


@pytest.mark.anyio
async def test_a_call_waits_no_longer_than_it_may(make_gateway: Make) -> None:
    """A transport that hangs costs a call `downstream_wait_seconds`, and no answer."""
    gated = GatedTransport()
    async with make_gateway(downstream_transport=gated, downstream_wait_seconds=0.01) as gateway:
        with anyio.fail_after(15):
            assert await gateway(event(1)) is True
            assert await gateway(event(2)) is True
        assert numbers(gated) == []
        gated.open()
    assert numbers(gated) == [1, 2]


@pytest.mark.anyio
async def test_a_transport_that_is_down_costs_no_answer(make_gateway: Make, heard: Heard) -> None:
    """Whatever the transport does, the answer is that of the file; events go out later."""
    transport = FailingTransport.down()
    async with make_gateway(
        downstream_transport=transport, max_retry_attempts=1, downstream_wait_seconds=0.01
    ) as gateway:
        for number in range(5):
            assert await gateway(event(number)) is True
        assert seqs(gateway.get_log_file_path("s")) == [(n + 1, n) for n in range(5)]
        transport.recover()
        await wait_until(lambda: numbers(transport) == [0, 1, 2, 3, 4])
    assert {context for _, context in heard} == {"down"}


@pytest.mark.anyio
async def test_an_error_handler_that_fails_is_contained(
    make_gateway: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of an error handler is one line on stderr."""

    def failing(error: Exception, context: str) -> None:
        raise ZeroDivisionError

    async with make_gateway(
        downstream_callback=Function(failures=-1), error_handler=failing
    ) as gateway:
        assert await gateway(event(1)) is True
    assert capsys.readouterr().err == (
        "eventlog_handler: error_handler raised ZeroDivisionError and was ignored\n"
    )


@pytest.mark.anyio
async def test_the_callback_comes_first(make_gateway: Make) -> None:
    """The callback gets the live object, after the file and instead of the transports."""
    transport, seen = RecordingTransport(), list[Any]()

    async def callback(given: Any) -> None:
        seen.append((given, len(lines_of(gateway.get_log_file_path("s")))))

    given = SessionEvent("a", "s")
    async with make_gateway(
        downstream_callback=callback, downstream_transport=transport
    ) as gateway:
        assert await gateway(given) is True
        stats = gateway.stats()
    assert seen == [(given, 1)]
    assert seen[0][0] is given
    assert transport.sent == []
    assert stats.transports["downstream_callback"].sent == 1


@pytest.mark.anyio
async def test_the_callback_runs_in_the_callers_task(make_gateway: Make) -> None:
    """A callback may use what belongs to its caller's event loop."""
    tasks: list[int] = []

    async def callback(given: Any) -> None:
        tasks.append(anyio.get_current_task().id)

    async with make_gateway(downstream_callback=callback) as gateway:
        await gateway(event(1))
    assert tasks == [anyio.get_current_task().id]


@pytest.mark.anyio
async def test_what_the_callback_does_not_take_goes_to_the_transports(
    make_gateway: Make, heard: Heard
) -> None:
    """After the callback's retries the transports get the event; the call still says True."""
    transport, function = RecordingTransport(), Function(failures=3)
    async with make_gateway(
        downstream_callback=function, downstream_transport=transport, max_retry_attempts=2
    ) as gateway:
        assert await gateway(event(1)) is True
        assert numbers(transport) == [1]
        await gateway(event(2))
    assert numbers(transport) == [1]
    assert [given["n"] for given in function.got] == [2]
    assert heard == [(function.error, "downstream_callback")] * 3


@pytest.mark.anyio
async def test_a_callback_is_retried(make_gateway: Make) -> None:
    """A callback that fails at first and then takes the event keeps it from the transports."""
    transport, function = RecordingTransport(), Function(failures=2)
    async with make_gateway(
        downstream_callback=function, downstream_transport=transport
    ) as gateway:
        await gateway(event(1))
        stats = gateway.stats().transports["downstream_callback"]
    assert function.calls == 3
    assert transport.sent == []
    assert (stats.sent, stats.failed, stats.retried) == (1, 2, 2)


@pytest.mark.anyio
async def test_a_dead_callback_is_passed_by(make_gateway: Make) -> None:
    """Once its breaker is open, events go to the transports without a call."""
    transport, function = RecordingTransport(), Function(failures=-1)
    async with make_gateway(
        downstream_callback=function,
        downstream_transport=transport,
        max_retry_attempts=0,
        breaker_failures=2,
        breaker_reset_seconds=1000,
    ) as gateway:
        for number in range(4):
            await gateway(event(number))
        stats = gateway.stats().transports["downstream_callback"]
    assert function.calls == 2
    assert numbers(transport) == [0, 1, 2, 3]
    assert (stats.breaker, stats.connected) == ("open", False)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
async def test_nothing_downstream_reaches_the_caller(
    make_gateway: Make, error: BaseException
) -> None:
    """Even a callback's SystemExit is the callback's failure."""
    function = Function(failures=1, error=error)
    async with make_gateway(downstream_callback=function, max_retry_attempts=0) as gateway:
        assert await gateway(event(1)) is True
        assert gateway.stats().transports["downstream_callback"].failed == 1


@pytest.mark.anyio
async def test_a_callback_is_called_even_for_a_dropped_event(
    make_gateway: Make, base: Path
) -> None:
    """A processor decides what is stored; the live event still reaches its callback."""
    function, transport = Function(), RecordingTransport()
    async with make_gateway(
        include_system_prompt=False,
        downstream_callback=function,
        downstream_transport=transport,
    ) as gateway:
        given = {"type": "system_prompt", "session_id": "s"}
        assert await gateway(given) is False
        function.failures = -1
        assert await gateway(given) is False
    assert function.got == [given]
    assert not base.exists()
    assert transport.sent == []


@pytest.mark.anyio
async def test_a_sessions_events_reach_the_callback_in_order(make_gateway: Make) -> None:
    """Concurrent tasks of one session are called back in the order of their lines."""
    order: list[int] = []

    async def callback(given: Any) -> None:
        # The earlier an event, the longer its callback takes.
        for _ in range(20 - given["n"]):
            await anyio.sleep(0)
        order.append(given["n"])

    async with make_gateway(downstream_callback=callback) as gateway:
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(gateway, event(number))
        written = [line["event"]["n"] for line in lines_of(gateway.get_log_file_path("s"))]
    assert sorted(order) == list(range(20))
    assert order == written


@pytest.mark.anyio
async def test_sessions_do_not_wait_for_each_other(make_gateway: Make) -> None:
    """A callback that hangs for one session is called for another."""
    held = Held()
    async with (
        make_gateway(downstream_callback=held) as gateway,
        anyio.create_task_group() as group,
    ):
        group.start_soon(gateway, event(1, "a"))
        await held.inside.wait()
        await gateway(event(2, "b"))
        assert [given["n"] for given in held.got] == [2]
        held.go_on.set()
    assert [given["n"] for given in held.got] == [2, 1]


@pytest.mark.anyio
async def test_transports_get_concurrent_events_in_order(make_gateway: Make) -> None:
    """A transport's order is that of the file, whichever tasks write."""
    transport = RecordingTransport()
    async with make_gateway(downstream_transport=transport) as gateway:
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(gateway, event(number))
        lines = gateway.get_log_file_path("s").read_bytes().splitlines()
    assert [line for line, _ in transport.sent] == lines


@pytest.mark.anyio
async def test_a_callback_may_log_to_its_own_session(make_gateway: Make) -> None:
    """An event from inside the callback does not wait for the callback to end."""
    order: list[int] = []

    async def callback(given: Any) -> None:
        if given["n"] == 1:
            await gateway(event(2))
        order.append(given["n"])

    async with make_gateway(downstream_callback=callback) as gateway:
        with anyio.fail_after(10):
            await gateway(event(1))
            await gateway(event(3))
        assert seqs(gateway.get_log_file_path("s")) == [(1, 1), (2, 2), (3, 3)]
    assert order == [2, 1, 3]


@pytest.mark.anyio
async def test_turns_leave_nothing_behind(make_gateway: Make) -> None:
    """A million sessions cost no memory once their calls are over."""
    async with make_gateway(downstream_callback=Function()) as gateway:
        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(gateway, event(number, f"s{number % 3}"))
        assert gateway._turns._waiting == {}


@pytest.mark.anyio
async def test_a_call_cancelled_in_its_callback_is_sent(make_gateway: Make) -> None:
    """Whether the callback took it is not known, so the transports get the event."""
    held, transport = Held(), RecordingTransport()
    async with make_gateway(downstream_callback=held, downstream_transport=transport) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway, event(1))
            await held.inside.wait()
            group.cancel_scope.cancel()
        await wait_until(lambda: numbers(transport) == [1])
    assert held.got == []


@pytest.mark.anyio
async def test_a_call_cancelled_before_its_callback_is_sent(make_gateway: Make) -> None:
    """An event that is cancelled while it waits for its turn is downstream all the same."""
    held, transport = Held(), RecordingTransport()
    async with make_gateway(downstream_callback=held, downstream_transport=transport) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway, event(1))
            await held.inside.wait()
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(gateway, event(2))
                await wait_until(lambda: gateway.stats().written == 2)
                waiting.cancel_scope.cancel()
            held.go_on.set()
        await gateway.close()
    assert [given["n"] for given in held.got] == [1]
    assert numbers(transport) == [2]


@pytest.mark.anyio
async def test_a_call_cancelled_while_it_waits_is_sent(make_gateway: Make) -> None:
    """Who no longer waits for a transport has sent the event all the same."""
    gated = GatedTransport()
    async with make_gateway(downstream_transport=gated) as gateway:
        async with anyio.create_task_group() as group:
            group.start_soon(gateway, event(1))
            await wait_until(lambda: gated.arrived)
            group.cancel_scope.cancel()
        gated.open()
    assert numbers(gated) == [1]


@pytest.mark.anyio
async def test_a_transports_log_does_not_come_back(
    make_gateway: Make, base: Path, logger: logging.Logger
) -> None:
    """What a transport logs while it sends is no event again."""
    async with make_gateway(
        downstream_transport=LoggingTransport("tests.app.transport")
    ) as gateway:
        handler = EventLogHandler(gateway=gateway)
        logger.addHandler(handler)
        logger.info("once", extra={"session_id": "s"})
        await gateway(event(1))
        handler.close()
        await gateway.close()
    assert len(events_of(base)) == 2


@pytest.mark.anyio
async def test_a_handlers_events_are_finished_first(
    make_gateway: Make, logger: logging.Logger
) -> None:
    """`close` writes and forwards what a handler has handed off before."""
    transport = RecordingTransport()
    gateway = make_gateway(downstream_transport=transport)
    handler = EventLogHandler(gateway=gateway)
    logger.addHandler(handler)
    for number in range(20):
        logger.info("m", extra={"session_id": "s", "n": number})
    await gateway.close()
    assert numbers(transport) == list(range(20))
    stats = gateway.stats()
    assert (stats.received, stats.written, stats.handoff_depth) == (20, 20, 0)
    handler.close()


@pytest.mark.anyio
async def test_close_is_idempotent(make_gateway: Make) -> None:
    """The second `close` does nothing, and nor does leaving the block after it."""
    closed: list[int] = []

    class Counting(RecordingTransport):
        async def close(self) -> None:
            closed.append(1)

    async with make_gateway(downstream_transport=Counting()) as gateway:
        await gateway(event(1))
        await gateway.close()
        await gateway.close()
    assert closed == [1]


@pytest.mark.anyio
async def test_close_from_many_tasks_closes_once(make_gateway: Make) -> None:
    """Tasks that close at the same moment do not close twice."""
    closed: list[int] = []

    class Counting(RecordingTransport):
        async def close(self) -> None:
            closed.append(1)

    gateway = make_gateway(downstream_transport=Counting())
    await gateway(event(1))
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(gateway.close)
    assert closed == [1]


@pytest.mark.anyio
async def test_an_event_after_close_is_refused(make_gateway: Make, base: Path) -> None:
    """A closed gateway says so, and writes nothing."""
    gateway = make_gateway()
    await gateway.close()
    with pytest.raises(EventSessionLoggerError, match="closed: it takes no more events"):
        await gateway(event(1))
    assert not base.exists()


@pytest.mark.anyio
async def test_a_block_closes_its_gateway(make_gateway: Make) -> None:
    """`async with` gives the gateway itself and closes it, also after an error."""
    transport = RecordingTransport()
    made = make_gateway(downstream_transport=transport)
    with contextlib.suppress(KeyError):
        async with made as gateway:
            assert gateway is made
            raise KeyError
    assert transport.closed


@pytest.mark.anyio
async def test_close_keeps_to_its_budget(make_gateway: Make) -> None:
    """A transport that hangs is cut off; what it has not taken stands in the file."""
    gated = GatedTransport()
    gateway = make_gateway(
        downstream_transport=gated, downstream_wait_seconds=0, shutdown_timeout_seconds=0.05
    )
    await gateway(event(1))
    with anyio.fail_after(15):
        await gateway.close()
    await wait_until(lambda: gated.closed)
    assert gateway.stats().transports["gated"].lag_events == 1
    assert seqs(gateway.get_log_file_path("s")) == [(1, 1)]


@pytest.mark.anyio
async def test_a_cancelled_close_goes_on_by_itself(make_gateway: Make) -> None:
    """A caller that is cancelled in `close` does not wait; the gateway is closed all the same."""
    gated = GatedTransport()
    gateway = make_gateway(downstream_transport=gated, downstream_wait_seconds=0)
    await gateway(event(1))
    await wait_until(lambda: gated.arrived)
    async with anyio.create_task_group() as group:
        group.start_soon(gateway.close)
        await wait_until(lambda: gateway._closed)
        group.cancel_scope.cancel()
    gated.open()
    await wait_until(lambda: gated.closed)
    assert numbers(gated) == [1]


@pytest.mark.anyio
async def test_a_forgotten_gateway_ends_by_itself(make_gateway: Make) -> None:
    """A gateway that is collected sends what is queued and closes its transports."""
    transport = RecordingTransport()
    gateway = make_gateway(downstream_transport=transport)
    await gateway(event(1))
    del gateway
    gc.collect()
    await wait_until(lambda: transport.closed)
    assert numbers(transport) == [1]


@pytest.mark.anyio
async def test_the_environment_is_read_again(
    make_gateway: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`configure_from_env` takes the variables of now; events go to the new directory."""
    async with make_gateway(log_base_dir=None, error_handler=None) as gateway:
        monkeypatch.setenv("AGENT_LOG_DIR", str(tmp_path / "new"))
        monkeypatch.setenv("AGENT_LOG_FORMAT", "json")
        monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "7")
        gateway.configure_from_env()
        assert (gateway.log_base_dir, gateway.max_retry_attempts) == (tmp_path / "new", 7)
        await gateway(event(1))
        path = gateway.get_log_file_path("s")
    assert path.parent == tmp_path / "new" / "s"
    assert [line["event"]["n"] for line in orjson.loads(path.read_bytes())] == [1]


@pytest.mark.anyio
async def test_what_was_given_beats_the_environment(
    make_gateway: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`configure_from_env` leaves alone what the constructor was given."""
    async with make_gateway(max_retry_attempts=2) as gateway:
        await gateway(event(1))
        monkeypatch.setenv("AGENT_LOG_DIR", "/nowhere")
        monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "7")
        gateway.configure_from_env()
        await gateway(event(2))
        assert (gateway.log_base_dir, gateway.max_retry_attempts) == (base, 2)
        assert seqs(gateway.get_log_file_path("s")) == [(1, 1), (2, 2)]


@pytest.mark.anyio
async def test_a_bad_variable_changes_nothing(
    make_gateway: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of `configure_from_env` names variable and value, and nothing is changed."""
    async with make_gateway() as gateway:
        monkeypatch.setenv("AGENT_LOG_ENABLE_LOCAL", "false")
        monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "many")
        with pytest.raises(ValueError, match="AGENT_LOG_MAX_RETRIES='many'"):
            gateway.configure_from_env()
        assert gateway.enable_local_logging is True
        assert await gateway(event(1)) is True


@pytest.mark.anyio
async def test_a_callback_goes_by_the_new_environment(
    make_gateway: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that stays is retried as often as the environment says now."""
    function = Function(failures=-1)
    async with make_gateway(downstream_callback=function) as gateway:
        monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "1")
        gateway.configure_from_env()
        await gateway(event(1))
    assert function.calls == 2


@pytest.mark.anyio
async def test_another_callback_is_used_from_the_next_event(make_gateway: Make) -> None:
    """`update_downstream_callback` replaces the callback, and None takes it away."""
    first, second, transport = Function(), Function(), RecordingTransport()
    async with make_gateway(downstream_callback=first, downstream_transport=transport) as gateway:
        await gateway(event(1))
        gateway.update_downstream_callback(second)
        assert gateway.downstream_callback is second
        await gateway(event(2))
        gateway.update_downstream_callback(None)
        await gateway(event(3))
    assert [given["n"] for given in first.got] == [1]
    assert [given["n"] for given in second.got] == [2]
    assert numbers(transport) == [3]


@pytest.mark.anyio
async def test_what_cannot_be_called_is_no_callback(make_gateway: Make) -> None:
    """A refused callback changes nothing."""
    function = Function()
    async with make_gateway(downstream_callback=function) as gateway:
        with pytest.raises(TypeError, match="downstream_callback must be callable"):
            gateway.update_downstream_callback(5)  # type: ignore[arg-type]
        await gateway(event(1))
    assert len(function.got) == 1


@pytest.mark.anyio
async def test_another_transport_is_used_from_the_next_event(make_gateway: Make) -> None:
    """`update_downstream_transport` replaces the transport; the old one is closed."""
    first, second = RecordingTransport("first"), RecordingTransport("second")
    async with make_gateway(downstream_transport=first) as gateway:
        await gateway(event(1))
        gateway.update_downstream_transport(second)
        assert gateway.downstream_transport is second
        await gateway(event(2))
        await wait_until(lambda: numbers(second) == [2])
        await wait_until(lambda: first.closed)
        assert list(gateway.stats().transports) == ["second"]
    assert numbers(first) == [1]


@pytest.mark.anyio
async def test_no_transport_takes_the_old_one_away(make_gateway: Make) -> None:
    """None sends nowhere, and closes what was there."""
    transport = RecordingTransport()
    async with make_gateway(downstream_transport=transport) as gateway:
        await gateway(event(1))
        gateway.update_downstream_transport(None)
        assert await gateway(event(2)) is True
        await wait_until(lambda: transport.closed)
    assert numbers(transport) == [1]


@pytest.mark.anyio
async def test_what_is_no_transport_changes_nothing(make_gateway: Make) -> None:
    """A refused transport leaves the old one in its place."""
    transport = RecordingTransport()
    async with make_gateway(downstream_transport=transport) as gateway:
        with pytest.raises(TypeError, match="which is no transport"):
            gateway.update_downstream_transport(object())
        await gateway(event(1))
    assert numbers(transport) == [1]


@pytest.mark.anyio
async def test_an_update_outlives_the_environment(make_gateway: Make) -> None:
    """What was updated counts as given: `configure_from_env` does not take it back."""
    function = Function()
    async with make_gateway() as gateway:
        gateway.update_downstream_callback(function)
        gateway.configure_from_env()
        await gateway(event(1))
    assert len(function.got) == 1


@pytest.mark.anyio
async def test_captured_events_go_nowhere(make_gateway: Make, base: Path) -> None:
    """Inside `capture_events` the call says what it would have, and calls nothing."""
    function = Function()
    async with make_gateway(downstream_callback=function, include_system_prompt=False) as gateway:
        with capture_events() as events:
            assert await gateway(event(1)) is True
            assert await gateway({"type": "system_prompt"}) is False
    assert events == [event(1)]
    assert function.calls == 0
    assert not base.exists()


def test_options_can_be_read(make_gateway: Make, base: Path) -> None:
    """Each option in force is an attribute; another name is an AttributeError."""
    gateway = make_gateway(log_format="json")
    assert gateway.log_base_dir == base
    assert gateway.log_format == "json"
    assert gateway.file_mode == 0o600
    with pytest.raises(AttributeError, match="'EventSessionLogger' object has no attribute 'x'"):
        gateway.x  # noqa: B018


def test_options_in_force_cannot_be_assigned(make_gateway: Make) -> None:
    """An assignment that would change nothing is an AttributeError."""
    gateway = make_gateway()
    with pytest.raises(AttributeError):
        gateway.log_format = "json"
    assert gateway.log_format == "jsonl"


def test_the_repr_names_the_directory_only(make_gateway: Make, base: Path) -> None:
    """A repr holds no transport, which might hold a secret."""
    assert repr(make_gateway(downstream_transport=NullTransport())) == (
        f"<EventSessionLogger {str(base)!r}>"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"log_formt": "json"}, TypeError, "'log_formt' is not an option: did you mean 'log_form"),
        ({"log_format": "xml"}, ValueError, "log_format='xml' does not exist"),
        ({"downstream_transport": 5}, TypeError, "which is no transport"),
        ({"log_format": "custom"}, ValueError, "needs formatter"),
    ],
    ids=["unknown", "value", "transport", "custom"],
)
def test_a_wrong_option_is_refused(
    make_gateway: Make, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A constructor says what is wrong before any event."""
    with pytest.raises(error, match=message):
        make_gateway(**options)


@pytest.mark.parametrize("run", [asyncio.run, None], ids=["asyncio", "trio"])
def test_a_caller_whose_loop_has_ended_costs_nothing(
    run: Callable[[Awaitable[Waiter]], Waiter] | None,
) -> None:
    """A transport that decides after its caller's loop has ended harms nobody."""

    async def make() -> Waiter:
        return Waiter()

    waiter = asyncio.run(make()) if run is not None else trio.run(make)
    waiter.expect(1)
    assert waiter.released() is None


@pytest.mark.anyio
async def test_without_transports_nobody_waits() -> None:
    """A waiter for none returns at once."""
    waiter = Waiter()
    waiter.expect(0)
    with anyio.fail_after(10):
        await waiter.wait(1000)


@pytest.mark.anyio
async def test_a_waiter_waits_for_all() -> None:
    """Two transports have to decide, from whichever thread."""
    waiter, done = Waiter(), list[int]()
    waiter.expect(2)

    async def wait() -> None:
        await waiter.wait(1000)
        done.append(1)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.to_thread.run_sync(waiter.released)
            await anyio.wait_all_tasks_blocked()
            assert done == []
            await anyio.to_thread.run_sync(waiter.released)
    assert done == [1]


@pytest.mark.anyio
async def test_a_reset_gateway_begins_files_of_its_own(make_gateway: Make, base: Path) -> None:
    """After a fork the child's events go to new files and to its own thread."""
    transport = RecordingTransport()
    async with make_gateway(file_naming_pattern="log") as gateway:
        await gateway(event(1))
        gateway.after_fork_in_child()
        gateway.update_downstream_transport(transport)
        await gateway(event(2))
    assert seqs(base / "s" / "log.jsonl") == [(1, 1)]
    assert seqs(base / "s" / "log-1.jsonl") == [(1, 2)]
    assert numbers(transport) == [2]


def test_a_forked_child_logs_on_its_own(make_gateway: Make, base: Path) -> None:
    """A real child writes its own file, delivers its own events and closes; the parent goes on."""
    gateway = make_gateway(file_naming_pattern="log", downstream_transport=RecordingTransport())
    asyncio.run(_log(gateway, 1))
    with warnings.catch_warnings():
        # From 3.12 on forking beside threads is warned of: it is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            sent = asyncio.run(_log(gateway, 2, and_close=True))
            os._exit(0 if sent == [1, 2] else 1)
        os._exit(2)
    deadline, ended = time.monotonic() + 30, (0, 0)
    while ended[0] == 0 and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    sent = asyncio.run(_log(gateway, 3, and_close=True))
    assert ended == (child, 0)
    assert sent == [1, 3]
    assert seqs(base / "s" / "log.jsonl") == [(1, 1), (2, 3)]
    assert seqs(base / "s" / "log-1.jsonl") == [(1, 2)]


async def _log(gateway: EventSessionLogger, number: int, and_close: bool = False) -> list[int]:
    """Log an event; return what the transport has got, in this process and before the fork."""
    await gateway(event(number))
    if and_close:
        await gateway.close()
    found: list[int] = numbers(gateway.downstream_transport)
    return found


def test_one_gateway_serves_many_loops(make_gateway: Make) -> None:
    """Threads with loops of their own, of both kinds, may share a gateway."""
    transport, order = RecordingTransport(), list[int]()

    async def callback(given: Any) -> None:
        await anyio.sleep(0)
        order.append(given["n"])
        if given["n"] % 2:
            raise ValueError

    gateway = make_gateway(
        downstream_callback=callback,
        downstream_transport=transport,
        max_retry_attempts=0,
        breaker_failures=1000,
    )

    async def log(first: int) -> None:
        for number in range(first, first + 10):
            await gateway(event(number))

    def run(backend: str, first: int) -> None:
        anyio.run(log, first, backend=backend)

    threads = [
        threading.Thread(target=run, args=(backend, first))
        for first, backend in enumerate(("asyncio", "trio", "asyncio", "trio"))
        for first in (first * 10,)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    asyncio.run(gateway.close())
    assert sorted(order) == list(range(40))
    assert sorted(numbers(transport)) == list(range(1, 40, 2))
    assert [seq for seq, _ in seqs(gateway.get_log_file_path("s"))] == list(range(1, 41))


@pytest.mark.anyio
async def test_others_have_their_turn(make_gateway: Make) -> None:
    """A loop that does nothing but log can be cancelled, also where nothing is sent downstream."""
    async with make_gateway() as gateway:
        with anyio.move_on_after(0.01) as scope:
            while True:
                await gateway(event(1))
        assert scope.cancelled_caught


@pytest.mark.anyio
async def test_turns_are_as_rare_with_a_transport_that_nobody_waits_for(
    make_gateway: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn of the event loop costs half an event: it is given once in a while, not each time."""
    monkeypatch.setattr(session_logger, "TURN_SECONDS", 600.0)
    turns: list[None] = []

    async def turn() -> None:
        turns.append(None)

    transport = RecordingTransport()
    async with make_gateway(downstream_transport=transport, downstream_wait_seconds=0) as gateway:
        await gateway(event(0))
        await wait_until(lambda: numbers(transport) == [0] and gateway._delivery.live)
        # Not in `anyio` itself, where the transport's thread would give turns too.
        monkeypatch.setattr(session_logger, "lowlevel", SimpleNamespace(checkpoint=turn))
        for number in range(1, 10):
            await gateway(event(number))
    assert turns == []
