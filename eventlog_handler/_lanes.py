"""One downstream each: attempts with a time limit, retries, a breaker, and its own queue.

A lane never holds back another lane, a file or a caller.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import orjson

from eventlog_handler._breaker import CLOSED, HALF_OPEN, Breaker
from eventlog_handler._config import Settings
from eventlog_handler._report import Report, warn
from eventlog_handler.exceptions import TransportError, TransportTimeoutError
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import OutgoingEvent, TransportStats

Released = Callable[[], None]
CLOSE_SECONDS = 0.25
"""What a transport's `close` gets where the shutdown's budget is used up."""


def backoff_seconds(attempt: int, delay: float, longest: float, chance: float) -> float:
    """Return the pause before a retry: exponential with full jitter.

    Full jitter spreads the clients of a recovering server evenly (M. Brooker, "Exponential Backoff
    And Jitter", AWS Architecture Blog, 2015).

    Args:
        attempt: Which retry it is, from 1.
        delay: The longest pause before the first retry, in seconds; it doubles with each.
        longest: Where the doubling ends, in seconds.
        chance: A random number from 0 to 1.
    """
    return chance * min(longest, delay * 2.0 ** min(attempt - 1, 60))


def _as_exception(error: BaseException) -> Exception:
    """Return the error itself, or one of ours around what an error handler cannot take."""
    if isinstance(error, Exception):
        return error
    wrapped = TransportError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


class Downstream:
    """What callbacks and transports share: guarded attempts, and their figures.

    Args:
        name: What it is called in `stats()` and in errors.
        settings: The gateway's options.
        report: Hears of every failure.
        ours: Whether a cancellation seen now is meant for us, and no accident inside a driver.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        report: Report,
        ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = name
        self._settings = settings
        self._report = report
        self._ours = ours
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_reset_seconds)
        self.sent = self.failed = self.retried = self.rejected = 0
        self._last_error: str | None = None

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on; the breaker keeps its own."""
        self._settings = settings

    async def attempt(self, call: Callable[[], Awaitable[object]], needs_true: bool) -> bool:
        """Make one attempt; return whether it was acknowledged. Only cancellation gets out.

        Args:
            call: Starts the attempt.
            needs_true: Whether only True is an acknowledgement; else it is returning at all.
        """
        seconds = self._settings.send_timeout_seconds
        try:
            with anyio.move_on_after(seconds) as limit:
                result = await call()
            if limit.cancelled_caught:
                raise TransportTimeoutError(f"no answer within {seconds} seconds")
            if needs_true and result is not True:
                raise TransportError(f"send returned {result!r}; True is the only acknowledgement")
        except (anyio.get_cancelled_exc_class(), GeneratorExit) as error:
            if self._ours() or isinstance(error, GeneratorExit):
                self.breaker.interrupted()
                raise
            self._failed(TransportError("cancelled from inside"))
        except Exception as error:
            self._failed(error)
        except BaseException as error:
            # A driver's SystemExit or KeyboardInterrupt is its failure, not our end.
            self._failed(_as_exception(error))
        else:
            self.sent += 1
            self.breaker.succeeded()
            return True
        return False

    def _failed(self, error: Exception) -> None:
        self.failed += 1
        self.breaker.failed(time.monotonic())
        self._last_error = f"{type(error).__name__}: {error}"[:200]
        self._report.tell(error, self.name)

    async def healthy(self, check: Callable[[], Awaitable[bool]]) -> bool:
        """Ask, within the time of an attempt; an error is a no."""
        answer = False
        try:
            with anyio.move_on_after(self._settings.send_timeout_seconds):
                answer = bool(await check())
        except (anyio.get_cancelled_exc_class(), GeneratorExit) as error:
            if self._ours() or isinstance(error, GeneratorExit):
                raise
        except BaseException as error:
            self._last_error = f"{type(error).__name__}: {error}"[:200]
            self._report.tell(_as_exception(error), f"{self.name}: health_check")
        return answer

    async def pause(self, attempt: int) -> None:
        """Wait before a retry."""
        self.retried += 1
        settings = self._settings
        await anyio.sleep(
            backoff_seconds(
                attempt,
                settings.retry_delay_seconds,
                settings.retry_max_delay_seconds,
                random.random(),  # noqa: S311 - spreads load, guards nothing
            )
        )

    def stats(self, waiting: int, dropped: int, connected: bool) -> TransportStats:
        """Return the figures; those of its queue, if it has one, come from its lane."""
        return TransportStats(
            sent=self.sent,
            failed=self.failed,
            retried=self.retried,
            rejected=self.rejected,
            dropped=dropped,
            lag_events=waiting,
            breaker=self.breaker.state,
            connected=connected,
            last_error=self._last_error,
        )


class Callback(Downstream):
    """The downstream callback: called where the event was awaited, given up after its retries."""

    def __init__(
        self, function: Callable[[Any], Awaitable[object]], settings: Settings, report: Report
    ) -> None:
        super().__init__("downstream_callback", settings, report)
        self.function = function

    async def deliver(self, event: Any) -> bool:
        """Call it, with retries; return whether it took the event.

        While its breaker is open it is not called at all, so that a dead one costs no time.
        """
        for attempt in range(self._settings.max_retry_attempts + 1):
            if attempt:
                await self.pause(attempt)
            if not self.breaker.allow(time.monotonic()):
                break
            if await self.attempt(lambda: self.function(event), needs_true=False):
                return True
        self.rejected += 1
        return False


class Lane(ABC):
    """A queue and the loop that empties it. `put` is for any thread, all else for one loop.

    Args:
        name: Whose it is.
        settings: The gateway's options.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._queue: deque[tuple[OutgoingEvent, Released | None]] = deque()
        self._wake = anyio.Event()
        self._idle = False
        self._ending = False
        self._cancelled = False
        self.dropped = 0
        self.busy_since: float | None = None

    @abstractmethod
    async def _deliver(self, event: OutgoingEvent) -> bool:
        """Decide one event's fate; return False where the lane ends before that."""

    @abstractmethod
    async def _close(self, grace_seconds: float) -> None:
        """Close what the lane delivers to."""

    @abstractmethod
    def stats(self) -> TransportStats:
        """Return the figures."""

    @property
    def waiting(self) -> int:
        """How many events are not decided yet."""
        return len(self._queue)

    def put(self, event: OutgoingEvent, released: Released | None = None) -> bool:
        """Queue an event; return whether the lane sleeps and has to be woken on its loop.

        Args:
            event: Dropped and counted where an outage has filled the queue; it is in its file.
            released: Called once the event's fate is decided.
        """
        if len(self._queue) >= self._settings.max_pending_events:
            self.dropped += 1
            warn(f"lane {self.name}", f"{self.name} is behind: events stay in their files only")
            if released is not None:
                released()
            return False
        self._queue.append((event, released))
        return self._idle

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""
        self._settings = settings

    def wake(self) -> None:
        """Look at the queue again."""
        self._wake.set()

    def end(self) -> None:
        """Finish what is queued, close, and return from `run`."""
        self._ending = True
        self.wake()

    def cancelling(self) -> None:
        """Know that the cancellation that follows is ours."""
        self._cancelled = True

    async def run(self) -> None:
        """Deliver until `end`; an outage does not hold up the end."""
        grace = self._settings.shutdown_timeout_seconds
        try:
            await self._drain()
            while not self._ending:
                self._wake = anyio.Event()
                self._idle = True
                # A put before this line is seen here; one after it sees that the lane is idle.
                if not self._queue and not self._ending:
                    await self._wake.wait()
                self._idle = False
                await self._drain()
        except anyio.get_cancelled_exc_class():
            grace = CLOSE_SECONDS
            raise
        finally:
            self.abandon()
            await self._close(grace)

    async def _drain(self) -> None:
        while self._queue:
            event, released = self._queue[0]
            self.busy_since = time.monotonic()
            decided = await self._deliver(event)
            self.busy_since = None
            if not decided:
                return
            self._queue.popleft()
            if released is not None:
                released()

    def abandon(self) -> None:
        """Count what is queued as dropped; its lines are in their files."""
        while self._queue:
            _, released = self._queue.popleft()
            self.dropped += 1
            if released is not None:
                released()

    def after_fork_in_child(self) -> None:
        """The parent delivers what it queued."""
        self._queue.clear()
        self._idle = False


