"""Lanes, run in each event loop: attempts, retries, the breaker, queues and their ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import orjson
import pytest

from eventlog_handler import (
    TransportConnectionError,
    TransportError,
    TransportInterface,
    TransportTimeoutError,
)
from eventlog_handler._config import Settings, resolve
from eventlog_handler._lanes import (
    Callback,
    CallbackLane,
    Downstream,
    Lane,
    TransportLane,
    backoff_seconds,
)
from eventlog_handler._report import Report
from eventlog_handler.testing import FailingTransport, GatedTransport, RecordingTransport
from eventlog_handler.typing import OutgoingEvent

QUICK: dict[str, Any] = {
    "retry_delay_seconds": 0.001,
    "breaker_reset_seconds": 0.001,
    "enable_local_logging": False,
}
SYSTEM_ERRORS = [RuntimeError("bad"), SystemExit(3), KeyboardInterrupt()]


class Heard(list[tuple[Exception, str]]):
    """An error handler that remembers."""

    def __call__(self, error: Exception, context: str) -> None:
        self.append((error, context))


@pytest.fixture
def heard() -> Heard:
    """What the error handler hears."""
    return Heard()


def settings(**options: Any) -> Settings:
    """Return settings with hardly any pauses."""
    return resolve({**QUICK, **options}, {})


@pytest.fixture
def make_lane(heard: Heard) -> Callable[..., TransportLane]:
    """Make lanes that tell `heard` of their failures."""

    def make(transport: TransportInterface, **options: Any) -> TransportLane:
        return TransportLane("there", transport, settings(**options), Report(heard))

    return make


@pytest.fixture
def make_callback(heard: Heard) -> Callable[..., Callback]:
    """Make callbacks that tell `heard` of their failures."""

    def make(function: Callable[[Any], Awaitable[object]], **options: Any) -> Callback:
        return Callback(function, settings(**options), Report(heard))

    return make


def event(number: int) -> OutgoingEvent:
    """Return an event that is told by its number."""
    return OutgoingEvent(
        orjson.dumps({"event": {"n": number}}), f"id-{number}", "s", "note", "2026-01-01"
    )


def numbers(transport: RecordingTransport) -> list[int]:
    """Return the numbers of the events that a transport took."""
    return [sent["n"] for sent in transport.events]


async def wait_until(predicate: Callable[[], object]) -> None:
    """Wait for something to become true, with a bound against hanging only."""
    with anyio.fail_after(30):
        while not predicate():
            await anyio.sleep(0.001)


@contextlib.asynccontextmanager
async def running(lane: Lane) -> AsyncIterator[None]:
    """Run a lane in this loop, and end it."""
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run)
        try:
            yield
            lane.end()
        except BaseException:
            lane.cancelling()
            raise


async def run_to_the_end(lane: Lane, *events: OutgoingEvent) -> None:
    """Run a lane until it has decided these events."""
    for each in events:
        lane.put(each)
    with anyio.fail_after(30):
        async with running(lane):
            await wait_until(lambda: lane.waiting == 0)


@pytest.mark.parametrize(
    ("attempt", "expected"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (10_000, 5.0)]
)
def test_backoff_doubles_up_to_the_longest(attempt: int, expected: float) -> None:
    """The pause doubles with each retry and ends at the longest, without overflow."""
    assert backoff_seconds(attempt, 1.0, 5.0, 1.0) == expected


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 0.0), (0.25, 0.5), (1.0, 2.0)])
def test_backoff_has_full_jitter(chance: float, expected: float) -> None:
    """A random share of the pause is waited, from nothing to all."""
    assert backoff_seconds(2, 1.0, 60.0, chance) == expected


@pytest.mark.anyio
async def test_events_are_sent_in_order(make_lane: Callable[..., TransportLane]) -> None:
    """A transport gets each event once, in order, with line and metadata."""
    transport = RecordingTransport()
    await run_to_the_end(make_lane(transport), *map(event, range(20)))
    assert transport.sent == [(event(n).line, event(n).metadata) for n in range(20)]


@pytest.mark.anyio
async def test_a_lane_closes_its_transport_at_its_end(
    make_lane: Callable[..., TransportLane],
) -> None:
    """The transport is open while the lane runs, and closed when it has ended."""
    transport = RecordingTransport()
    lane = make_lane(transport)
    async with running(lane):
        assert lane.stats().connected
    assert transport.closed
    assert not lane.stats().connected


@pytest.mark.anyio
async def test_a_lane_that_ends_sends_what_is_queued(
    make_lane: Callable[..., TransportLane],
) -> None:
    """Events that were put before the end are sent before the close."""
    transport = RecordingTransport()
    lane = make_lane(transport)
    for number in range(3):
        lane.put(event(number))
    lane.end()
    await lane.run()
    assert numbers(transport) == [0, 1, 2]


@pytest.mark.anyio
async def test_put_asks_for_a_wake_up_of_an_idle_lane(
    make_lane: Callable[..., TransportLane],
) -> None:
    """`put` says whether the lane sleeps; woken, it sends."""
    transport = GatedTransport()
    lane = make_lane(transport)
    assert lane.put(event(0)) is False
    transport.open()
    async with running(lane):
        await wait_until(lambda: numbers(transport) == [0])
        await wait_until(lambda: lane.put(event(1)))
        lane.wake()
        await wait_until(lambda: lane.waiting == 0)
    assert numbers(transport)[-1] == 1


@pytest.mark.anyio
async def test_an_event_that_comes_while_a_lane_lies_down_is_not_overlooked(
    make_lane: Callable[..., TransportLane], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put just before the lane counts as idle, which wakes nobody, is seen all the same."""
    transport = RecordingTransport()
    lane, real = make_lane(transport), anyio.Event
    woken: list[bool] = []

    def another_thread_is_here() -> anyio.Event:
        if not woken:
            woken.append(lane.put(event(0)))
        return real()

    monkeypatch.setattr(anyio, "Event", another_thread_is_here)
    async with running(lane):
        await wait_until(lambda: transport.sent)
    assert woken == [False]


