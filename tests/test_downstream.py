"""What lies downstream, called in each event loop: attempts, health, backoff, the callback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventlog_handler import TransportError, TransportTimeoutError, _downstream
from eventlog_handler._config import Settings, resolve
from eventlog_handler._downstream import Callback, Downstream, as_exception, backoff_seconds
from eventlog_handler._report import Report

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
def make_downstream(heard: Heard) -> Callable[..., Downstream]:
    """Make downstreams that tell `heard` of their failures; no cancellation is theirs."""

    def make(ours: bool = False, **options: Any) -> Downstream:
        return Downstream("there", settings(**options), Report(heard), lambda: ours)

    return make


@pytest.fixture
def make_callback(heard: Heard) -> Callable[..., Callback]:
    """Make callbacks that tell `heard` of their failures."""

    def make(function: Callable[[Any], Awaitable[object]], **options: Any) -> Callback:
        return Callback(function, settings(**options), Report(heard))

    return make


def raising(error: BaseException) -> Callable[[], Awaitable[Any]]:
    """Return a call that raises."""

    async def call() -> Any:
        raise error

    return call


def returning(answer: Any) -> Callable[[], Awaitable[Any]]:
    """Return a call that returns."""

    async def call() -> Any:
        return answer

    return call


@pytest.fixture
def chance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Decide what is random."""

    def decide(number: float) -> None:
        monkeypatch.setattr(_downstream.random, "random", lambda: number)

    return decide


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


@given(
    attempt=st.integers(1, 10**9),
    delay=st.floats(0, 1e308),
    longest=st.floats(0, 1e308),
    chance=st.floats(0, 1),
)
def test_backoff_stays_between_nothing_and_the_longest(
    attempt: int, delay: float, longest: float, chance: float
) -> None:
    """Whatever the options and the attempt, the pause is neither negative nor too long."""
    assert 0 <= backoff_seconds(attempt, delay, longest, chance) <= longest


@given(attempt=st.integers(1, 100), delay=st.floats(0.001, 100), longest=st.floats(0.001, 100))
def test_backoff_never_shrinks(attempt: int, delay: float, longest: float) -> None:
    """With the same luck a later retry waits no less than an earlier one."""
    earlier = backoff_seconds(attempt, delay, longest, 1.0)
    assert earlier <= backoff_seconds(attempt + 1, delay, longest, 1.0)


def test_backoff_goes_by_the_options(
    make_downstream: Callable[..., Downstream], chance: Callable[[float], None]
) -> None:
    """Delay and longest pause are the gateway's options."""
    downstream = make_downstream(retry_delay_seconds=2, retry_max_delay_seconds=6)
    chance(1.0)
    assert [downstream.backoff(attempt) for attempt in (1, 2, 3)] == [2, 4, 6]
    chance(0.0)
    assert downstream.backoff(3) == 0


@pytest.mark.parametrize(("number", "share"), [(0.0, 0.5), (1.0, 1.0)])
def test_an_open_breaker_waits_at_least_half_its_pause(
    make_downstream: Callable[..., Downstream],
    chance: Callable[[float], None],
    number: float,
    share: float,
) -> None:
    """How much of the pause is waited is random, so that processes do not come back together."""
    chance(number)
    breaker = make_downstream(breaker_reset_seconds=30).breaker
    breaker.trip(100.0)
    assert breaker.seconds_to_probe(100.0) == 30 * share


