"""The delivery thread: its start and end, hung and hostile transports, replacement, fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from eventlog_handler import TransportError
from eventlog_handler._config import Settings, resolve
from eventlog_handler._context import delivering
from eventlog_handler._delivery import Delivery
from eventlog_handler._lanes import Callback
from eventlog_handler._report import Report
from eventlog_handler.testing import FailingTransport, GatedTransport, RecordingTransport
from eventlog_handler.typing import OutgoingEvent

QUICK: dict[str, Any] = {
    "retry_delay_seconds": 0.001,
    "breaker_reset_seconds": 0.001,
    "enable_local_logging": False,
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


@pytest.fixture
def make_delivery(heard: Heard) -> Iterator[Callable[..., Delivery]]:
    """Make deliveries that are closed when the test ends."""
    made: list[Delivery] = []

    def make(*transports: RecordingTransport, **options: Any) -> Delivery:
        delivery = Delivery(settings(**options), Report(heard))
        made.append(delivery)
        delivery.use_transports({transport.name: transport for transport in transports})
        return delivery

    yield make
    for delivery in made:
        close(delivery)


def settings(**options: Any) -> Settings:
    """Return settings with hardly any pauses."""
    return resolve({**QUICK, **options}, {})


def close(delivery: Delivery, within_seconds: float = 30) -> None:
    """Close with a budget."""
    delivery.close(time.monotonic() + within_seconds)


def event(number: int) -> OutgoingEvent:
    """Return an event that is told by its number."""
    return OutgoingEvent(
        orjson.dumps({"event": {"n": number}}), f"id-{number}", "s", "note", "2026-01-01"
    )


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


def test_without_a_downstream_there_is_no_thread(make_delivery: Callable[..., Delivery]) -> None:
    """Nothing to deliver to costs no thread, even when asked to start."""
    delivery = make_delivery()
    delivery.start()
    delivery.hand_over([event(0)])
    close(delivery)
    assert threads() == []


def test_the_first_event_starts_the_thread(make_delivery: Callable[..., Delivery]) -> None:
    """A transport costs a thread no earlier than its first event."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    assert threads() == []
    delivery.hand_over([event(0), event(1)])
    wait_until(lambda: numbers(transport) == [0, 1])
    assert len(threads()) == 1
    assert threads()[0].daemon