@pytest.mark.anyio
async def test_released_is_called_once_an_event_is_sent(
    make_lane: Callable[..., TransportLane],
) -> None:
    """Who waits for an event hears of it after it was sent, once."""
    transport = RecordingTransport()
    lane = make_lane(transport)
    seen: list[list[int]] = []
    lane.put(event(0), lambda: seen.append(numbers(transport)))
    await run_to_the_end(lane)
    assert seen == [[0]]


@pytest.mark.anyio
async def test_failed_attempts_are_retried(make_lane: Callable[..., TransportLane]) -> None:
    """A failed event is sent again until it is taken, before the next one."""
    transport = FailingTransport(failures=2)
    lane = make_lane(transport)
    await run_to_the_end(lane, event(0), event(1))
    assert numbers(transport) == [0, 1]
    assert transport.attempts == 4
    stats = lane.stats()
    assert (stats.sent, stats.failed, stats.retried, stats.rejected) == (2, 2, 2, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [None, False, 1, "true"])
async def test_only_true_is_an_acknowledgement(
    make_lane: Callable[..., TransportLane], heard: Heard, answer: Any
) -> None:
    """What a `send` returns that is not True is a failure, and is tried again."""

    class Vague(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            await super().send(line, metadata)
            first: bool = answer
            return first if len(self.sent) == 1 else True

    transport = Vague()
    await run_to_the_end(make_lane(transport), event(0))
    assert numbers(transport) == [0, 0]
    error, context = heard[0]
    assert len(heard) == 1
    assert type(error) is TransportError
    assert str(error) == f"send returned {answer!r}; True is the only acknowledgement"
    assert context == "there"


@pytest.mark.anyio
@pytest.mark.parametrize("error", SYSTEM_ERRORS, ids=lambda error: type(error).__name__)
async def test_whatever_a_send_raises_is_its_failure(
    make_lane: Callable[..., TransportLane], heard: Heard, error: BaseException
) -> None:
    """Even a driver's SystemExit is told, counted and retried, and ends nothing."""
    transport = FailingTransport(failures=1, error=error)
    lane = make_lane(transport)
    await run_to_the_end(lane, event(0))
    assert numbers(transport) == [0]
    told = heard[0][0]
    assert told is error or (type(told) is TransportError and told.__cause__ is error)
    assert lane.stats().last_error is not None
    assert type(error).__name__ in str(lane.stats().last_error)
    assert lane.stats().failed == 1


@pytest.mark.anyio
async def test_the_last_error_is_cut_short(make_lane: Callable[..., TransportLane]) -> None:
    """`stats()` holds no more than 200 characters of an error."""
    lane = make_lane(FailingTransport(failures=1, error=ValueError("x" * 1000)))
    await run_to_the_end(lane, event(0))
    assert lane.stats().last_error == ("ValueError: " + "x" * 1000)[:200]


@pytest.mark.anyio
async def test_a_send_that_hangs_is_timed_out_and_sent_again(
    make_lane: Callable[..., TransportLane], heard: Heard
) -> None:
    """A time-out is ambiguous: the event goes out again under the same id."""
    ids: list[str] = []

    class HangsOnce(RecordingTransport):
        async def send(self, line: Any, metadata: dict[str, Any] | None = None) -> bool:
            ids.append((metadata or {})["id"])
            if len(ids) == 1:
                await anyio.sleep_forever()
            return await super().send(line, metadata)

    transport = HangsOnce()
    await run_to_the_end(make_lane(transport, send_timeout_seconds=0.05), event(7))
    assert set(ids) == {"id-7"}
    assert numbers(transport) == [7]
    assert type(heard[0][0]) is TransportTimeoutError


@pytest.mark.anyio
async def test_a_cancellation_from_inside_a_driver_is_its_failure(
    make_lane: Callable[..., TransportLane], heard: Heard
) -> None:
    """A CancelledError that nobody asked for does not end the lane."""
    transport = FailingTransport(failures=1, error=asyncio.CancelledError())
    lane = make_lane(transport)
    await run_to_the_end(lane, event(0))
    assert numbers(transport) == [0]
    assert [type(error) for error, _ in heard] == [TransportError]


@pytest.mark.anyio
async def test_a_closed_coroutine_is_left_to_close(heard: Heard) -> None:
    """GeneratorExit is how Python closes a coroutine: it gets out of attempt and check."""
    downstream = Downstream("there", settings(), Report(heard), lambda: False)

    async def closed() -> bool:
        raise GeneratorExit

    with pytest.raises(GeneratorExit):
        await downstream.attempt(closed, needs_true=True)
    with pytest.raises(GeneratorExit):
        await downstream.healthy(closed)
    assert heard == []


@pytest.mark.anyio
async def test_a_refused_event_does_not_hold_back_the_rest(
    make_lane: Callable[..., TransportLane],
) -> None:
    """Where the far side is well and refuses one event, it is rejected and the next is sent."""
    transport = FailingTransport(failures=3, healthy=True)
    lane = make_lane(transport, max_retry_attempts=2)
    await run_to_the_end(lane, event(0), event(1))
    assert numbers(transport) == [1]
    stats = lane.stats()
    assert (stats.sent, stats.failed, stats.retried, stats.rejected) == (1, 3, 2, 1)


@pytest.mark.anyio
async def test_no_retries_means_one_attempt(make_lane: Callable[..., TransportLane]) -> None:
    """`max_retry_attempts=0` rejects after the first failure."""
    transport = FailingTransport(failures=1, healthy=True)
    lane = make_lane(transport, max_retry_attempts=0)
    await run_to_the_end(lane, event(0), event(1))
    assert numbers(transport) == [1]
    assert (lane.stats().retried, lane.stats().rejected) == (0, 1)


@pytest.mark.anyio
async def test_an_outage_loses_no_event(make_lane: Callable[..., TransportLane]) -> None:
    """While the far side is down events wait, beyond all retries, and go out in order after."""
    transport = FailingTransport.down()
    lane = make_lane(transport, max_retry_attempts=1)
    async with running(lane):
        for number in range(3):
            lane.put(event(number))
        lane.wake()
        await wait_until(lambda: lane.stats().breaker == "open")
        assert lane.stats().lag_events == 3
        transport.recover()
        await wait_until(lambda: lane.waiting == 0)
    assert numbers(transport) == [0, 1, 2]
    assert (lane.stats().rejected, lane.stats().dropped) == (0, 0)
    assert lane.stats().breaker == "closed"


class Checked(FailingTransport):
    """Counts its health checks; each may raise, or be held up."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(error=TransportConnectionError("refused"))
        self.checks = 0
        self.check_error = error
        self.hang = False

    async def health_check(self) -> bool:
        """Raise what was asked for, else answer."""
        self.checks += 1
        if self.hang:
            await anyio.sleep_forever()
        if self.check_error is not None and self.failures:
            raise self.check_error
        return await super().health_check()


@pytest.mark.anyio
async def test_an_open_breaker_asks_for_health_and_sends_nothing(
    make_lane: Callable[..., TransportLane],
) -> None:
    """After failures in a row only health checks go out, until one says yes."""
    transport = Checked()
    lane = make_lane(transport, breaker_failures=2, max_retry_attempts=9)
    lane.put(event(0))
    async with running(lane):
        await wait_until(lambda: transport.checks >= 3)
        assert transport.attempts == 2
        transport.recover()
        await wait_until(lambda: lane.waiting == 0)
    assert numbers(transport) == [0]
    assert transport.attempts == 3


@pytest.mark.anyio
async def test_a_failed_probe_opens_the_breaker_again(
    make_lane: Callable[..., TransportLane],
) -> None:
    """Where health is claimed but the send fails, one attempt is made for each probe."""
    transport = FailingTransport(failures=4, healthy=True)
    lane = make_lane(transport, breaker_failures=1, max_retry_attempts=9)
    await run_to_the_end(lane, event(0))
    assert numbers(transport) == [0]
    assert lane.stats().retried == 0
    assert lane.stats().breaker == "closed"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [*SYSTEM_ERRORS, asyncio.CancelledError()], ids=lambda error: type(error).__name__
)
async def test_a_health_check_that_raises_says_no(
    make_lane: Callable[..., TransportLane], error: BaseException
) -> None:
    """Whatever a health check raises, the outage goes on and the event waits."""
    transport = Checked(error)
    lane = make_lane(transport, max_retry_attempts=0)
    lane.put(event(0))
    async with running(lane):
        await wait_until(lambda: transport.checks >= 3)
        assert lane.stats().rejected == 0
        transport.recover()
        await wait_until(lambda: lane.waiting == 0)
    assert numbers(transport) == [0]


@pytest.mark.anyio
async def test_a_health_check_that_raises_is_told(
    make_lane: Callable[..., TransportLane], heard: Heard
) -> None:
    """The error handler hears of every failure, a failed health check's too."""
    error = RuntimeError("bad check")
    transport = Checked(error)
    lane = make_lane(transport, max_retry_attempts=0)
    lane.put(event(0))
    async with running(lane):
        await wait_until(lambda: transport.checks >= 2)
        transport.recover()
        await wait_until(lambda: lane.waiting == 0)
    assert lane.stats().last_error == "RuntimeError: bad check"
    assert error in [told for told, _ in heard]


@pytest.mark.anyio
async def test_a_health_check_that_hangs_says_no(
    make_lane: Callable[..., TransportLane],
) -> None:
    """A health check has the time of one attempt."""
    transport = Checked()
    transport.hang = True
    lane = make_lane(transport, max_retry_attempts=0, send_timeout_seconds=0.01)
    lane.put(event(0))
    async with running(lane):
        await wait_until(lambda: transport.checks >= 2)
        assert lane.stats().rejected == 0
        transport.hang = False
        transport.recover()
        await wait_until(lambda: lane.waiting == 0)
    assert numbers(transport) == [0]


@pytest.mark.anyio
async def test_an_outage_does_not_hold_up_the_end(
    make_lane: Callable[..., TransportLane],
) -> None:
    """A lane that ends while its far side is down drops and counts what is left, and closes."""
    transport = FailingTransport.down()
    lane = make_lane(transport, max_retry_attempts=0, breaker_reset_seconds=1000)
    released: list[int] = []
    lane.put(event(0), lambda: released.append(0))
    lane.put(event(1), lambda: released.append(1))
    lane.put(event(2))
    with anyio.fail_after(30):
        async with running(lane):
            await wait_until(lambda: lane.stats().breaker == "open")
    assert lane.stats().dropped == 3
    assert lane.stats().lag_events == 0
    assert released == [0, 1]
    assert transport.closed


@pytest.mark.anyio
async def test_a_cancelled_lane_counts_what_it_leaves(
    make_lane: Callable[..., TransportLane],
) -> None:
    """A lane that is cut off in mid-send counts its events as dropped, and still closes."""
    transport = GatedTransport()
    lane = make_lane(transport)
    lane.put(event(0))
    lane.put(event(1))
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run)
        await wait_until(lambda: transport.arrived)
        lane.cancelling()
        group.cancel_scope.cancel()
    assert lane.stats().dropped == 2
    assert transport.closed


