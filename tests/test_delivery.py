"""Delivery and its threads: start and end, hung and hostile transports, replacement, fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from eventlog_handler import EventLogHandler, TransportConnectionError, TransportError
from eventlog_handler._config import Settings, resolve
from eventlog_handler._context import delivering
from eventlog_handler._delivery import Delivery, FileRegister
from eventlog_handler._downstream import Callback
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._report import Report
from eventlog_handler._stamp import new_id
from eventlog_handler.testing import FailingTransport, GatedTransport, RecordingTransport
from eventlog_handler.typing import EncodedEvent
from tests.conftest import events_of

QUICK: dict[str, Any] = {
    "retry_delay_seconds": 0.001,
    "breaker_reset_seconds": 0.001,
    "shutdown_timeout_seconds": 30,
}


_earlier: set[threading.Thread] = set()
"""What another test has left behind must not fail this one."""


@pytest.fixture(autouse=True)
def remember_threads() -> None:
    """Know which threads are not this test's."""
    _earlier.clear()
    _earlier.update(threading.enumerate())


class Heard(list[tuple[Exception, str]]):
    """An error handler that remembers."""

    def __call__(self, error: Exception, context: str) -> None:
        self.append((error, context))


@pytest.fixture
def heard() -> Heard:
    """What the error handler hears."""
    return Heard()


class Writer(Delivery):
    """A delivery, with the files that it reads."""

    def __init__(self, options: Settings, report: Report) -> None:
        super().__init__(options, report, lambda session, path: self.files.committed(session, path))
        self.files = SessionFiles(
            options.paths("u"),
            Layout(options.log_format),
            max_open_files=5,
            file_mode=0o600,
            directory_mode=0o700,
            registrar=FileRegister(self),
        )

    def write(self, *numbers: int, session: str = "s") -> None:
        """Write events that nobody awaits."""
        for number in numbers:
            self.files.append(session, [event(number, session)], self.hand_over)


@pytest.fixture
def make_delivery(heard: Heard, base: Path) -> Iterator[Callable[..., Writer]]:
    """Make deliveries that are closed when the test ends."""
    made: list[Writer] = []

    def make(*transports: RecordingTransport, **options: Any) -> Writer:
        delivery = Writer(settings(base, **options), Report(heard))
        made.append(delivery)
        delivery.use_transports({transport.name: transport for transport in transports})
        return delivery

    yield make
    for delivery in made:
        close(delivery)
        delivery.files.close()


def settings(base: Path, **options: Any) -> Settings:
    """Return settings with hardly any pauses."""
    return resolve({**QUICK, "log_base_dir": base, **options}, {})


def close(delivery: Delivery, within_seconds: float = 30) -> None:
    """Close with a budget."""
    delivery.close(time.monotonic() + within_seconds)


def event(number: int, session: str = "s") -> EncodedEvent:
    """Return an event that is told by its number."""
    body = orjson.dumps({"type": "note", "n": number, "session_id": session})
    return EncodedEvent(session, "note", new_id(), number, body)


def numbers(transport: RecordingTransport) -> list[int]:
    """Return the numbers of the events that a transport took."""
    return [sent["n"] for sent in transport.events]


def wait_until(predicate: Callable[[], object]) -> None:
    """Wait for something to become true, with a bound against hanging only."""
    deadline = time.monotonic() + 15
    while not predicate():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    """Return the delivery threads that live, of this test alone."""
    living = set(threading.enumerate()) - _earlier
    return [thread for thread in living if thread.name == "eventlog-delivery"]


@contextlib.contextmanager
def no_thread_can_be_started() -> Iterator[None]:
    """Refuse new threads, as the interpreter does at its end."""

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        yield


def test_without_a_downstream_there_is_no_thread(make_delivery: Callable[..., Writer]) -> None:
    """Nothing to deliver to costs no thread, even when asked to start."""
    delivery = make_delivery()
    delivery.start()
    delivery.write(0)
    close(delivery)
    assert threads() == []