@pytest.mark.parametrize("error", SYSTEM_ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_handler_gets_exceptions_only(error: BaseException) -> None:
    """What is an Exception stays itself; anything else is the cause of one of ours."""
    told = as_exception(error)
    assert told is error or (type(told) is TransportError and told.__cause__ is error)
    assert type(error).__name__ in repr(told)


@pytest.mark.anyio
async def test_an_attempt_returns_what_the_call_returns(
    make_downstream: Callable[..., Downstream],
) -> None:
    """The answer comes back as it is, without an error; what it means is for the caller."""
    answer = object()
    assert await make_downstream().attempt(returning(answer)) == (answer, None)


@pytest.mark.anyio
@pytest.mark.parametrize("error", SYSTEM_ERRORS, ids=lambda error: type(error).__name__)
async def test_whatever_a_call_raises_is_its_failure(
    make_downstream: Callable[..., Downstream], error: BaseException
) -> None:
    """Even a driver's SystemExit is returned and ends nothing."""
    answer, failure = await make_downstream().attempt(raising(error))
    assert answer is None
    assert failure is error or (failure is not None and failure.__cause__ is error)


@pytest.mark.anyio
async def test_what_cannot_be_awaited_is_a_failure(
    make_downstream: Callable[..., Downstream],
) -> None:
    """A `send` that is a plain function is told as the TypeError that it is."""
    not_async: Any = lambda: True  # noqa: E731
    _, failure = await make_downstream().attempt(not_async)
    assert isinstance(failure, TypeError)


@pytest.mark.anyio
async def test_a_call_that_hangs_is_timed_out(make_downstream: Callable[..., Downstream]) -> None:
    """An attempt takes no longer than `send_timeout_seconds`."""
    downstream = make_downstream(send_timeout_seconds=0.01)
    with anyio.fail_after(30):
        answer, failure = await downstream.attempt(anyio.sleep_forever)
    assert answer is None
    assert type(failure) is TransportTimeoutError
    assert str(failure) == "no answer within 0.01 seconds"


@pytest.mark.anyio
async def test_an_answer_beats_the_time_limit(make_downstream: Callable[..., Downstream]) -> None:
    """A driver that turns the end of its time into an answer has answered."""

    async def call() -> str:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            return "taken"

    downstream = make_downstream(send_timeout_seconds=0.01)
    assert await downstream.attempt(call) == ("taken", None)


@pytest.mark.anyio
async def test_a_cancellation_from_inside_a_driver_is_its_failure(
    make_downstream: Callable[..., Downstream],
) -> None:
    """A CancelledError that nobody asked for does not get out."""
    _, failure = await make_downstream().attempt(raising(asyncio.CancelledError()))
    assert type(failure) is TransportError


@pytest.mark.anyio
async def test_our_cancellation_gets_out(make_downstream: Callable[..., Downstream]) -> None:
    """A cancellation that is meant for us ends the attempt, and a probe is made up for."""
    downstream, inside = make_downstream(ours=True), anyio.Event()
    downstream.breaker.trip(0.0)
    assert downstream.breaker.allow(1000.0)
    returned: list[object] = []

    async def call() -> None:
        inside.set()
        await anyio.sleep_forever()

    async def attempt() -> None:
        returned.append(await downstream.attempt(call))

    async with anyio.create_task_group() as group:
        group.start_soon(attempt)
        await inside.wait()
        group.cancel_scope.cancel()
    assert returned == []
    assert downstream.breaker.state == "open"
    assert downstream.breaker.allow(1000.0)


@pytest.mark.anyio
async def test_a_closed_coroutine_is_left_to_close(
    make_downstream: Callable[..., Downstream], heard: Heard
) -> None:
    """GeneratorExit is how Python closes a coroutine: it gets out of attempt and check."""
    downstream = make_downstream()
    with pytest.raises(GeneratorExit):
        await downstream.attempt(raising(GeneratorExit()))
    with pytest.raises(GeneratorExit):
        await downstream.healthy(asked(raising(GeneratorExit())))
    assert heard == []


@pytest.mark.anyio
@pytest.mark.parametrize("error", [None, ValueError()])
async def test_it_is_busy_while_it_is_called(
    make_downstream: Callable[..., Downstream], error: Exception | None
) -> None:
    """Since when an attempt runs can be asked, and ends with it however it ends."""
    downstream, seen = make_downstream(), list[object]()

    async def call() -> None:
        seen.append(downstream.busy_since)
        if error is not None:
            raise error

    assert downstream.busy_since is None
    await downstream.attempt(call)
    assert isinstance(seen[0], float)
    assert downstream.busy_since is None


def test_what_was_sent_is_counted(make_downstream: Callable[..., Downstream]) -> None:
    """Acknowledged events are counted, and end a row of failures."""
    downstream = make_downstream(breaker_failures=2)
    downstream.note_failed(ValueError())
    downstream.note_sent(3)
    downstream.note_failed(ValueError())
    assert (downstream.sent, downstream.failed) == (3, 2)
    assert downstream.breaker.state == "closed"


def test_a_failure_is_counted_and_told(
    make_downstream: Callable[..., Downstream], heard: Heard
) -> None:
    """A failed attempt counts for the breaker, and the error handler hears whose it was."""
    downstream, error = make_downstream(breaker_failures=1), ValueError("no")
    downstream.note_failed(error)
    assert downstream.failed == 1
    assert downstream.breaker.state == "open"
    assert heard == [(error, "there")]


def test_the_figures_of_two_are_added(heard: Heard) -> None:
    """Who takes over goes on counting where the one before stopped, while that one still ends."""
    before = Downstream("there", settings(), Report(heard))
    before.sent, before.failed, before.retried, before.rejected = 1, 10, 100, 1000
    after = Downstream("there", settings(), Report(heard), before=before)
    after.sent += 2
    before.sent += 1
    after.catch_up()
    after.catch_up()
    stats = after.stats(0, "", 0, True)
    assert (stats.sent, stats.failed, stats.retried, stats.rejected) == (4, 10, 100, 1000)


def test_the_last_error_is_cut_short(make_downstream: Callable[..., Downstream]) -> None:
    """`stats()` holds no more than 200 characters of an error."""
    downstream = make_downstream()
    downstream.tell(ValueError("x" * 1000), "there")
    last = downstream.stats(0, "", 0, True).last_error
    assert last == ("ValueError: " + "x" * 1000)[:200]


def asked(check: Callable[..., Any], **more: Any) -> Any:
    """Return a transport of which only its health is of interest."""
    return SimpleNamespace(health_check=check, **more)


@pytest.mark.anyio
async def test_why_a_transport_is_not_well_is_told(
    make_downstream: Callable[..., Downstream], heard: Heard
) -> None:
    """The reason that a transport keeps for its no is told; that of an earlier no is not."""
    downstream, reason = make_downstream(), TransportError("no such queue")
    assert await downstream.healthy(asked(returning(True), unwell=reason)) is True
    assert heard == []
    assert await downstream.healthy(asked(returning(False), unwell=reason)) is False
    assert heard == [(reason, "there: health_check")]
    assert "no such queue" in str(downstream.stats(0, "", 0, True).last_error)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "well"), [(True, True), (1, True), (False, False), (None, False)]
)
async def test_a_health_check_says_yes_or_no(
    make_downstream: Callable[..., Downstream], heard: Heard, answer: Any, well: bool
) -> None:
    """What a health check returns counts as a bool, and is no error."""
    assert await make_downstream().healthy(asked(returning(answer))) is well
    assert heard == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [*SYSTEM_ERRORS, asyncio.CancelledError()], ids=lambda error: type(error).__name__
)
async def test_a_health_check_that_raises_says_no(
    make_downstream: Callable[..., Downstream], heard: Heard, error: BaseException
) -> None:
    """Whatever a health check raises is a no, and is told; it is no failed attempt."""
    downstream = make_downstream()
    assert await downstream.healthy(asked(raising(error))) is False
    assert [context for _, context in heard] == ["there: health_check"]
    assert downstream.failed == 0
    assert downstream.stats(0, "", 0, True).last_error is not None


