"""From the callers' threads to the listener's: a plain queue, lost with its process.

`SimpleQueue` and nothing else: its `put` is one C call of about 30 ns that neither gives the
interpreter's lock away nor deadlocks when a signal handler or a `__del__` interrupts it.
"""

from __future__ import annotations

import queue

from eventlog_handler.typing import EncodedEvent, Marker


class MemoryHandoff:
    """The `durability="memory"` hand-off.

    Args:
        capacity: Events that may wait.
    """

    durability = "memory"

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue: queue.SimpleQueue[EncodedEvent | Marker] = queue.SimpleQueue()

    def put(self, event: EncodedEvent) -> bool:
        """Accept an event, or return False when full."""
        # Racing threads may pass the limit together: it bounds memory, it is no exact count.
        if self._queue.qsize() >= self._capacity:
            return False
        self._queue.put(event)
        return True

    def put_marker(self, reached: Marker) -> None:
        """Have `reached` handed out by `take` behind all that was put before it."""
        self._queue.put(reached)

    def take(self, limit: int, timeout_seconds: float) -> tuple[list[EncodedEvent], Marker | None]:
        """Wait for events; return up to `limit` of them, and the marker that ended the batch."""
        events: list[EncodedEvent] = []
        try:
            while len(events) < limit:
                # Only the first may be waited for; a batch is what is there already.
                wait = timeout_seconds if not events else 0
                found = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
                if not isinstance(found, EncodedEvent):
                    return events, found
                events.append(found)
        except queue.Empty:
            pass
        return events, None

    @property
    def depth(self) -> int:
        """How many entries wait."""
        return self._queue.qsize()
