"""The loop of one downstream, in steps; and that of the callback, for events that nobody awaits.

A lane never holds back another lane, a file or a caller.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import anyio
import anyio.lowlevel
import orjson

from eventlog_handler._breaker import CLOSED
from eventlog_handler._config import Settings
from eventlog_handler._downstream import Callback
from eventlog_handler._report import Report, warn
from eventlog_handler.typing import TransportStats, Written

BROKEN_SECONDS = 1.0
"""Until the next step after one that broke down."""


class Lane(ABC):
    """A loop that delivers until it is told to end, in steps.

    Args:
        name: Whose it is.
        report: Hears of a step that breaks down.
    """

    def __init__(self, name: str, report: Report) -> None:
        self.name = name
        self._report = report
        self.ending = False
        self.cancelled = False
        """Whether a cancellation that is seen now is meant for the lane."""
        self.deaf = False
        """Whether nothing that comes now can be delivered before the next step is due."""
        self._poked = self._idle = self._stepping = False
        self._wake = anyio.Event()

    @abstractmethod
    async def step(self) -> float:
        """Do what can be done; return in how many seconds there is more, at the latest."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing more can be done before the end."""

    @abstractmethod
    def recover(self) -> None:
        """Make up for a step that broke down."""

    @abstractmethod
    async def close(self, grace_seconds: float) -> None:
        """Close what the lane delivers to."""

    @abstractmethod
    def abandon(self) -> None:
        """Leave what is not delivered."""

    @abstractmethod
    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""

    @abstractmethod
    def forked(self) -> None:
        """In a child: what waits is the parent's to deliver."""

    @abstractmethod
    def stats(self) -> TransportStats:
        """Return the figures."""

    def poke(self) -> bool:
        """Note that there is more; return whether the lane sleeps, and has to be woken."""
        self._poked = True
        return self._idle

    def wake(self) -> None:
        """Take the next step now; on the lane's loop."""
        self._wake.set()

    async def run(self, grace_seconds: Callable[[], float]) -> None:
        """Deliver until `ending`, then close.

        Args:
            grace_seconds: What the close may take.
        """
        if self._stepping:
            # The loop before this one was ended in the middle of a step.
            self.recover()
        try:
            while True:
                self._wake = anyio.Event()
                self._poked = False
                self._stepping = True
                try:
                    seconds = await self.step()
                except Exception as error:
                    # A defect of ours: it must not end the delivery.
                    self._report.tell(error, f"{self.name}: delivery")
                    self.recover()
                    seconds = BROKEN_SECONDS
                self._stepping = False
                if self.ending and self.finished:
                    break
                if seconds > 0:
                    await self._sleep(seconds)
                else:
                    # A step that never waits would keep the loop from the driver's other tasks.
                    await anyio.lowlevel.checkpoint()
        finally:
            if self.ending:
                self.abandon()
            await self.close(grace_seconds())

    async def _sleep(self, seconds: float) -> None:
        # A poke before this line is seen in the next; one after it sees that the lane is idle.
        self._idle = not self.deaf
        if self.deaf or not self._poked:
            with anyio.move_on_after(seconds):
                await self._wake.wait()
        self._idle = False


class Called(NamedTuple):
    """An event that waits for the callback, and where it was written."""

    written: Written
    which: int


class CallbackLane(Lane):
    """Calls the callback for events that nobody awaits.

    Args:
        callback: What to call.
        report: Hears of what breaks down.
        decided: Hears whether it took an event.
    """

    def __init__(
        self,
        callback: Callback,
        report: Report,
        decided: Callable[[Written, int, bool], object],
    ) -> None:
        super().__init__(callback.name, report)
        self._callback = callback
        self._decided = decided
        self._queue: deque[Called] = deque()
        self._dropped = 0

    def put(self, called: Called) -> bool:
        """Queue an event; return False where there is no room, so that it goes on at once."""
        if len(self._queue) >= self._callback.settings.max_pending_events:
            self._dropped += 1
            warn(f"lane {self.name}", f"{self.name} is behind: events pass it by")
            return False
        self._queue.append(called)
        return True

    async def step(self) -> float:
        """Call for one event."""
        if not self._queue:
            return math.inf
        written, index = self._queue[0]
        taken = False
        try:
            taken = await self._callback.deliver(orjson.loads(written.events[index].body))
        except anyio.get_cancelled_exc_class():
            if self.cancelled:
                raise
        self._decided(written, index, taken)
        self._queue.popleft()
        return 0.0

    @property
    def finished(self) -> bool:
        """Whether it has been called for all."""
        return not self._queue

    def recover(self) -> None:
        """Have the event that broke it go to the transports."""
        if self._queue:
            self._decided(*self._queue.popleft(), False)

    async def close(self, grace_seconds: float) -> None:
        """Nothing to close: the function is its owner's."""

    def abandon(self) -> None:
        """Have what is queued go to the transports."""
        while self._queue:
            self._dropped += 1
            self._decided(*self._queue.popleft(), False)

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""
        self._callback.settings = settings

    def forked(self) -> None:
        """Forget what is queued."""
        self._stepping = False
        self._callback.forked()
        self._queue.clear()

    def stats(self) -> TransportStats:
        """Return the callback's figures, of both ways to it."""
        called = self._queue[0] if self._queue else None
        oldest = "" if called is None else called.written.events[called.which].timestamp
        connected = self._callback.breaker.state == CLOSED
        return self._callback.stats(len(self._queue), oldest, self._dropped, connected)