@pytest.mark.anyio
async def test_a_health_check_that_hangs_says_no(
    make_downstream: Callable[..., Downstream], heard: Heard
) -> None:
    """A health check has the time of one attempt."""
    downstream = make_downstream(send_timeout_seconds=0.01)
    with anyio.fail_after(30):
        assert await downstream.healthy(asked(anyio.sleep_forever)) is False
    assert [type(error) for error, _ in heard] == [TransportTimeoutError]


def test_the_figures_of_a_new_one(make_downstream: Callable[..., Downstream]) -> None:
    """It begins with nothing sent, nothing failed, a closed breaker, and live."""
    assert make_downstream().stats(0, "", 0, True)._asdict() == {
        "sent": 0,
        "failed": 0,
        "retried": 0,
        "rejected": 0,
        "dropped": 0,
        "lag_events": 0,
        "lag_seconds": 0.0,
        "state": "live",
        "breaker": "closed",
        "connected": True,
        "last_error": None,
    }


@pytest.mark.parametrize(
    ("waiting", "tripped", "state"),
    [(3, False, "live"), (4, False, "behind"), (0, True, "behind")],
)
def test_more_than_a_batch_waiting_or_an_outage_is_behind(
    make_downstream: Callable[..., Downstream], waiting: int, tripped: bool, state: str
) -> None:
    """It is live while no more than one batch waits and its breaker is closed."""
    downstream = make_downstream(batch_events=3)
    if tripped:
        downstream.breaker.trip(0.0)
    stats = downstream.stats(waiting, "", 7, False)
    assert (stats.state, stats.lag_events) == (state, waiting)
    assert (stats.dropped, stats.connected) == (7, False)


def ago(**span: float) -> str:
    """Return the timestamp of a moment in the past."""
    return (datetime.now(timezone.utc) - timedelta(**span)).isoformat()


def test_the_lag_is_the_age_of_the_oldest(make_downstream: Callable[..., Downstream]) -> None:
    """How long the oldest event has waited is counted from its timestamp."""
    seconds = make_downstream().stats(1, ago(hours=1), 0, True).lag_seconds
    assert 3600 <= seconds < 3600 + 60