@pytest.mark.anyio
async def test_a_lane_is_cancelled_during_a_health_check(
    make_lane: Callable[..., TransportLane],
) -> None:
    """Our own cancellation gets out of a health check, too."""
    transport = Checked()
    transport.hang = True
    lane = make_lane(transport, max_retry_attempts=0)
    lane.put(event(0))
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run)
        await wait_until(lambda: transport.checks)
        lane.cancelling()
        group.cancel_scope.cancel()
    assert lane.stats().dropped == 1
    assert transport.closed


class BadlyClosed(RecordingTransport):
    """Closes with an error, or never."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    async def close(self) -> None:
        """Raise, or hang."""
        if self.error is None:
            await anyio.sleep_forever()
        else:
            raise self.error


@pytest.mark.anyio
async def test_a_close_that_raises_is_told(
    make_lane: Callable[..., TransportLane], heard: Heard
) -> None:
    """An error of a transport's `close` reaches the error handler and nobody else."""
    error = RuntimeError("bad close")
    await run_to_the_end(make_lane(BadlyClosed(error)), event(0))
    assert heard == [(error, "there: close")]


@pytest.mark.anyio
async def test_a_close_that_hangs_has_the_shutdown_budget(
    make_lane: Callable[..., TransportLane],
) -> None:
    """A transport that does not close does not hold up the lane's end for long."""
    with anyio.fail_after(30):
        await run_to_the_end(make_lane(BadlyClosed(None), shutdown_timeout_seconds=0.01))


