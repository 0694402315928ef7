"""How we speak of our own failures: the error handler, and one rate-limited line on stderr.

Never through `logging`: a failure to log that is logged comes back.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from typing import Any

PAUSE_SECONDS = 60.0
_said_at: dict[str, float] = {}


def warn(topic: str, message: str) -> None:
    """Write one line to stderr, at most once in a minute for a topic.

    Args:
        topic: What the limit counts by.
        message: Must hold no content of an event.
    """
    now = time.monotonic()
    if now < _said_at.get(topic, 0.0):
        return
    _said_at[topic] = now + PAUSE_SECONDS
    # At exit stderr may be gone, and a closed one must not cost the event.
    with contextlib.suppress(Exception):
        sys.stderr.write(f"eventlog_handler: {message}\n")


class Report:
    """A gateway's failures: counted, and told to its error handler.

    Args:
        error_handler: Called with each exception and what was being done; may be None.
    """

    def __init__(self, error_handler: Any) -> None:
        self.error_handler = error_handler
        self.local_errors = 0
        self.notices = 0
        """Lines of type `eventlog.dropped`, which nobody handed over."""
        self.dropped: Counter[str] = Counter()
        self._untold: Counter[tuple[str | None, str]] = Counter()
        # Re-entrant: a signal handler may drop an event while its thread is counting another.
        self._lock = threading.RLock()

    def drop(self, reason: str) -> None:
        """Count an event that gets no line, on purpose or after close."""
        with self._lock:
            self.dropped[reason] += 1

    def drop_untold(self, reason: str, session_id: str | None) -> None:
        """Count an event that was lost, for the session's file to say so as soon as it can."""
        with self._lock:
            self.dropped[reason] += 1
            self._untold[session_id, reason] += 1

    @property
    def untold(self) -> bool:
        """Whether there are losses that no file tells of yet."""
        return bool(self._untold)

    def take_untold(self) -> dict[tuple[str | None, str], int]:
        """Return the losses that no file tells of yet, by session and reason, and forget them."""
        with self._lock:
            taken, self._untold = self._untold, Counter()
        return taken

    def after_fork_in_child(self) -> None:
        """Another thread may have held the lock when the process was copied."""
        self._lock = threading.RLock()

    def local(self, error: Exception, context: str) -> None:
        """Note a failure of encoding or writing."""
        self.local_errors += 1
        self.tell(error, context)

    def tell(self, error: Exception, context: str) -> None:
        """Call the error handler; if that fails too, say so on stderr."""
        if self.error_handler is None:
            return
        try:
            self.error_handler(error, context)
        except Exception as second:
            warn("error_handler", f"error_handler raised {type(second).__name__} and was ignored")