@pytest.mark.parametrize(
    ("waiting", "oldest"),
    [(0, ago(hours=1)), (1, ""), (1, "soon"), (1, "2026-01-01"), (1, None), (1, ago(hours=-1))],
    ids=["nothing waits", "empty", "no date", "no time zone", "none", "in the future"],
)
def test_where_no_lag_can_be_told_it_is_nothing(
    make_downstream: Callable[..., Downstream], waiting: int, oldest: Any
) -> None:
    """A timestamp that says nothing, of a foreign line or a clock that was set, is no error."""
    assert make_downstream().stats(waiting, oldest, 0, True).lag_seconds == 0.0


async def probe_is_due(callback: Callback) -> None:
    """Wait until the pause of a callback's open breaker is over."""
    with anyio.fail_after(30):
        while callback.breaker.seconds_to_probe(time.monotonic()):
            await anyio.sleep(0.001)


class Function:
    """A callback that fails a number of times."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.error = ValueError("no")
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
    function, event = Function(), object()
    assert await make_callback(function).deliver(event) is True
    assert function.got == [event]


@pytest.mark.anyio
async def test_a_callback_is_retried(make_callback: Callable[..., Callback]) -> None:
    """A callback that raises is called again, as often as the options say."""
    function = Function(failures=2)
    callback = make_callback(function, max_retry_attempts=2)
    assert await callback.deliver("x") is True
    assert (function.calls, function.got) == (3, ["x"])
    assert (callback.sent, callback.failed, callback.retried, callback.rejected) == (1, 2, 2, 0)


@pytest.mark.anyio
async def test_a_callback_is_left_alone_before_a_retry(
    make_callback: Callable[..., Callback], chance: Callable[[float], None]
) -> None:
    """Between two calls for an event is a pause."""
    chance(1.0)
    function = Function(failures=1)
    callback = make_callback(function, retry_delay_seconds=1000, retry_max_delay_seconds=1000)
    with anyio.move_on_after(0.02):
        await callback.deliver("x")
    assert function.calls == 1


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
async def test_a_callback_that_hangs_is_timed_out(
    make_callback: Callable[..., Callback], heard: Heard
) -> None:
    """A callback has the time of an attempt."""

    async def hang(given: Any) -> None:
        await anyio.sleep_forever()

    callback = make_callback(hang, max_retry_attempts=0, send_timeout_seconds=0.01)
    with anyio.fail_after(30):
        assert await callback.deliver("x") is False
    assert [type(error) for error, _ in heard] == [TransportTimeoutError]


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
async def test_a_retry_that_is_not_made_is_neither_waited_for_nor_counted(
    make_callback: Callable[..., Callback],
) -> None:
    """Once the breaker has opened, the caller goes on at once."""
    callback = make_callback(
        Function(failures=-1), max_retry_attempts=9, breaker_failures=3, breaker_reset_seconds=1000
    )
    await callback.deliver("x")
    assert (callback.failed, callback.retried) == (3, 2)


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
async def test_a_cancelled_call_of_before_leaves_the_probe_alone(
    make_callback: Callable[..., Callback],
) -> None:
    """A caller who was under way when the breaker opened makes no room for a second probe."""
    inside: list[str] = []

    async def function(given: str) -> None:
        inside.append(given)
        if given == "fails":
            raise ValueError
        await anyio.sleep_forever()

    async def deliver(given: str, scope: anyio.CancelScope) -> None:
        with scope:
            await callback.deliver(given)

    callback = make_callback(function, max_retry_attempts=0, breaker_failures=1)
    before, probe = anyio.CancelScope(), anyio.CancelScope()
    async with anyio.create_task_group() as group:
        group.start_soon(deliver, "before", before)
        await anyio.wait_all_tasks_blocked()
        await callback.deliver("fails")
        await probe_is_due(callback)
        group.start_soon(deliver, "probe", probe)
        await anyio.wait_all_tasks_blocked()
        before.cancel()
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.05):
            await callback.deliver("other")
        probe.cancel()
    assert inside == ["before", "fails", "probe"]


@pytest.mark.anyio
async def test_a_callback_goes_by_other_settings(make_callback: Callable[..., Callback]) -> None:
    """New options hold from the next event on."""
    function = Function(failures=-1)
    callback = make_callback(function, max_retry_attempts=0)
    callback.settings = settings(max_retry_attempts=1)
    await callback.deliver("x")
    assert function.calls == 2