@pytest.mark.anyio
async def test_a_cancelled_lane_gives_its_close_little_time(
    make_lane: Callable[..., TransportLane],
) -> None:
    """Once the shutdown's budget is used up, a hanging close is given up soon."""
    lane = make_lane(BadlyClosed(None), shutdown_timeout_seconds=1000)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(lane.run)
            await wait_until(lambda: lane.put(event(0)))
            lane.cancelling()
            group.cancel_scope.cancel()


def test_a_full_queue_drops_and_says_so_once(
    make_lane: Callable[..., TransportLane], capsys: pytest.CaptureFixture[str]
) -> None:
    """What finds no room during an outage is counted; one line on stderr says where it is."""
    lane = make_lane(RecordingTransport(), max_pending_events=2)
    for number in range(5):
        lane.put(event(number))
    assert (lane.stats().lag_events, lane.stats().dropped) == (2, 3)
    assert capsys.readouterr().err == (
        "eventlog_handler: there is behind: events stay in their files only\n"
    )


def test_nobody_waits_for_an_event_that_found_no_room(
    make_lane: Callable[..., TransportLane],
) -> None:
    """The fate of a dropped event is decided: who waits for it is released at once."""
    lane = make_lane(RecordingTransport(), max_pending_events=1)
    released: list[int] = []
    lane.put(event(0), lambda: released.append(0))
    lane.put(event(1), lambda: released.append(1))
    assert released == [1]


