"""The whole contract of a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class TransportInterface(ABC):
    """Takes events to where they go next: a queue, a message bus, a webhook, your own.

    A gateway calls every method on an event loop (asyncio) in a thread that is the transport's own,
    whichever loop the application runs. So open connections in the first `send`, not in the
    constructor, and keep what is bound to the application's loop out of it (that is what
    `downstream_callback` is for, which runs where the event was awaited).

    Beside the four members it may have:

    - `name`: its offsets are kept under it, and its figures told; else its class's qualified name.
    - `async send_batch(batch)`: gets a list of `OutgoingEvent`s, in order within each session, and
      is called instead of `send`. Returns True if all are acknowledged, or a list with None or an
      exception for each. What it raises is held against no event, and they are sent one by one.
    - `unwell`: an exception that says why `health_check` was last False; it is told then.
    - `loggers`: names of the driver's loggers, whose records never become events. What is logged
      on the transport's own thread never does anyway.
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
            TransportRejectedError: The far side refuses this event for good: it is parked.
            TransportError: A failure with a reason, perhaps with `retry_after_seconds`; any other
                exception counts the same. `TransportConnectionError`, `TransportTimeoutError` and
                OSError say nothing of the event: it is tried for ever.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close all connections, when the gateway closes.

        Where a driver has ended its event loop (SystemExit in a task), `send` may follow on a new
        one.
        """

    @abstractmethod
    async def health_check(self) -> bool:
        """Return whether the far side would take an event now; asked before sending resumes."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether there is a connection at this moment; must not block."""
