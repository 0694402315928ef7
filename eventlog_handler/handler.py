"""The `logging.Handler`: any record becomes an event of its session."""

from __future__ import annotations

import logging
import sys
from typing import Any

from eventlog_handler import _context
from eventlog_handler._context import delivering, is_teed, teed
from eventlog_handler._feed import Feed
from eventlog_handler._snapshot import json_object
from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.typing import FlushReceipt, Stats


class EventLogHandler(logging.Handler):
    """Hands each record off as an event; nothing is written on the caller's thread.

    It needs no call but the one that configures it: its thread starts with it, comes back if it
    dies, and what is waiting is written at exit. `logger.info` never raises because of it.

    A formatter that makes JSON objects (`python-json-logger`, structlog's `ProcessorFormatter`)
    decides the event's fields; any other has no say, except with `log_format="custom"`, where it
    makes the file's lines.

    Args:
        level: As for every handler.
        gateway: A gateway to share; its options are its own then.
        **options: All options of `EventSessionLogger`, and those of the hand-off.
            `durability`: what an event survives once its call has returned: `memory` nothing,
            `process` a killed process, `disk` a power cut. `sync_level`: from which level on a
            record is treated as with `disk`. `ring_bytes`: the journal's size. `overflow`: `block`
            or `drop`, when the hand-off is full. `block_timeout_seconds`: the longest that a call
            is blocked then, after which its event is dropped and counted. `handoff_capacity`:
            events that may wait. `missing_session`: `unknown` puts events without a session into a
            directory of their own, `ignore` leaves them out and counts them.

    Raises:
        TypeError: An unknown option, naming the nearest one; or a value of a wrong kind.
        ValueError: A value that cannot be, naming option (or variable) and value.
    """

    def __init__(
        self,
        level: int | str = logging.NOTSET,
        *,
        gateway: EventSessionLogger | None = None,
        **options: Any,
    ) -> None:
        self._custom = gateway is None and options.get("log_format") == "custom"
        if self._custom:
            # `dictConfig` takes the key `formatter` for itself, and sets it after this.
            options.setdefault(
                "formatter", logging.Formatter("%(asctime)s %(levelname)s %(message)s")
            )
        self._feed = Feed(gateway, options)
        # Last, as it lists the handler for `logging.shutdown`: options may be refused before.
        super().__init__(level)
        self.gateway = self._feed.gateway
        """The gateway that writes and forwards, for `get_log_file_path` and the like."""

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        """Set what decides the event's fields, or the lines of a custom file."""
        if self._custom and fmt is not None:
            self.gateway._update(formatter=fmt)
        else:
            super().setFormatter(fmt)

    def handle(self, record: logging.LogRecord) -> bool:
        """Filter and emit, without the lock of `logging.Handler`: the hand-off needs none."""
        kept = self.filter(record)
        if not kept:
            return False
        if kept is not True and isinstance(kept, logging.LogRecord):
            # From 3.12 on a filter may put another record in the place of the first.
            record = kept
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Snapshot the record and hand it off."""
        try:
            name = record.name
            # A record that was made by hand may have any name.
            name = name if type(name) is str else str(name)
            if _context.silenced[name] or (teed and self._is_teed()):
                return
            formatter = self.formatter
            # The plain class makes no JSON, and `basicConfig` sets one where there is none.
            if formatter is None or type(formatter) is logging.Formatter:
                self._feed.put_record(record)
            elif not delivering():
                self._put_decided(formatter, record)
        except Exception as error:
            self.gateway._report.local(error, "emit")
            self.gateway._report.drop("internal_error")

    def _is_teed(self) -> bool:
        """Whether it is an event that our processor has taken already."""
        return is_teed(self.gateway._settings.log_base_dir)

    def _put_decided(self, formatter: logging.Formatter, record: logging.LogRecord) -> None:
        """Take the event's fields from a formatter that makes a JSON object."""
        fields = None
        try:
            fields = json_object(formatter.format(record))
        except Exception as error:
            # A value that the formatter's encoder refuses; ours refuses none.
            self.gateway._report.local(error, "formatter")
        if fields is None:
            self._feed.put_record(record)
        else:
            session_id = getattr(record, self.gateway._settings.session_id_field, None)
            self._feed.put(fields, record.created, record.levelno, session_id, complete=False)

    def flush(  # type: ignore[override]  # `logging` itself ignores what it returns
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
        """Write what is left and end, within `shutdown_timeout_seconds` and half a second.

        A later record is counted as dropped; but if it is `logging` that shuts down (at exit, or
        in a second `dictConfig`), other code does not know that yet and its records are written.
        """
        late = sys._getframe(1).f_code is logging.shutdown.__code__
        self._feed.close(late)
        super().close()