@pytest.mark.anyio
async def test_other_settings_are_used_at_once(make_lane: Callable[..., TransportLane]) -> None:
    """A lane goes by new options: room, and retries."""
    transport = FailingTransport(failures=1, healthy=True)
    lane = make_lane(transport, max_pending_events=1, max_retry_attempts=0)
    lane.put(event(0))
    lane.use_settings(settings(max_pending_events=2, max_retry_attempts=1))
    lane.put(event(1))
    await run_to_the_end(lane)
    assert numbers(transport) == [0, 1]
    assert lane.dropped == 0


@pytest.mark.anyio
@pytest.mark.parametrize(("patience", "live"), [(1000, True), (0, False)])
async def test_a_busy_lane_is_live_for_as_long_as_callers_wait(
    make_lane: Callable[..., TransportLane], patience: float, live: bool
) -> None:
    """A lane whose send takes longer than callers wait is not waited for."""
    transport = GatedTransport()
    lane = make_lane(transport, downstream_wait_seconds=patience)
    assert lane.live
    lane.put(event(0))
    async with running(lane):
        await wait_until(lambda: transport.arrived)
        assert lane.live is live
        transport.open()
        await wait_until(lambda: lane.waiting == 0)
        assert lane.live


@pytest.mark.anyio
async def test_a_lane_in_an_outage_is_not_live(make_lane: Callable[..., TransportLane]) -> None:
    """Nobody waits for a lane whose breaker is open."""
    transport = FailingTransport.down()
    lane = make_lane(transport, max_retry_attempts=0, breaker_reset_seconds=1000)
    lane.put(event(0))
    async with running(lane):
        await wait_until(lambda: lane.stats().breaker == "open")
        assert not lane.live