def test_the_first_event_starts_the_thread(make_delivery: Callable[..., Writer]) -> None:
    """A transport costs a thread no earlier than its first event."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    assert threads() == []
    delivery.write(0, 1)
    wait_until(lambda: numbers(transport) == [0, 1])
    assert len(threads()) == 1
    assert threads()[0].daemon


def test_close_ends_the_thread(make_delivery: Callable[..., Writer]) -> None:
    """After `close` what was handed over is sent, the transport closed, the thread gone."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    delivery.write(*range(50))
    close(delivery)
    assert numbers(transport) == list(range(50))
    assert transport.closed
    assert threads() == []


def test_close_closes_a_transport_that_was_never_used(
    make_delivery: Callable[..., Writer],
) -> None:
    """A transport is ours to close, with events or without."""
    transport = RecordingTransport()
    close(make_delivery(transport))
    assert transport.closed
    assert threads() == []


def test_close_twice_closes_once(make_delivery: Callable[..., Writer]) -> None:
    """The second `close` finds nothing left to do."""
    closed: list[int] = []

    class Counting(RecordingTransport):
        async def close(self) -> None:
            closed.append(1)

    delivery = make_delivery(Counting())
    close(delivery)
    close(delivery)
    assert closed == [1]


def test_each_transport_gets_each_event(make_delivery: Callable[..., Writer]) -> None:
    """Two transports each get all events, in order."""
    first, second = RecordingTransport("first"), RecordingTransport("second")
    delivery = make_delivery(first, second)
    delivery.write(0, 1)
    close(delivery)
    assert (numbers(first), numbers(second)) == ([0, 1], [0, 1])
    assert list(delivery.stats()) == ["first", "second"]


def test_a_transport_that_is_down_holds_back_no_other(
    make_delivery: Callable[..., Writer],
) -> None:
    """An outage of one transport is its own."""
    down, well = FailingTransport.down(), RecordingTransport()
    delivery = make_delivery(down, well)
    delivery.write(*range(5))
    wait_until(lambda: numbers(well) == [0, 1, 2, 3, 4])
    wait_until(lambda: delivery.stats()["down"].breaker != "closed")
    assert delivery.stats()["down"].lag_events == 5
    down.recover()
    wait_until(lambda: numbers(down) == [0, 1, 2, 3, 4])


def test_a_hung_transport_does_not_outlast_the_budget(
    make_delivery: Callable[..., Writer],
) -> None:
    """What a hung transport has not taken is counted, it is closed, and others have all."""
    gated, well = GatedTransport(), RecordingTransport()
    delivery = make_delivery(gated, well)
    delivery.write(*range(3))
    wait_until(lambda: gated.arrived and len(well.sent) == 3)
    close(delivery, within_seconds=0.05)
    wait_until(lambda: not threads())
    assert gated.closed
    assert well.closed
    assert delivery.stats()["gated"].lag_events == 3
    assert delivery.stats()["recording"].sent == 3


