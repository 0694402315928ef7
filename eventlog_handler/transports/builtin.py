"""Transports that need no server: a callback, standard logging, nothing at all."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from eventlog_handler.transports.base import TransportInterface


class _Local(TransportInterface):
    """What needs no connection: connected until it is closed."""

    def __init__(self) -> None:
        self._connected = True

    async def close(self) -> None:
        """Count as disconnected from now on."""
        self._connected = False

    async def health_check(self) -> bool:
        """Return whether `close` was not called yet."""
        return self._connected

    @property
    def is_connected(self) -> bool:
        """Whether `close` was not called yet."""
        return self._connected


class CallbackTransport(_Local):
    """Hands each event to a coroutine function (a helper for the transition).

    Args:
        callback: Called with what `send` was called with, on the gateway's delivery thread.
    """

    def __init__(self, callback: Callable[[Any], Awaitable[None]]) -> None:
        super().__init__()
        self.callback = callback

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Call the callback; returns False if it raises."""
        try:
            await self.callback(event)
        except Exception:
            return False
        return True


class LoggingTransport(_Local):
    """Logs each event at INFO (for development and tests).

    Args:
        logger_name: The logger. What it logs is never taken up as an event again.
    """

    def __init__(self, logger_name: str = "event_transport") -> None:
        super().__init__()
        self.logger = logging.getLogger(logger_name)

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Log the event; returns False if a handler raises."""
        try:
            if hasattr(event, "model_dump"):
                event = event.model_dump()
            elif isinstance(event, bytes):
                event = event.decode()
            self.logger.info("Transport event: %s", event)
        except Exception as error:
            self.logger.error("Transport error: %s", error)
            return False
        return True


class NullTransport(_Local):
    """Takes every event and does nothing with it (for tests)."""

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Return True."""
        return True