def test_close_ends_the_thread(make_delivery: Callable[..., Delivery]) -> None:
    """After `close` what was handed over is sent, the transport closed, the thread gone."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    delivery.hand_over([event(n) for n in range(50)])
    close(delivery)
    assert numbers(transport) == list(range(50))
    assert transport.closed
    assert threads() == []


def test_close_closes_a_transport_that_was_never_used(
    make_delivery: Callable[..., Delivery],
) -> None:
    """A transport is ours to close, with events or without."""
    transport = RecordingTransport()
    close(make_delivery(transport))
    assert transport.closed
    assert threads() == []


def test_close_twice_closes_once(make_delivery: Callable[..., Delivery]) -> None:
    """The second `close` finds nothing left to do."""
    closed: list[int] = []

    class Counting(RecordingTransport):
        async def close(self) -> None:
            closed.append(1)

    delivery = make_delivery(Counting())
    close(delivery)
    close(delivery)
    assert closed == [1]


def test_each_transport_gets_each_event(make_delivery: Callable[..., Delivery]) -> None:
    """Two transports each get all events, in order."""
    first, second = RecordingTransport("first"), RecordingTransport("second")
    delivery = make_delivery(first, second)
    delivery.hand_over([event(0), event(1)])
    close(delivery)
    assert (numbers(first), numbers(second)) == ([0, 1], [0, 1])
    assert list(delivery.stats()) == ["first", "second"]


def test_send_releases_for_each_transport(make_delivery: Callable[..., Delivery]) -> None:
    """Who waits for an event is released by each transport once it has decided."""
    delivery = make_delivery(RecordingTransport("first"), RecordingTransport("second"))
    released: list[int] = []
    delivery.send(event(0), lambda: released.append(0))
    close(delivery)
    assert released == [0, 0]


def test_a_transport_that_is_down_holds_back_no_other(
    make_delivery: Callable[..., Delivery],
) -> None:
    """An outage of one transport is its own."""
    down, well = FailingTransport.down(), RecordingTransport()
    delivery = make_delivery(down, well)
    delivery.hand_over([event(n) for n in range(5)])
    wait_until(lambda: numbers(well) == [0, 1, 2, 3, 4])
    wait_until(lambda: delivery.stats()["down"].breaker != "closed")
    assert delivery.stats()["down"].lag_events == 5
    down.recover()
    wait_until(lambda: numbers(down) == [0, 1, 2, 3, 4])


def test_a_hung_transport_does_not_outlast_the_budget(
    make_delivery: Callable[..., Delivery],
) -> None:
    """What a hung transport has not taken is counted, it is closed, and others have all."""
    gated, well = GatedTransport(), RecordingTransport()
    delivery = make_delivery(gated, well)
    delivery.hand_over([event(n) for n in range(3)])
    wait_until(lambda: gated.arrived and len(well.sent) == 3)
    close(delivery, within_seconds=0.05)
    wait_until(lambda: not threads())
    assert gated.closed
    assert well.closed
    assert delivery.stats()["gated"].dropped == 3
    assert delivery.stats()["recording"].sent == 3


def test_a_transport_that_blocks_its_loop_is_left_behind(
    make_delivery: Callable[..., Delivery],
) -> None:
    """`close` returns though a driver never gives the loop back."""
    inside, go_on = threading.Event(), threading.Event()

    class Blocking(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            inside.set()
            go_on.wait(60)
            return await super().send(line, metadata)

    delivery = make_delivery(Blocking())
    delivery.hand_over([event(0)])
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
    make_delivery: Callable[..., Delivery], heard: Heard, error: BaseException | None
) -> None:
    """Whatever a driver does in `send`, the event is sent again and the thread lives on."""
    transport = FailingTransport(failures=2, error=error)
    delivery = make_delivery(transport)
    delivery.hand_over([event(0), event(1)])
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
    make_delivery: Callable[..., Delivery], error: BaseException
) -> None:
    """Whatever a replaced transport does in `close`, the others keep their events and go on."""
    closing = threading.Event()

    class BadlyClosed(RecordingTransport):
        async def close(self) -> None:
            closing.set()
            raise error

    bad, gated = BadlyClosed("bad"), GatedTransport()
    delivery = make_delivery(bad, gated)
    delivery.hand_over([event(0)])
    wait_until(lambda: gated.arrived)
    delivery.use_transports({"gated": gated})
    assert closing.wait(30)
    # One more turn of the loop, or the end of it: what the close does to others has happened.
    delivery.hand_over([event(1)])
    gated.open()
    wait_until(lambda: delivery.stats()["gated"].lag_events == 0)
    close(delivery)
    assert numbers(gated) == [0, 1]
    assert delivery.stats()["gated"].dropped == 0


def test_transports_run_as_our_own_doing(make_delivery: Callable[..., Delivery]) -> None:
    """Inside a send `delivering` is set, so that what a driver logs does not come back in."""
    seen: list[bool] = []

    class Looking(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            seen.append(delivering.get())
            return True

    delivery = make_delivery(Looking())
    delivery.hand_over([event(0)])
    close(delivery)
    assert seen == [True]
    assert delivering.get() is False


def test_a_new_transport_joins_a_running_thread(make_delivery: Callable[..., Delivery]) -> None:
    """A transport that is added gets the events from then on; the one that stays keeps all."""
    first, second = RecordingTransport("first"), RecordingTransport("second")
    delivery = make_delivery(first)
    delivery.hand_over([event(0)])
    wait_until(lambda: numbers(first) == [0])
    delivery.use_transports({"first": first, "second": second})
    delivery.hand_over([event(1)])
    wait_until(lambda: numbers(second) == [1])
    close(delivery)
    assert numbers(first) == [0, 1]
    assert delivery.stats()["first"].sent == 2


def test_a_replaced_transport_gets_what_is_queued_and_is_closed(
    make_delivery: Callable[..., Delivery],
) -> None:
    """The old one of a name finishes its queue while the new one gets the next events."""
    old, new = GatedTransport("one"), RecordingTransport("one")
    delivery = make_delivery(old)
    delivery.hand_over([event(0), event(1)])
    wait_until(lambda: old.arrived)
    delivery.use_transports({"one": new})
    delivery.hand_over([event(2)])
    wait_until(lambda: numbers(new) == [2])
    assert not old.closed
    old.open()
    wait_until(lambda: old.closed)
    assert numbers(old) == [0, 1]
    assert not new.closed


def test_a_transport_that_goes_before_its_first_event_is_closed(
    make_delivery: Callable[..., Delivery],
) -> None:
    """A transport is closed even where it goes before the thread was ever started."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    delivery.use_transports({})
    wait_until(lambda: transport.closed)
    assert delivery.stats() == {}


