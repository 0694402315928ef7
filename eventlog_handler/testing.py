"""Fakes for the tests of applications, and for our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import anyio
import orjson

from eventlog_handler._context import captures
from eventlog_handler.exceptions import TransportConnectionError
from eventlog_handler.transports.base import TransportInterface


class RecordingTransport(TransportInterface):
    """Takes every event and remembers it.

    Args:
        name: Its name in `stats()`.
    """

    def __init__(self, name: str = "recording") -> None:
        self.name = name
        self.sent: list[tuple[bytes, dict[str, Any]]] = []
        """Line and metadata of each event, in order."""
        self.closed = False

    @property
    def events(self) -> list[Any]:
        """The `event` of each line."""
        return [orjson.loads(line)["event"] for line, _ in self.sent]

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Remember the event."""
        self.sent.append((event, dict(metadata or {})))
        return True

    async def close(self) -> None:
        """Count as disconnected from now on."""
        self.closed = True

    async def health_check(self) -> bool:
        """Return whether `close` was not called yet."""
        return not self.closed

    @property
    def is_connected(self) -> bool:
        """Whether `close` was not called yet."""
        return not self.closed


class GatedTransport(RecordingTransport):
    """Holds every event back until `open()`: a far side that hangs, without a clock.

    Args:
        name: Its name in `stats()`.
    """

    def __init__(self, name: str = "gated") -> None:
        super().__init__(name)
        self._open = False
        self.arrived = 0
        """How many sends have begun."""

    def open(self) -> None:
        """Let all through, from any thread."""
        self._open = True

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Remember the event once the gate is open."""
        self.arrived += 1
        while not self._open:
            # Opened from another thread, whose loop may not be this one: looking is what works.
            await anyio.sleep(0.001)
        return await super().send(event, metadata)


class FailingTransport(RecordingTransport):
    """Fails a number of times, then takes everything.

    Args:
        failures: How many sends fail; -1 is all, until `recover()`.
        error: What they raise; None makes them return False.
        healthy: What `health_check` says while sends fail.
        name: Its name in `stats()`.
    """

    def __init__(
        self,
        failures: int = -1,
        error: BaseException | None = None,
        healthy: bool = False,
        name: str = "failing",
    ) -> None:
        super().__init__(name)
        self.failures = failures
        self.error = error
        self.healthy = healthy
        self.attempts = 0

    def recover(self) -> None:
        """Take everything from now on."""
        self.failures = 0

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Fail, or remember the event."""
        self.attempts += 1
        if self.failures == 0:
            return await super().send(event, metadata)
        self.failures -= 1
        if self.error is not None:
            raise self.error
        return False

    async def health_check(self) -> bool:
        """Return whether sends would succeed, or what was asked for."""
        return self.healthy or self.failures == 0

    @staticmethod
    def down() -> FailingTransport:
        """Return one that cannot be reached until `recover()`."""
        return FailingTransport(error=TransportConnectionError("refused"), name="down")


@contextlib.contextmanager
def capture_events() -> Iterator[list[dict[str, Any]]]:
    """Collect the events of all gateways, handlers and processors instead of writing them.

    Yields:
        A list that grows with each event, as it would stand in the file under `event`.
    """
    found: list[dict[str, Any]] = []

    def capture(body: bytes) -> None:
        found.append(orjson.loads(body))

    captures.append(capture)
    try:
        yield found
    finally:
        captures.remove(capture)