def test_a_forked_child_has_an_empty_queue(make_lane: Callable[..., TransportLane]) -> None:
    """What the parent has queued is the parent's to send."""
    lane = make_lane(RecordingTransport())
    lane.put(event(0))
    lane.after_fork_in_child()
    assert (lane.waiting, lane.dropped) == (0, 0)


def test_a_transport_that_cannot_say_is_not_connected(
    make_lane: Callable[..., TransportLane],
) -> None:
    """`stats()` does not fail where `is_connected` does."""

    class Unsure(RecordingTransport):
        @property
        def is_connected(self) -> bool:
            raise RuntimeError

    assert make_lane(Unsure()).stats().connected is False


def test_the_figures_of_a_new_lane(make_lane: Callable[..., TransportLane]) -> None:
    """A lane begins with nothing sent, nothing failed, and a closed breaker."""
    assert make_lane(RecordingTransport()).stats()._asdict() == {
        "sent": 0,
        "failed": 0,
        "retried": 0,
        "rejected": 0,
        "dropped": 0,
        "lag_events": 0,
        "breaker": "closed",
        "connected": True,
        "last_error": None,
    }


async def probe_is_due(callback: Callback) -> None:
    """Wait until the pause of a callback's open breaker is over."""
    await wait_until(lambda: callback.breaker.seconds_to_probe(time.monotonic()) == 0)


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


@pytest.mark.anyio
async def test_a_callback_gets_the_very_object(make_callback: Callable[..., Callback]) -> None:
    """A callback is given the live event, and returning at all is taking it."""
    function, given = Function(), object()
    assert await make_callback(function).deliver(given) is True
    assert function.got == [given]


@pytest.mark.anyio
async def test_a_callback_is_retried(make_callback: Callable[..., Callback]) -> None:
    """A callback that raises is called again, as often as the options say."""
    function = Function(failures=2)
    callback = make_callback(function, max_retry_attempts=2)
    assert await callback.deliver("x") is True
    assert (function.calls, function.got) == (3, ["x"])
    assert (callback.sent, callback.failed, callback.retried, callback.rejected) == (1, 2, 2, 0)


@pytest.mark.anyio
async def test_a_callback_is_given_up_after_its_retries(
    make_callback: Callable[..., Callback], heard: Heard
) -> None:
    """After the last retry the answer is no, and each failure was told."""
    function = Function(failures=-1)
    callback = make_callback(function, max_retry_attempts=2)
    assert await callback.deliver("x") is False
    assert (callback.failed, callback.retried, callback.rejected) == (3, 2, 1)
    assert heard == [(function.error, "downstream_callback")] * 3


@pytest.mark.anyio
async def test_a_dead_callback_costs_no_calls(make_callback: Callable[..., Callback]) -> None:
    """While its breaker is open a callback is not called at all."""
    function = Function(failures=-1)
    callback = make_callback(
        function, max_retry_attempts=9, breaker_failures=3, breaker_reset_seconds=1000
    )
    assert await callback.deliver("x") is False
    assert await callback.deliver("y") is False
    assert function.calls == 3
    assert callback.rejected == 2
    assert callback.breaker.state == "open"


@pytest.mark.anyio
async def test_a_callback_that_recovers_is_called_again(
    make_callback: Callable[..., Callback],
) -> None:
    """After the pause one call is the probe, and its success closes the breaker."""
    function = Function(failures=1)
    callback = make_callback(function, max_retry_attempts=0, breaker_failures=1)
    assert await callback.deliver("x") is False
    await probe_is_due(callback)
    assert await callback.deliver("y") is True
    assert function.got == ["y"]
    assert callback.breaker.state == "closed"