def test_a_replaced_transport_is_finished_at_close(
    make_delivery: Callable[..., Delivery],
) -> None:
    """Closing waits for those that were replaced before, too."""
    old = GatedTransport()
    delivery = make_delivery(old)
    delivery.hand_over([event(0)])
    wait_until(lambda: old.arrived)
    delivery.use_transports({})
    threading.Timer(0.05, old.open).start()
    close(delivery)
    assert numbers(old) == [0]
    assert old.closed


def test_a_transport_is_adopted_once(make_delivery: Callable[..., Delivery]) -> None:
    """A lane that is found twice, by the starting thread and by its owner, runs once."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    delivery.hand_over([event(0)])
    wait_until(lambda: numbers(transport) == [0])
    (lane,) = delivery._lanes()
    delivery._on_loop(delivery._adopt, lane)
    delivery.hand_over([event(1), event(2)])
    close(delivery)
    assert numbers(transport) == [0, 1, 2]


def use_callback(delivery: Delivery, function: Callable[[Any], Any], **options: Any) -> None:
    """Put a callback before the transports."""
    delivery.use_callback(Callback(function, settings(**options), Report(None)))


def test_a_callback_comes_first(make_delivery: Callable[..., Delivery]) -> None:
    """Events that nobody awaits go to the callback; the transports get what it refuses."""
    transport, got = RecordingTransport(), list[Any]()

    async def function(given: dict[str, Any]) -> None:
        if given["n"] == 1:
            raise ValueError
        got.append(given["n"])

    delivery = make_delivery(transport)
    use_callback(delivery, function, max_retry_attempts=0)
    delivery.hand_over([event(0), event(1), event(2)])
    close(delivery)
    assert got == [0, 2]
    assert numbers(transport) == [1]
    assert delivery.stats()["downstream_callback"].rejected == 1


def test_a_hung_callbacks_transport_is_still_closed(
    make_delivery: Callable[..., Delivery],
) -> None:
    """A callback that uses up the shutdown's budget does not keep transports from closing."""
    inside, transport = threading.Event(), RecordingTransport()

    async def function(given: Any) -> None:
        inside.set()
        await asyncio.sleep(3600)

    delivery = make_delivery(transport)
    use_callback(delivery, function)
    delivery.hand_over([event(0)])
    assert inside.wait(30)
    close(delivery, within_seconds=0.05)
    wait_until(lambda: not threads())
    assert transport.closed
    assert delivery.stats()["downstream_callback"].dropped == 1


def test_send_passes_the_callback_by(make_delivery: Callable[..., Delivery]) -> None:
    """What a caller's own callback has refused goes to the transports alone."""
    transport, got = RecordingTransport(), list[Any]()

    async def function(given: Any) -> None:
        got.append(given)

    delivery = make_delivery(transport)
    use_callback(delivery, function)
    delivery.send(event(0), lambda: None)
    close(delivery)
    assert (got, numbers(transport)) == ([], [0])


def test_a_replaced_callback_gets_what_is_queued(make_delivery: Callable[..., Delivery]) -> None:
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
    delivery.hand_over([event(0), event(1)])
    assert inside.wait(30)
    use_callback(delivery, new)
    delivery.hand_over([event(2)])
    wait_until(lambda: new_got == [2])
    go_on.set()
    wait_until(lambda: old_got == [0, 1])


def test_without_a_callback_any_more_transports_get_all(
    make_delivery: Callable[..., Delivery],
) -> None:
    """None takes the callback away."""
    transport = RecordingTransport()

    async def function(given: Any) -> None: ...

    delivery = make_delivery(transport)
    use_callback(delivery, function)
    delivery.use_callback(None)
    delivery.hand_over([event(0)])
    close(delivery)
    assert numbers(transport) == [0]
    assert list(delivery.stats()) == ["recording"]


