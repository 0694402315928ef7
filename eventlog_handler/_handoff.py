"""From the callers' threads to the listener's: a plain queue, lost with its process.

`SimpleQueue` and nothing else: its `put` is one C call of about 30 ns that neither gives the
interpreter's lock away nor deadlocks when a signal handler or a `__del__` interrupts it.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from typing import Any

from eventlog_handler._payload import event_of
from eventlog_handler.typing import EncodedEvent, EventHead, Marker


class MemoryHandoff:
    """The `durability="memory"` hand-off.

    Args:
        capacity: Events that may wait.
    """

    def __init__(self, capacity: int) -> None:
        self.durability = "memory"
        self._capacity = capacity
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, head: EventHead, payload: bytes, sync: bool = False) -> bool:
        """Accept an event, or return False when full.

        Args:
            head: That of the event.
            payload: As `pack` makes it of the event.
            sync: Asks for what memory has not.
        """
        # Racing threads may pass the limit together: it bounds memory, it is no exact count.
        if self._queue.qsize() >= self._capacity:
            return False
        # A copy: orjson's own bytes are larger than what is in them.
        self._queue.put((head, b"%b" % payload))
        return True

    def put_marker(self, reached: Marker) -> None:
        """Have `reached` handed out by `take` behind all that was put before it."""
        self._queue.put(reached)

    def take(self, limit: int, timeout_seconds: float) -> tuple[list[EncodedEvent], Marker | None]:
        """Wait for events; return up to `limit` of them, and the marker that ended the batch."""
        entries, marker = self._take_entries(limit, timeout_seconds)
        return [event_of(head, payload) for head, payload in entries], marker

    def _take_entries(
        self, limit: int, timeout_seconds: float
    ) -> tuple[list[tuple[Any, ...]], Marker | None]:
        entries: list[tuple[Any, ...]] = []
        try:
            while len(entries) < limit:
                # Only the first may be waited for; a batch is what is there already.
                wait = timeout_seconds if not entries else 0
                found = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
                if callable(found):
                    return entries, found
                entries.append(found)
        except queue.Empty:
            pass
        return entries, None

    def must_sync(self, events: Iterable[EncodedEvent]) -> bool:
        """Return whether any of these has to be on the disk before it is let go of: none."""
        return False

    def written(self, events: Iterable[EncodedEvent]) -> None:
        """Let go of events that are in their files: nothing is held."""

    def holds(self, event: EncodedEvent) -> bool:
        """Return whether an event that was taken, and not let go of, survives this process: no."""
        return False

    def close(self) -> None:
        """End."""

    def abandon(self) -> None:
        """In a forked child: what waits is the parent's."""

    @property
    def depth(self) -> int:
        """How many entries wait."""
        return self._queue.qsize()