@pytest.mark.anyio
async def test_only_one_probe_at_a_time(make_callback: Callable[..., Callback]) -> None:
    """While a probe runs, other events do not reach the callback."""
    inside, go_on = anyio.Event(), anyio.Event()
    got: list[str] = []

    async def function(given: str) -> None:
        got.append(given)
        if given == "first":
            raise ValueError
        inside.set()
        await go_on.wait()

    callback = make_callback(function, max_retry_attempts=0, breaker_failures=1)
    assert await callback.deliver("first") is False
    await probe_is_due(callback)
    async with anyio.create_task_group() as group:
        group.start_soon(callback.deliver, "probe")
        await inside.wait()
        assert await callback.deliver("other") is False
        go_on.set()
    assert got == ["first", "probe"]
    assert callback.breaker.state == "closed"


@pytest.mark.anyio
async def test_a_cancelled_probe_is_not_the_last_one(
    make_callback: Callable[..., Callback],
) -> None:
    """A caller who is cancelled during the probe does not switch the callback off for ever."""
    inside = anyio.Event()
    got: list[str] = []

    async def function(given: str) -> None:
        if given == "first":
            raise ValueError
        if given == "probe":
            inside.set()
            await anyio.sleep_forever()
        got.append(given)

    callback = make_callback(function, max_retry_attempts=0, breaker_failures=1)
    assert await callback.deliver("first") is False
    await probe_is_due(callback)
    async with anyio.create_task_group() as group:
        group.start_soon(callback.deliver, "probe")
        await inside.wait()
        group.cancel_scope.cancel()
    with anyio.fail_after(5):
        while not await callback.deliver("after"):
            await anyio.sleep(0.001)
    assert got == ["after"]


@pytest.mark.anyio
async def test_a_callback_goes_by_other_settings(make_callback: Callable[..., Callback]) -> None:
    """New options hold from the next event on."""
    function = Function(failures=-1)
    callback = make_callback(function, max_retry_attempts=0)
    callback.use_settings(settings(max_retry_attempts=1))
    await callback.deliver("x")
    assert function.calls == 2


@pytest.mark.anyio
async def test_a_callback_lane_calls_with_the_events_fields(
    make_callback: Callable[..., Callback],
) -> None:
    """An event that nobody awaits reaches the callback as its fields."""
    function, passed_on = Function(), list[OutgoingEvent]()
    lane = CallbackLane(make_callback(function), passed_on.append, settings())
    await run_to_the_end(lane, event(1), event(2))
    assert function.got == [{"n": 1}, {"n": 2}]
    assert passed_on == []
    assert (lane.stats().sent, lane.stats().connected) == (2, True)


@pytest.mark.anyio
async def test_what_a_callback_lane_cannot_deliver_goes_on(
    make_callback: Callable[..., Callback],
) -> None:
    """An event that the callback does not take goes to the fallback, in order."""
    function, passed_on = Function(failures=-1), list[OutgoingEvent]()
    callback = make_callback(
        function, max_retry_attempts=1, breaker_failures=2, breaker_reset_seconds=1000
    )
    lane = CallbackLane(callback, passed_on.append, settings())
    await run_to_the_end(lane, event(1), event(2))
    assert passed_on == [event(1), event(2)]
    assert function.calls == 2
    assert (lane.stats().rejected, lane.stats().connected) == (2, False)


@pytest.mark.anyio
async def test_a_cancellation_from_inside_a_callback_passes_the_event_on(
    make_callback: Callable[..., Callback],
) -> None:
    """A CancelledError that nobody asked for costs the callback its event, not the lane."""
    function = Function(failures=1, error=asyncio.CancelledError())
    passed_on: list[OutgoingEvent] = []
    lane = CallbackLane(make_callback(function, max_retry_attempts=0), passed_on.append, settings())
    await run_to_the_end(lane, event(1), event(2))
    assert passed_on == [event(1)]
    assert function.got == [{"n": 2}]


@pytest.mark.anyio
async def test_a_cancelled_callback_lane_counts_what_it_leaves(
    make_callback: Callable[..., Callback],
) -> None:
    """A callback that hangs at the end of the shutdown's budget is cut off; its event counts."""
    inside = anyio.Event()
    passed_on: list[OutgoingEvent] = []

    async def function(given: Any) -> None:
        inside.set()
        await anyio.sleep_forever()

    lane = CallbackLane(make_callback(function), passed_on.append, settings())
    lane.put(event(1))
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run)
        await inside.wait()
        lane.cancelling()
        group.cancel_scope.cancel()
    assert passed_on == []
    assert lane.stats().dropped == 1
