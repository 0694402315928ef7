"""The structlog processor: any event dict becomes an event of its session."""

from __future__ import annotations

import functools
import logging
import sys
import time
from typing import Any

import structlog

from eventlog_handler._context import delivering, tee
from eventlog_handler._feed import Feed
from eventlog_handler._snapshot import structlog_fields
from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.typing import FlushReceipt, Stats


class EventLogProcessor:
    """Hands each event dict off as an event, and passes it on unchanged.

    It belongs behind what adds to the event dict (`merge_contextvars`, `add_log_level`) and before
    what renders it; exceptions are best left to it (`exc_info`), which keeps their structure.

    If the chain goes on into standard logging, and from there into an `EventLogHandler` with the
    same base directory, the handler leaves out what the processor has taken.

    Args:
        passthrough: False ends the chain here: nothing reaches the wrapped logger.
        gateway: A gateway to share, with a handler for example; its options are its own then.
        **options: As for `EventLogHandler`.

    Raises:
        TypeError: An unknown option, naming the nearest one; or a value of a wrong kind.
        ValueError: A value that cannot be, naming option (or variable) and value.
    """

    def __init__(
        self,
        passthrough: bool = True,
        *,
        gateway: EventSessionLogger | None = None,
        **options: Any,
    ) -> None:
        self._passthrough = passthrough
        self._feed = Feed(gateway, options)
        self.gateway = self._feed.gateway
        """The gateway that writes and forwards, for `get_log_file_path` and the like."""

    def __call__(
        self, logger: Any, method_name: str, event_dict: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        """Snapshot the event dict, hand it off, and return it.

        Args:
            logger: The wrapped logger.
            method_name: The method that was called on it.
            event_dict: Not changed.

        Raises:
            structlog.DropEvent: `passthrough` is False.
        """
        if not delivering():
            try:
                name = getattr(logger, "name", None)
                fields = structlog_fields(event_dict, method_name, name)
                self._feed.put(fields, time.time(), _level(method_name))
                looks = self._looks(logger, method_name) if self._passthrough else 0
                if looks:
                    # The caller of the chain, which will call the logger when the chain is done.
                    tee(sys._getframe(2), self.gateway._settings.log_base_dir, looks)
            except Exception as error:
                self.gateway._report.local(error, "processor")
                self.gateway._report.drop("internal_error")
        if not self._passthrough:
            raise structlog.DropEvent
        return event_dict

    def _looks(self, logger: Any, method_name: str) -> int:
        """Return how many handlers with our base directory will get this event as a record."""
        level = _level(method_name)
        if not isinstance(logger, logging.Logger) or not logger.isEnabledFor(level):
            return 0
        base, looks = self.gateway._settings.log_base_dir, 0
        found: logging.Logger | None = logger
        while found is not None:
            for handler in found.handlers:
                gateway = getattr(handler, "gateway", None)
                same = getattr(gateway, "log_base_dir", None) == base
                looks += same and handler.level <= level
            found = found.parent if found.propagate else None
        return looks

    def flush(
        self, session_id: str | None = None, until: str = "file", timeout: float | None = None
    ) -> FlushReceipt:
        """Wait until what was logged so far is where it has to be.

        Args:
            session_id: Only this session's events, so that no other one is waited for; None is all.
            until: `file`: in the session files. `transport`: acknowledged by all transports too.
            timeout: At most this many seconds; `shutdown_timeout_seconds` unless given.

        Returns:
            What was reached; true if all was.

        Raises:
            ValueError: `until` is something else.
        """
        return self.gateway._flush(session_id, until, timeout)

    def stats(self) -> Stats:
        """Return the gateway's figures."""
        return self.gateway.stats()

    def close(self) -> None:
        """Write what is left and end; a later event is counted as dropped, and passed on."""
        self._feed.close(late=False)


@functools.lru_cache(maxsize=100)
def _level(method_name: str) -> int:
    # `exception` has no level of its own.
    level = getattr(logging, method_name.upper(), logging.ERROR)
    return level if isinstance(level, int) else logging.ERROR
