"""The whole contract of a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class TransportInterface(ABC):
    """Takes events to where they go next: a queue, a message bus, a webhook, your own.

    A gateway calls every method on the event loop of its own delivery thread (asyncio), whichever
    loop the application runs. So open connections in the first `send`, not in the constructor, and
    keep what is bound to the application's loop out of it (that is what `downstream_callback` is
    for, which runs where the event was awaited).
    """

    @abstractmethod
    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Send one event.

        Args:
            event: The line of the session file as UTF-8 bytes, without its line feed.
            metadata: `id` (the same at every attempt: deduplicate by it), `session_id` (the key to
                partition by), `type` and `timestamp`, all str.

        Returns:
            True once the far side has taken the event. Anything else is a failure and is tried
            again, and so is None: a missing `return True` must not pass for an acknowledgement.

        Raises:
            TransportError: A failure with a reason; any other exception counts the same.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close all connections; called once, when the gateway closes."""

    @abstractmethod
    async def health_check(self) -> bool:
        """Return whether the far side would take an event now; asked before sending resumes."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether there is a connection at this moment; must not block."""
