"""A circuit breaker as a pure state machine: no I/O, and the clock is passed in.

Closed → open after `failures` in a row → after `reset_seconds`, half-open for one single probe →
closed when the probe succeeds, open again when it fails (M. Nygard, "Release It!", 2007).
"""

from __future__ import annotations

from collections.abc import Callable

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


class Breaker:
    """Decides whether an attempt may be made.

    Args:
        failures: Failures in a row that open it, at least 1.
        reset_seconds: How long it stays open before one probe is allowed.
        share: Returns which share of that is waited, each time.
    """

    def __init__(
        self, failures: int, reset_seconds: float, share: Callable[[], float] = lambda: 1.0
    ) -> None:
        self._limit = failures
        self._reset_seconds = reset_seconds
        self._share = share
        self._failures = 0
        self._retry_at = 0.0
        self.state = CLOSED

    def allow(self, now: float) -> bool:
        """Return whether an attempt may start at `now`; the first after the pause is the probe."""
        if self.state == CLOSED:
            return True
        if self.state == OPEN and now >= self._retry_at:
            self.state = HALF_OPEN
            return True
        return False

    @property
    def failures(self) -> int:
        """How many attempts in a row have failed."""
        return self._failures

    def seconds_to_probe(self, now: float) -> float:
        """Return how long the pause until the probe still lasts, 0 if it is over."""
        return 0.0 if self.state == CLOSED else max(0.0, self._retry_at - now)

    def succeeded(self) -> None:
        """Note that an attempt was acknowledged."""
        self._failures = 0
        self.state = CLOSED

    def failed(self, now: float) -> None:
        """Note that an attempt failed at `now`."""
        self._failures += 1
        if self.state == HALF_OPEN or self._failures >= self._limit:
            self.trip(now)

    def interrupted(self) -> None:
        """Note that an attempt ended without an answer: a probe is made up for at once."""
        if self.state == HALF_OPEN:
            self.state = OPEN

    def trip(self, now: float) -> None:
        """Open at once, as after a failed health check."""
        self.state = OPEN
        self._retry_at = now + self._reset_seconds * self._share()