def test_a_transport_that_blocks_its_loop_is_left_behind(
    make_delivery: Callable[..., Writer],
) -> None:
    """`close` returns though a driver never gives the loop back."""
    inside, go_on = threading.Event(), threading.Event()

    class Blocking(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            inside.set()
            go_on.wait(60)
            return await super().send(line, metadata)

    delivery = make_delivery(Blocking())
    delivery.write(0)
    assert inside.wait(30)
    started = time.monotonic()
    close(delivery, within_seconds=0.01)
    assert time.monotonic() - started < 30
    assert len(threads()) == 1
    go_on.set()
    wait_until(lambda: not threads())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("bad"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), None],
    ids=["error", "exit", "interrupt", "cancelled", "no-answer"],
)
def test_no_failure_of_a_send_ends_the_thread(
    make_delivery: Callable[..., Writer], heard: Heard, error: BaseException | None
) -> None:
    """Whatever a driver does in `send`, the event is sent again and the thread lives on."""
    transport = FailingTransport(failures=2, error=error)
    delivery = make_delivery(transport)
    delivery.write(0, 1)
    wait_until(lambda: numbers(transport) == [0, 1])
    assert transport.attempts == 4
    assert [context for _, context in heard] == ["failing", "failing"]
    assert all(told is error or type(told) is TransportError for told, _ in heard)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("bad"), SystemExit(3), asyncio.CancelledError()],
    ids=["error", "exit", "cancelled"],
)
def test_no_failure_of_a_close_harms_another_transport(
    make_delivery: Callable[..., Writer], error: BaseException
) -> None:
    """Whatever a replaced transport does in `close`, the others keep their events and go on."""
    closing = threading.Event()

    class BadlyClosed(RecordingTransport):
        async def close(self) -> None:
            closing.set()
            raise error

    bad, gated = BadlyClosed("bad"), GatedTransport()
    delivery = make_delivery(bad, gated)
    delivery.write(0)
    wait_until(lambda: gated.arrived)
    delivery.use_transports({"gated": gated})
    assert closing.wait(30)
    # One more turn of the loop, or the end of it: what the close does to others has happened.
    delivery.write(1)
    gated.open()
    wait_until(lambda: delivery.stats()["gated"].lag_events == 0)
    close(delivery)
    assert numbers(gated) == [0, 1]
    assert delivery.stats()["gated"].dropped == 0