class CallbackLane(Lane):
    """Calls the callback for events that nobody awaits; what it does not take goes on.

    Args:
        callback: What to call.
        fallback: Gets the events that the callback did not take.
        settings: The gateway's options.
    """

    def __init__(
        self, callback: Callback, fallback: Callable[[OutgoingEvent], object], settings: Settings
    ) -> None:
        super().__init__(callback.name, settings)
        self._callback = callback
        self._fallback = fallback

    async def _deliver(self, event: OutgoingEvent) -> bool:
        taken = False
        try:
            taken = await self._callback.deliver(orjson.loads(event.line)["event"])
        except anyio.get_cancelled_exc_class():
            if self._cancelled:
                raise
        if not taken:
            self._fallback(event)
        return True

    async def _close(self, grace_seconds: float) -> None:
        """Nothing to close: the function is its owner's."""

    def stats(self) -> TransportStats:
        """Return the callback's figures, of both ways to it."""
        connected = self._callback.breaker.state == CLOSED
        return self._callback.stats(self.waiting, self.dropped, connected)


class TransportLane(Lane):
    """Sends to a transport, in order, until each event is sent or rejected.

    Args:
        name: The transport's name.
        transport: Closed by the lane, when it ends.
        settings: The gateway's options.
        report: Hears of every failure.
    """

    def __init__(
        self, name: str, transport: TransportInterface, settings: Settings, report: Report
    ) -> None:
        super().__init__(name, settings)
        self.transport = transport
        self._report = report
        self._downstream = Downstream(name, settings, report, lambda: self._cancelled)
        self._breaker = self._downstream.breaker

    @property
    def live(self) -> bool:
        """Whether an event that is put now will probably be decided soon."""
        busy, patience = self.busy_since, self._settings.downstream_wait_seconds
        return self._breaker.state == CLOSED and (
            busy is None or time.monotonic() - busy < patience
        )

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""
        super().use_settings(settings)
        self._downstream.use_settings(settings)

    async def _deliver(self, event: OutgoingEvent) -> bool:
        attempts = 0
        while await self._allowed():
            if await self._downstream.attempt(
                lambda: self.transport.send(event.line, event.metadata), needs_true=True
            ):
                return True
            attempts += 1
            if attempts > self._settings.max_retry_attempts:
                if await self._downstream.healthy(self.transport.health_check):
                    # The far side is well and refuses this one: it must not hold back the rest.
                    self._downstream.rejected += 1
                    self._breaker.succeeded()
                    return True
                self._breaker.trip(time.monotonic())
            elif self._breaker.state == CLOSED:
                await self._downstream.pause(attempts)
        return False

    async def _allowed(self) -> bool:
        """Wait until an attempt may be made; False where the lane ends during an outage."""
        while True:
            if self._breaker.allow(time.monotonic()):
                if self._breaker.state != HALF_OPEN:
                    return True
                if await self._downstream.healthy(self.transport.health_check):
                    return True
                self._breaker.failed(time.monotonic())
            if self._ending:
                return False
            self._wake = anyio.Event()
            with anyio.move_on_after(self._breaker.seconds_to_probe(time.monotonic())):
                await self._wake.wait()

    async def _close(self, grace_seconds: float) -> None:
        try:
            with anyio.move_on_after(grace_seconds, shield=True):
                await self.transport.close()
        except BaseException as error:
            # The scope is shielded, so a cancellation is a driver's own: nobody else must pay.
            self._report.tell(_as_exception(error), f"{self.name}: close")

    def stats(self) -> TransportStats:
        """Return the transport's figures."""
        try:
            connected = bool(self.transport.is_connected)
        except Exception:
            connected = False
        return self._downstream.stats(self.waiting, self.dropped, connected)
