"""What is called downstream, a transport or the callback: time limit, breaker, figures."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

import anyio

from eventlog_handler._breaker import CLOSED, HALF_OPEN, Breaker
from eventlog_handler._config import Settings
from eventlog_handler._report import Report
from eventlog_handler.exceptions import TransportError, TransportTimeoutError
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import TransportStats


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


def seconds_asked_for(error: Exception) -> float:
    """Return for how long a far side asks to be left alone; nonsense is nothing."""
    try:
        seconds = float(getattr(error, "retry_after_seconds", None) or 0.0)
    except OverflowError:
        return LONGEST_RETRY_AFTER_SECONDS
    except (TypeError, ValueError):
        return 0.0
    return min(seconds, LONGEST_RETRY_AFTER_SECONDS) if seconds > 0 else 0.0


def as_exception(error: BaseException) -> Exception:
    """Return the error itself, or one of ours around what an error handler cannot take."""
    if isinstance(error, Exception):
        return error
    wrapped = TransportError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


LONGEST_RETRY_AFTER_SECONDS = 3600.0
FIGURES = ("sent", "failed", "retried", "rejected")


class Downstream:
    """What callbacks and transports share: guarded calls, a breaker, and their figures.

    Args:
        name: What it is called in `stats()` and in errors.
        settings: The gateway's options.
        report: Hears of every failure.
        ours: Whether a cancellation seen now is meant for us, and no accident inside a driver.
        before: Another one of this name, whose figures go on.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        report: Report,
        ours: Callable[[], bool] = lambda: True,
        before: Downstream | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self._report = report
        self._ours = ours
        self._before = before
        self.breaker = Breaker(
            settings.breaker_failures,
            settings.breaker_reset_seconds,
            # Processes that lose a server together must not all come back at one moment.
            lambda: 0.5 + random.random() / 2,  # noqa: S311 - spreads load, guards nothing
        )
        self.sent = self.failed = self.retried = self.rejected = 0
        if before is not None:
            for figure in FIGURES:
                setattr(self, figure, getattr(before, figure))
        self._known = {figure: getattr(self, figure) for figure in FIGURES}
        self.busy_since: float | None = None
        self._last_error: str | None = None

    async def attempt(
        self, call: Callable[..., Awaitable[Any]], *args: Any
    ) -> tuple[Any, Exception | None]:
        """Make a call, with its time limit; return its result or how it failed.

        Only a cancellation that is meant for us gets out.
        """
        seconds = self.settings.send_timeout_seconds
        probing = self.breaker.state == HALF_OPEN
        self.busy_since = time.monotonic()
        late = TransportTimeoutError(f"no answer within {seconds} seconds")
        scope: anyio.CancelScope | None = None
        try:
            with anyio.move_on_after(seconds) as scope:
                return await call(*args), None
            return None, late
        except (anyio.get_cancelled_exc_class(), GeneratorExit) as error:
            if self._ours() or isinstance(error, GeneratorExit):
                if probing:
                    self.breaker.interrupted()
                raise
            # A driver may raise one of its own for the one that went in.
            ours = scope is not None and scope.cancel_called
            return None, late if ours else TransportError("cancelled from inside")
        except BaseException as error:
            # A driver's SystemExit or KeyboardInterrupt is its failure, not our end.
            return None, as_exception(error)
        finally:
            self.busy_since = None

    def note_sent(self, count: int) -> None:
        """Count events that were acknowledged."""
        self.sent += count
        self.breaker.succeeded()

    def note_failed(self, error: Exception) -> None:
        """Count an attempt that failed, and tell of it."""
        self.failed += 1
        self.breaker.failed(time.monotonic())
        self.tell(error, self.name)

    def catch_up(self) -> None:
        """Count what the one before has still counted since; it has ended."""
        if self._before is not None:
            for name in FIGURES:
                new = getattr(self._before, name) - self._known[name]
                setattr(self, name, getattr(self, name) + new)
            self._before = None

    def forked(self) -> None:
        """In a child: a probe that is under way is the parent's."""
        self.breaker.interrupted()

    def tell(self, error: Exception, context: str) -> None:
        """Tell of a failure, and remember it."""
        self._last_error = f"{type(error).__name__}: {error}"[:200]
        self._report.tell(error, context)

    async def healthy(self, transport: TransportInterface) -> bool:
        """Ask, within the time of an attempt; an error is a no."""
        answer, error = await self.attempt(transport.health_check)
        if not answer:
            error = error or getattr(transport, "unwell", None)
        if error is not None:
            self.tell(error, f"{self.name}: health_check")
        return bool(answer)

    def backoff(self, attempt: int) -> float:
        """Return how many seconds to wait before a retry."""
        settings, chance = self.settings, random.random()  # noqa: S311 - as above
        longest = settings.retry_max_delay_seconds
        return backoff_seconds(attempt, settings.retry_delay_seconds, longest, chance)

    def stats(self, waiting: int, oldest: str, dropped: int, connected: bool) -> TransportStats:
        """Return the figures; those of what waits come from the lane."""
        breaker = self.breaker.state
        keeps_up = breaker == CLOSED and waiting <= self.settings.batch_events
        return TransportStats(
            sent=self.sent,
            failed=self.failed,
            retried=self.retried,
            rejected=self.rejected,
            dropped=dropped,
            lag_events=waiting,
            lag_seconds=_seconds_since(oldest) if waiting else 0.0,
            state="live" if keeps_up else "behind",
            breaker=breaker,
            connected=connected,
            last_error=self._last_error,
        )


def _seconds_since(timestamp: str) -> float:
    try:
        then = datetime.fromisoformat(timestamp)
        return max(0.0, (datetime.now(timezone.utc) - then).total_seconds())
    except (ValueError, TypeError):
        return 0.0


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
        for attempt in range(self.settings.max_retry_attempts + 1):
            if attempt:
                if self.breaker.state != CLOSED:
                    break
                self.retried += 1
                await anyio.sleep(self.backoff(attempt))
            if not self.breaker.allow(time.monotonic()):
                break
            _, error = await self.attempt(self.function, event)
            if error is None:
                self.note_sent(1)
                return True
            self.note_failed(error)
        self.rejected += 1
        return False