def test_callers_wait_for_all_transports_or_none(make_delivery: Callable[..., Delivery]) -> None:
    """One transport in an outage, and there is nothing worth waiting for."""
    down, well = FailingTransport.down(), RecordingTransport()
    delivery = make_delivery(down, well, max_retry_attempts=0, breaker_reset_seconds=1000)
    assert delivery.live_transports == 2
    delivery.hand_over([event(0)])
    wait_until(lambda: delivery.stats()["down"].breaker == "open")
    assert delivery.live_transports == 0


def test_without_transports_nobody_waits(make_delivery: Callable[..., Delivery]) -> None:
    """There is nothing to wait for."""
    assert make_delivery().live_transports == 0


def test_other_settings_reach_the_lanes(make_delivery: Callable[..., Delivery]) -> None:
    """New options hold for the transports that are there."""
    gated = GatedTransport()
    delivery = make_delivery(gated)
    delivery.use_settings(settings(max_pending_events=2))
    delivery.hand_over([event(n) for n in range(5)])
    assert delivery.stats()["gated"].dropped == 3
    gated.open()
    close(delivery)
    assert numbers(gated) == [0, 1]


def test_where_no_thread_can_be_started_events_wait(
    make_delivery: Callable[..., Delivery],
) -> None:
    """A refused thread raises nothing; the next event tries again."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    with no_thread_can_be_started():
        delivery.hand_over([event(0)])
    assert delivery.stats()["recording"].lag_events == 1
    delivery.hand_over([event(1)])
    close(delivery)
    assert numbers(transport) == [0, 1]


def test_where_no_thread_can_be_started_close_counts(
    make_delivery: Callable[..., Delivery],
) -> None:
    """At the interpreter's end what is queued is counted, its callers are released."""
    delivery = make_delivery(RecordingTransport())
    released: list[int] = []
    with no_thread_can_be_started():
        delivery.send(event(0), lambda: released.append(0))
        close(delivery)
    assert delivery.stats()["recording"].dropped == 1
    assert released == [0]


# asyncio warns of the loop that it has left half made.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_cannot_be_made_is_told_and_tried_again(
    make_delivery: Callable[..., Delivery], heard: Heard
) -> None:
    """Where descriptors run out the error handler hears of it, and nothing is lost."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.open(os.devnull, os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        delivery.hand_over([event(0)])
        wait_until(lambda: not threads())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [(type(error), context) for error, context in heard] == [(OSError, "delivery thread")]
    heard.clear()
    gc.collect()
    delivery.hand_over([event(1)])
    close(delivery)
    assert numbers(transport) == [0, 1]


def test_after_close_events_are_counted_as_dropped(
    make_delivery: Callable[..., Delivery],
) -> None:
    """An event that comes too late starts no thread; it is counted and its caller released."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    close(delivery)
    released: list[int] = []
    delivery.send(event(0), lambda: released.append(0))
    assert threads() == []
    assert delivery.stats()["recording"].dropped == 1
    assert released == [0]


def test_close_soon_ends_without_waiting(make_delivery: Callable[..., Delivery]) -> None:
    """A collected gateway's events are sent and its transports closed, in the thread's time."""
    gated = GatedTransport()
    delivery = make_delivery(gated)
    delivery.hand_over([event(0)])
    wait_until(lambda: gated.arrived)
    delivery.close_soon()
    assert not gated.closed
    gated.open()
    wait_until(lambda: not threads())
    assert numbers(gated) == [0]
    assert gated.closed


def test_close_soon_without_a_thread_starts_none(make_delivery: Callable[..., Delivery]) -> None:
    """A garbage collection is no moment to start threads."""
    delivery = make_delivery(RecordingTransport())
    delivery.close_soon()
    delivery.start()
    assert threads() == []


def test_a_forked_child_delivers_its_own_events_only(
    make_delivery: Callable[..., Delivery],
) -> None:
    """After a fork what the parent has queued is forgotten, and a new thread is started."""
    transport = RecordingTransport()
    delivery = make_delivery(transport)
    with no_thread_can_be_started():
        delivery.hand_over([event(0)])
    delivery.after_fork_in_child()
    delivery.hand_over([event(1)])
    close(delivery)
    assert numbers(transport) == [1]
    assert delivery.stats()["recording"].dropped == 0
