"""One handler's or processor's way to the listener, and their share in its life."""

from __future__ import annotations

import logging
import time
import weakref
from typing import Any

from eventlog_handler._config import (
    OPTION_NAMES,
    check_one_of,
    check_one_or_more,
    check_seconds,
    refuse_unknown,
)
from eventlog_handler._context import captures, delivering
from eventlog_handler._listener import FULL_PAUSE_SECONDS, Listener
from eventlog_handler._payload import pack
from eventlog_handler._snapshot import record_fields, usual_event
from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.typing import EventFields, EventHead


class Feed:
    """One handler's or processor's way to the listener, and their share in its life.

    Args:
        gateway: An existing one, or None for one of its own.
        options: Those of the hand-off, and those of the gateway where it is its own.

    Raises:
        TypeError: An unknown option, or options for a gateway that exists already.
        ValueError: An option has a value that cannot be.
    """

    def __init__(self, gateway: EventSessionLogger | None, options: dict[str, Any]) -> None:
        refuse_unknown(options, (*HANDOFF_OPTIONS, *OPTION_NAMES))
        handoff = {name: options.pop(name, default) for name, default in HANDOFF_OPTIONS.items()}
        _check_handoff(handoff)
        if gateway is not None and options:
            raise TypeError(f"gateway= has its own options: give {sorted(options)} to it instead")
        owned = gateway is None
        self.gateway = EventSessionLogger(**options) if gateway is None else gateway
        listener = self.gateway._listener
        if not isinstance(listener, Listener) or listener.ending:
            listener = Listener(self.gateway, handoff)
        # Before any event: from 3.12 on no thread can be started once the interpreter ends.
        self.gateway._delivery.start()
        self._listener = listener
        self._intake = self.gateway._intake
        self._owned = owned
        block = handoff["overflow"] == "block"
        self._block_seconds = handoff["block_timeout_seconds"] if block else 0.0
        self._sync_level = handoff["sync_level"]
        self._ignore_unknown = handoff["missing_session"] == "ignore"
        self._closed = self._late = False
        listener.users += 1
        self._release = weakref.finalize(self, _release, listener, owned)
        self._release.atexit = False

    def put_record(self, record: logging.LogRecord) -> None:
        """Snapshot a record and hand it off."""
        intake, found = self._intake, None
        if not (self._closed or self.gateway._closed or intake.processors or captures):
            try:
                found = usual_event(record, intake.session_field)
            except Exception:
                # What it is about the record, the long way knows.
                found = None
        if found is None:
            if not delivering():
                session_id = getattr(record, intake.session_field, None)
                self.put(record_fields(record), record.created, record.levelno, session_id)
            return
        head, payload = found
        listener = self._listener
        if self._sync_level is not None or not listener._handoff.put(head, payload):
            self._hand_off(head, payload, record.levelno)
        elif not listener._running:
            # As in its `put`, which would be one call more.
            listener.start()

    def put(
        self,
        fields: EventFields,
        seconds: float,
        level: int,
        session_id: Any = None,
        complete: bool = True,
    ) -> None:
        """Snapshot an event and hand it off.

        Args:
            fields: Its own dict.
            seconds: Unix time of the call.
            level: Of the record, as `logging` counts.
            session_id: Where it is known apart from the fields.
            complete: Whether a missing session id is added to the fields.
        """
        intake, report = self._intake, self.gateway._report
        if self.gateway._closed or (self._closed and not self._late):
            report.drop("closed")
            return
        session_id = intake.session_of(fields, session_id)
        if session_id is None and self._ignore_unknown:
            report.drop("no_session")
            return
        found = intake.snapshot(fields, session_id, seconds, complete)
        if found is not None and not captures:
            head, processed = found
            self._hand_off(head, pack(head, processed), level)

    def _hand_off(self, head: EventHead, payload: bytes, level: int) -> None:
        sync = self._sync_level
        # A record that was made by hand may have no level.
        sync = sync is not None and bool(level) and level >= sync
        if not self._listener.put(head, payload, sync):
            self._wait_for_room(head, payload, sync)

    def _wait_for_room(self, head: EventHead, payload: bytes, sync: bool) -> None:
        # What the listener itself logs (a finalizer, an error handler) waits for nobody: nobody
        # else makes room.
        seconds = 0.0 if self._listener.is_current_thread else self._block_seconds
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._listener.hurry()
            time.sleep(FULL_PAUSE_SECONDS)
            if self._listener.put(head, payload, sync):
                return
        self.gateway._report.drop_untold("overflow", head[0])

    def close(self, late: bool) -> None:
        """Write what is left, within the shutdown budget; the gateway is closed if it is our own.

        Args:
            late: Whether later events are still written, by their callers, or counted as dropped.
        """
        if self._release.detach() is None:
            return
        self._closed, self._late = True, late
        deadline = time.monotonic() + self._listener.shutdown_timeout_seconds
        self._listener.users -= 1
        if self._listener.users:
            self._listener.drain(deadline)
            return
        self._listener.end(deadline)
        if self._owned and late:
            self.gateway.at_exit(deadline)
        elif self._owned:
            self.gateway._close(deadline)


def _release(listener: Listener, owned: bool) -> None:
    listener.users -= 1
    if not listener.users:
        listener.end_soon(owned)


HANDOFF_OPTIONS: dict[str, Any] = {
    "durability": "process",
    "ring_bytes": 16 * 1024 * 1024,
    "sync_level": None,
    "overflow": "block",
    "block_timeout_seconds": 1.0,
    "handoff_capacity": 100_000,
    "missing_session": "unknown",
}


def _check_handoff(options: dict[str, Any]) -> None:
    check_one_of("memory", "process", "disk")("durability", options["durability"])
    level = options["sync_level"]
    if level is not None and not isinstance(level, int):
        options["sync_level"] = logging.getLevelName(level)
        if not isinstance(options["sync_level"], int):
            raise ValueError(f"sync_level={level!r} is no level; write 'ERROR' or logging.ERROR")
    if check_one_or_more("ring_bytes", options["ring_bytes"]) < 4096:
        raise ValueError(
            f"ring_bytes={options['ring_bytes']!r} is out of range: write 4096 or more"
        )
    check_one_of("block", "drop")("overflow", options["overflow"])
    check_one_of("unknown", "ignore")("missing_session", options["missing_session"])
    check_seconds("block_timeout_seconds", options["block_timeout_seconds"])
    check_one_or_more("handoff_capacity", options["handoff_capacity"])