def test_transports_run_as_our_own_doing(make_delivery: Callable[..., Writer]) -> None:
    """Inside a send `delivering` is set, so that what a driver logs does not come back in."""
    seen: list[bool] = []

    class Looking(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            seen.append(delivering())
            return True

    delivery = make_delivery(Looking())
    delivery.write(0)
    close(delivery)
    assert seen == [True]
    assert delivering() is False


def test_a_new_transport_joins_a_running_thread(make_delivery: Callable[..., Writer]) -> None:
    """A transport that is added gets the events from then on; the one that stays keeps all."""
    first, second = RecordingTransport("first"), RecordingTransport("second")
    delivery = make_delivery(first)
    delivery.write(0)
    wait_until(lambda: numbers(first) == [0])
    delivery.use_transports({"first": first, "second": second})
    delivery.write(1)
    wait_until(lambda: numbers(second) == [1])
    close(delivery)
    assert numbers(first) == [0, 1]
    assert delivery.stats()["first"].sent == 2


def test_one_of_the_same_name_goes_on_where_the_old_one_stops(
    make_delivery: Callable[..., Writer],
) -> None:
    """The old one ends the batch in hand and is closed; what is left and comes is the new one's."""
    old, new = GatedTransport("one"), RecordingTransport("one")
    delivery = make_delivery(old, batch_events=1)
    delivery.write(0, 1)
    wait_until(lambda: old.arrived)
    delivery.use_transports({"one": new})
    delivery.write(2)
    assert not old.closed
    old.open()
    wait_until(lambda: numbers(new) == [1, 2])
    assert numbers(old) == [0]
    assert old.closed
    assert not new.closed
    assert delivery.stats()["one"].sent == 3


def test_one_that_hangs_is_replaced_all_the_same(make_delivery: Callable[..., Writer]) -> None:
    """A driver that never gives its loop back is waited for as long as an attempt may take."""
    inside, go_on = threading.Event(), threading.Event()

    class Blocking(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            inside.set()
            go_on.wait(60)
            return True

    new = RecordingTransport("one")
    delivery = make_delivery(Blocking("one"), send_timeout_seconds=0.01)
    delivery.write(0, 1)
    assert inside.wait(30)
    delivery.use_transports({"one": new})
    wait_until(lambda: numbers(new) == [0, 1])
    go_on.set()
    delivery.write(2)
    wait_until(lambda: numbers(new) == [0, 1, 2])
    assert delivery.stats()["one"].lag_events == 0


def test_a_transport_that_comes_back_gets_what_it_was_owed(
    make_delivery: Callable[..., Writer],
) -> None:
    """What was written while it was away is not its own; what it had not taken before is."""
    one, other = FailingTransport(error=TransportConnectionError("down"), name="one"), Other()
    delivery = make_delivery(one, max_retry_attempts=0, breaker_failures=1)
    delivery.write(0)
    wait_until(lambda: delivery.stats()["one"].breaker != "closed")
    delivery.use_transports({"other": other})
    delivery.write(1)
    one.recover()
    delivery.use_transports({"one": one, "other": other})
    delivery.write(2)
    wait_until(lambda: numbers(one) == [0, 2])
    wait_until(lambda: numbers(other) == [1, 2])


class Other(RecordingTransport):
    """Another one."""

    def __init__(self) -> None:
        super().__init__("other")


def test_a_transport_that_goes_before_its_first_event_is_closed(
    make_delivery: Callable[..., Writer],
) -> None:
    """A transport is closed even where it goes before the thread was ever started."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    delivery.use_transports({})
    wait_until(lambda: transport.closed)
    assert delivery.stats() == {}


def test_a_replaced_transport_is_finished_at_close(
    make_delivery: Callable[..., Writer],
) -> None:
    """Closing waits for those that were replaced before, too."""
    old = GatedTransport()
    delivery = make_delivery(old)
    delivery.write(0)
    wait_until(lambda: old.arrived)
    delivery.use_transports({})
    threading.Timer(0.05, old.open).start()
    close(delivery)
    assert numbers(old) == [0]
    assert old.closed


def use_callback(delivery: Delivery, function: Callable[[Any], Any], **options: Any) -> None:
    """Put a callback before the transports."""
    delivery.use_callback(Callback(function, resolve({**QUICK, **options}, {}), Report(None)))


def test_a_callback_comes_first(make_delivery: Callable[..., Writer]) -> None:
    """Events that nobody awaits go to the callback; the transports get what it refuses."""
    transport, got = RecordingTransport(), list[Any]()

    async def function(given: dict[str, Any]) -> None:
        if given["n"] == 1:
            raise ValueError
        got.append(given["n"])

    delivery = make_delivery(transport)
    use_callback(delivery, function, max_retry_attempts=0)
    delivery.write(0, 1, 2)
    close(delivery)
    assert got == [0, 2]
    assert numbers(transport) == [1]
    assert delivery.stats()["downstream_callback"].rejected == 1


def test_a_hung_callbacks_transport_is_still_closed(
    make_delivery: Callable[..., Writer],
) -> None:
    """A callback that uses up the shutdown's budget does not keep transports from closing."""
    inside, transport = threading.Event(), RecordingTransport()

    async def function(given: Any) -> None:
        inside.set()
        await asyncio.sleep(3600)

    delivery = make_delivery(transport)
    use_callback(delivery, function)
    delivery.write(0)
    assert inside.wait(30)
    close(delivery, within_seconds=0.05)
    wait_until(lambda: not threads())
    assert transport.closed
    assert delivery.stats()["downstream_callback"].dropped == 1


def test_a_replaced_callback_gets_what_is_queued(make_delivery: Callable[..., Writer]) -> None:
    """The old callback gets the events that were handed over before it was replaced."""
    inside, go_on = threading.Event(), threading.Event()
    old_got: list[int] = []
    new_got: list[int] = []

    async def old(given: dict[str, Any]) -> None:
        inside.set()
        while not go_on.is_set():
            await asyncio.sleep(0.001)
        old_got.append(given["n"])

    async def new(given: dict[str, Any]) -> None:
        new_got.append(given["n"])

    delivery = make_delivery()
    use_callback(delivery, old)
    delivery.write(0, 1)
    assert inside.wait(30)
    use_callback(delivery, new)
    delivery.write(2)
    wait_until(lambda: new_got == [2])
    go_on.set()
    wait_until(lambda: old_got == [0, 1])


def test_without_a_callback_any_more_transports_get_all(
    make_delivery: Callable[..., Writer],
) -> None:
    """None takes the callback away."""
    transport = RecordingTransport()

    async def function(given: Any) -> None: ...

    delivery = make_delivery(transport)
    use_callback(delivery, function)
    delivery.use_callback(None)
    delivery.write(0)
    close(delivery)
    assert numbers(transport) == [0]
    assert list(delivery.stats()) == ["recording"]


def test_callers_wait_for_no_transport_where_one_is_down(
    make_delivery: Callable[..., Writer],
) -> None:
    """One transport in an outage, and there is nothing worth waiting for."""
    down, well = FailingTransport.down(), RecordingTransport()
    delivery = make_delivery(down, well, max_retry_attempts=0, breaker_reset_seconds=1000)
    assert delivery.live
    delivery.write(0)
    wait_until(lambda: delivery.stats()["down"].breaker == "open")
    assert not delivery.live


def test_other_settings_reach_the_lanes(make_delivery: Callable[..., Writer], base: Path) -> None:
    """New options hold for the transports that are there."""
    gated = GatedTransport()
    delivery = make_delivery(gated, log_format="json")
    delivery.use_settings(settings(base, max_pending_events=2, log_format="json"))
    delivery.write(*range(5))
    assert delivery.stats()["gated"].dropped == 3
    gated.open()
    close(delivery)
    assert numbers(gated) == [0, 1]


def test_where_no_thread_can_be_started_events_wait(
    make_delivery: Callable[..., Writer],
) -> None:
    """A refused thread raises nothing; the next event tries again."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    with no_thread_can_be_started():
        delivery.write(0)
    assert delivery.stats()["recording"].lag_events == 1
    delivery.write(1)
    close(delivery)
    assert numbers(transport) == [0, 1]


# asyncio warns of the loop that it has left half made.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_cannot_be_made_is_told_and_tried_again(
    make_delivery: Callable[..., Writer], heard: Heard
) -> None:
    """Where descriptors run out the error handler hears of it, and nothing is lost."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.open(os.devnull, os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        delivery.start()
        wait_until(lambda: heard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {(type(error), context) for error, context in heard} == {(OSError, "delivery thread")}
    delivery.write(0)
    wait_until(lambda: numbers(transport) == [0])
    # The error knows of the half-made loop, which warns when it goes.
    heard.clear()
    gc.collect()


def test_close_soon_ends_without_waiting(make_delivery: Callable[..., Writer]) -> None:
    """A collected gateway's events are sent and its transports closed, in the thread's time."""
    gated = GatedTransport()
    delivery = make_delivery(gated)
    delivery.write(0)
    wait_until(lambda: gated.arrived)
    delivery.close_soon()
    assert not gated.closed
    gated.open()
    wait_until(lambda: not threads())
    assert numbers(gated) == [0]
    assert gated.closed


def test_close_soon_without_a_thread_starts_none(make_delivery: Callable[..., Writer]) -> None:
    """A garbage collection is no moment to start threads."""
    delivery = make_delivery(RecordingTransport())
    delivery.close_soon()
    delivery.start()
    assert threads() == []


def test_a_forked_child_delivers_its_own_events_only(
    make_delivery: Callable[..., Writer],
) -> None:
    """After a fork what the parent has queued is forgotten, and a new thread is started."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    with no_thread_can_be_started():
        delivery.write(0)
    delivery.after_fork_in_child()
    delivery.write(1)
    close(delivery)
    assert numbers(transport) == [1]
    assert delivery.stats()["recording"].dropped == 0


def test_hostile_transports_are_noticed_by_nobody_else(
    make_handler: Callable[..., EventLogHandler], base: Path
) -> None:
    """Others that block, raise BaseException, return None or are slow cost nobody else anything."""
    inside, go_on = threading.Event(), threading.Event()

    class Blocking(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            inside.set()
            go_on.wait(60)
            return True

    class Vague(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            return None  # type: ignore[return-value]

    slow, well = GatedTransport("slow"), RecordingTransport("well")
    bad = FailingTransport(error=BaseException("worse"), name="bad")
    handler = make_handler(
        downstream_transport=[Blocking("blocking"), bad, Vague("vague"), slow, well],
        retry_delay_seconds=0.001,
        shutdown_timeout_seconds=0.05,
    )
    logger = logging.getLogger("tests.hostile")
    logger.propagate, logger.handlers = False, [handler]
    for number in range(300):
        logger.warning("%d", number, extra={"session_id": f"s{number % 3}", "n": number})
        if number == 0:
            assert inside.wait(30)
    assert handler.flush(timeout=30)
    wait_until(lambda: len(well.sent) == 300)
    for session in ("s0", "s1", "s2"):
        mine = [e["n"] for e in well.events if e["session_id"] == session]
        assert mine == list(range(int(session[1]), 300, 3))
        assert [e["n"] for e in events_of(base / session)] == mine
    lags = {name: stats.lag_events for name, stats in handler.stats().transports.items()}
    assert lags["blocking"] == lags["slow"] == 300
    assert lags["well"] == 0
    go_on.set()


class Chatty(FailingTransport):
    """A driver that logs all it does, on every kind of thread, and fails."""

    loggers = ("chatty_driver",)

    def __init__(self) -> None:
        refused = TransportConnectionError("refused")
        super().__init__(error=refused, healthy=True, name="chatty")

    def talk(self, where: str) -> None:
        """Log at DEBUG."""
        logging.getLogger("chatty_driver.wire").debug("from %s", where)

    async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Log here, in a task, in a thread that it was lent, and in one of its own."""
        logging.getLogger("any.library").debug("here")

        async def task() -> None:
            logging.getLogger("any.library").debug("in a task")

        await asyncio.create_task(task())
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, logging.getLogger("any.library").debug, "in a thread")
        own = threading.Thread(target=self.talk, args=("a thread of its own",))
        own.start()
        await asyncio.to_thread(own.join)
        return await super().send(line, metadata)


def test_what_drivers_log_does_not_come_back(
    make_handler: Callable[..., EventLogHandler], base: Path
) -> None:
    """With our handler on the root logger a failing, talking driver makes no event at all."""
    chatty = Chatty()
    handler = make_handler(
        downstream_transport=chatty, retry_delay_seconds=0.001, breaker_reset_seconds=0.001
    )
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    for number in range(10):
        logging.getLogger("app").debug("%d", number, extra={"session_id": "s"})
    wait_until(lambda: chatty.attempts >= 20)
    chatty.recover()
    assert handler.flush(until="transport", timeout=30)
    assert [e["message"] for e in events_of(base)] == [str(n) for n in range(10)]
    assert [e["message"] for e in chatty.events] == [str(n) for n in range(10)]


def test_a_task_of_a_driver_that_exits_does_not_end_the_delivery(
    make_delivery: Callable[..., Writer], heard: Heard
) -> None:
    """SystemExit in a task of its own is a driver's failure."""

    class Exiting(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            if not heard:
                self.task = asyncio.ensure_future(self.exit())
                await asyncio.sleep(60)
            return await super().send(line, metadata)

        async def exit(self) -> None:
            raise SystemExit(3)

    transport = Exiting()
    delivery = make_delivery(transport)
    delivery.write(0)
    wait_until(lambda: numbers(transport) == [0])
    assert heard
    delivery.write(1)
    wait_until(lambda: numbers(transport) == [0, 1])


def test_what_is_left_is_sent_by_the_next_process(make_delivery: Callable[..., Writer]) -> None:
    """An outage that outlasts the process costs no event, and no order."""
    down, up = FailingTransport.down(), RecordingTransport("down")
    first = make_delivery(down, max_retry_attempts=0, breaker_failures=1)
    first.write(0, 1)
    close(first)
    second = make_delivery(up)
    second.write(2)
    wait_until(lambda: numbers(up) == [0, 1, 2])


def test_an_event_after_the_close_is_sent_by_the_next_process(
    make_delivery: Callable[..., Writer],
) -> None:
    """What an exit hook logs after ours stands in the files, and the database knows of it."""
    early, late = RecordingTransport("one"), RecordingTransport("one")
    first = make_delivery(early)
    first.write(0)
    close(first)
    first.write(1)
    assert numbers(early) == [0]
    second = make_delivery(late)
    second.start()
    wait_until(lambda: numbers(late) == [1])


def test_live_only_delivery_is_said(
    make_delivery: Callable[..., Writer], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no jsonl files are written, what that costs is said when it is configured."""
    assert make_delivery(RecordingTransport()).kind == "at-least-once"
    assert capsys.readouterr().err == ""
    assert make_delivery(RecordingTransport(), log_format="json").kind == "live-only"
    assert "delivery is live only, as log_format is not 'jsonl'" in capsys.readouterr().err


def test_live_only_delivery_without_files_is_said(
    make_delivery: Callable[..., Writer], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same without local logging; where nothing is delivered there is nothing to say."""
    make_delivery(enable_local_logging=False)
    assert capsys.readouterr().err == ""
    make_delivery(RecordingTransport(), enable_local_logging=False)
    assert "delivery is live only, as local logging is off" in capsys.readouterr().err


def test_live_only_delivery_drops_at_its_end(make_delivery: Callable[..., Writer]) -> None:
    """What a transport has not taken is counted as dropped, also what comes after the close."""
    gated = GatedTransport()
    delivery = make_delivery(gated, log_format="json")
    delivery.write(0, 1)
    wait_until(lambda: gated.arrived)
    close(delivery, within_seconds=0.01)
    delivery.write(2)
    stats = delivery.stats()["gated"]
    assert (stats.dropped, stats.lag_events) == (3, 0)


def test_flush_names_who_is_behind(make_delivery: Callable[..., Writer]) -> None:
    """A flush waits until its deadline, and tells which transports lack something."""
    gated, well = GatedTransport(), RecordingTransport()
    delivery = make_delivery(gated, well)
    delivery.write(0)
    assert delivery.flush(None, time.monotonic() + 0.05) == ("gated",)
    gated.open()
    assert delivery.flush(None, time.monotonic() + 30) == ()


def test_flush_of_a_session_waits_for_no_other(make_delivery: Callable[..., Writer]) -> None:
    """Another session whose event fails does not hold it up."""

    class Refusing(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            return (metadata or {})["session_id"] != "bad" and await super().send(line, metadata)

    delivery = make_delivery(Refusing(), retry_delay_seconds=1000, breaker_failures=1000)
    delivery.write(0, session="bad")
    delivery.write(1, session="good")
    assert delivery.flush("good", time.monotonic() + 30) == ()
    assert delivery.flush("bad", time.monotonic()) == ("recording",)
    close(delivery, within_seconds=0)


def test_refused_events_are_sent_again_on_demand(make_delivery: Callable[..., Writer]) -> None:
    """What was parked comes with its own line once the far side takes it."""
    transport = FailingTransport(failures=1, healthy=True)
    delivery = make_delivery(transport, max_retry_attempts=0)
    delivery.write(0, 1)
    wait_until(lambda: delivery.stats()["failing"].rejected == 1)
    assert delivery.flush(None, time.monotonic() + 30) == ()
    assert delivery.resend_rejected("failing") == 1
    assert delivery.flush(None, time.monotonic() + 30) == ()
    assert numbers(transport) == [1, 0]
    assert delivery.resend_rejected(None) == 0


def test_who_cannot_send_again_is_told(make_delivery: Callable[..., Writer]) -> None:
    """A name that is not there, or a format that is not read back, is an error that says so."""
    with pytest.raises(ValueError, match=r"no transport is named 'x'; there are \['recording'\]"):
        make_delivery(RecordingTransport()).resend_rejected("x")
    with pytest.raises(ValueError, match="from session files in 'jsonl' only"):
        make_delivery(RecordingTransport(), log_format="json").resend_rejected(None)


def test_another_base_directory_leaves_nothing_behind(
    make_delivery: Callable[..., Writer], base: Path
) -> None:
    """Events that were written below the old base are read from there."""
    down = FailingTransport.down()
    delivery = make_delivery(down, max_retry_attempts=0, breaker_failures=1)
    delivery.write(0)
    wait_until(lambda: delivery.stats()["down"].breaker != "closed")
    options = settings(base.with_name("other"))
    delivery.use_settings(options)
    delivery.files = SessionFiles(
        options.paths("u"),
        Layout("jsonl"),
        max_open_files=5,
        file_mode=0o600,
        directory_mode=0o700,
        registrar=FileRegister(delivery),
    )
    delivery.write(1)
    down.recover()
    wait_until(lambda: numbers(down) == [0, 1])


def test_threads_that_a_driver_borrows_are_ours_too(make_delivery: Callable[..., Writer]) -> None:
    """On the loop's own executor `delivering` is set, as it is on the loop."""
    seen: list[bool] = []

    class Lending(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            loop = asyncio.get_running_loop()
            seen.append(await loop.run_in_executor(None, delivering))
            return True

    delivery = make_delivery(Lending())
    delivery.write(0)
    close(delivery)
    assert seen == [True]


def test_refused_events_of_one_transport_are_sent_again_alone(
    make_delivery: Callable[..., Writer],
) -> None:
    """Asked for one name, the others' parked events stay where they are."""
    first = FailingTransport(failures=1, healthy=True, name="first")
    second = FailingTransport(failures=1, healthy=True, name="second")
    delivery = make_delivery(first, second, max_retry_attempts=0)
    delivery.write(0)
    wait_until(lambda: all(s.rejected == 1 for s in delivery.stats().values()))
    assert delivery.resend_rejected("second") == 1
    wait_until(lambda: numbers(second) == [0])
    assert numbers(first) == []


def test_a_callback_without_room_is_passed_by(make_delivery: Callable[..., Writer]) -> None:
    """What does not fit into the callback's queue goes to the transports at once."""
    inside, go_on, got = threading.Event(), threading.Event(), list[int]()

    async def function(given: dict[str, Any]) -> None:
        inside.set()
        while not go_on.is_set():
            await asyncio.sleep(0.001)
        got.append(given["n"])

    transport = RecordingTransport()
    delivery = make_delivery(transport)
    use_callback(delivery, function, max_pending_events=1)
    delivery.write(0)
    assert inside.wait(30)
    delivery.write(1)
    assert delivery.stats()["downstream_callback"].dropped == 1
    go_on.set()
    wait_until(lambda: numbers(transport) == [1])
    assert got == [0]


def test_delivery_goes_on_without_its_database(
    make_delivery: Callable[..., Writer], base: Path, heard: Heard
) -> None:
    """Where nothing can be saved events are sent, and it is said that a kill would cost some."""
    (base / ".eventlog" / "delivery.sqlite3").mkdir(parents=True)
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    delivery.write(0, 1)
    wait_until(lambda: numbers(transport) == [0, 1])
    assert delivery.kind == "unsaved"
    assert {context for _, context in heard} == {"delivery database"}


def test_a_transport_comes_back_before_it_is_gone(make_delivery: Callable[..., Writer]) -> None:
    """Taken away and given back while its batch is in hand, it goes on after that."""
    gated, again = GatedTransport("one"), RecordingTransport("one")
    delivery = make_delivery(gated, batch_events=1)
    delivery.write(0, 1)
    wait_until(lambda: gated.arrived)
    delivery.use_transports({})
    delivery.use_transports({"one": again})
    delivery.write(2)
    gated.open()
    wait_until(lambda: numbers(again) == [1, 2])
    assert numbers(gated) == [0]
