"""The listener: a thread that takes events from the hand-off to the gateway, in batches.

`Feed` is one handler's or processor's way to it. Everything here may be called from a signal
handler or a finalizer: no lock is waited for without a limit.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

from eventlog_handler import _lifecycle
from eventlog_handler._config import (
    OPTION_NAMES,
    check_one_of,
    check_one_or_more,
    check_seconds,
    refuse_unknown,
)
from eventlog_handler._context import captures
from eventlog_handler._encode import encode, new_id, timestamp
from eventlog_handler._handoff import MemoryHandoff
from eventlog_handler._report import warn
from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.typing import EncodedEvent, EventFields, Handoff

BATCH = 1000
"""Events taken at once: beside a computing thread each wake-up costs milliseconds, not events."""
IDLE_SECONDS = 60.0
RETRY_SECONDS = 0.2
FULL_PAUSE_SECONDS = 0.001


class Listener:
    """Owns the thread and the hand-off of one gateway.

    Args:
        gateway: Where events go.
        capacity: Events that may wait in the hand-off; as many more are kept while files fail.
    """

    def __init__(self, gateway: EventSessionLogger, capacity: int) -> None:
        self.gateway = gateway
        self._capacity = capacity
        self._handoff: Handoff = MemoryHandoff(capacity)
        self._kept: dict[str | None, list[EncodedEvent]] = {}
        self._failing = False
        self._running = False
        self._ending = False
        self._deadline = float("inf")
        self._owned = False
        self._starting = threading.Lock()
        self._consuming = threading.Lock()
        self._thread: threading.Thread | None = None
        self.users = 0
        gateway._listener = self
        self.start()
        _lifecycle.register(self, rank=5)

    @property
    def shutdown_timeout_seconds(self) -> float:
        """The gateway's budget."""
        return self.gateway._settings.shutdown_timeout_seconds

    @property
    def depth(self) -> int:
        """How many events have not reached their files."""
        return self._handoff.depth + self.kept

    @property
    def durability(self) -> str:
        """What a handed-off event survives."""
        return self._handoff.durability

    def put(self, event: EncodedEvent) -> bool:
        """Accept an event, or return False when full."""
        accepted = self._handoff.put(event)
        # The thread clears the flag, then looks at the queue once more: one of us sees the other.
        if not self._running:
            self.start()
        return accepted

    def start(self) -> None:
        """Start the thread if it does not run; where none can be started, write here."""
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._running:
                return
            if self._ending:
                self.drain_here(time.monotonic() + self.shutdown_timeout_seconds)
                return
            self._running = True
            thread = threading.Thread(target=self._run, name="eventlog-listener", daemon=True)
            thread.start()
            self._thread = thread
        except RuntimeError:
            # From 3.12 on no thread starts once the interpreter is about to end.
            self._running = False
            self.drain_here(time.monotonic() + self.shutdown_timeout_seconds)
        finally:
            self._starting.release()

    def _run(self) -> None:
        try:
            with self._consuming:
                while not self._finished():
                    self._step(self._pause_seconds())
        finally:
            self._running = False
        if self._handoff.depth:
            # Put between the last look and the flag.
            self.start()

    def _pause_seconds(self) -> float:
        if self.gateway._report.untold:
            return 0.0
        return RETRY_SECONDS if self._failing else IDLE_SECONDS

    def _finished(self) -> bool:
        return self._ending and (self.depth == 0 or time.monotonic() >= self._deadline)

    def drain_here(self, deadline: float) -> None:
        """Write on this thread what is waiting, until `deadline`, unless another thread does."""
        if not self._consuming.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return
        try:
            while self.depth and (not self._failing or time.monotonic() < deadline):
                self._step(RETRY_SECONDS if self._failing else 0.0)
        finally:
            self._consuming.release()

    def _step(self, timeout_seconds: float) -> None:
        """Take a batch and write it; what cannot be written is kept, in order, and tried again."""
        marker = None
        if self.kept < self._capacity:
            events, marker = self._handoff.take(BATCH, timeout_seconds)
            self._tell_losses()
            for event in events:
                self._kept.setdefault(event.session_id, []).append(event)
        else:
            time.sleep(timeout_seconds)
        self._failing = False
        for session_id in list(self._kept):
            self._write(session_id, self._kept[session_id])
        if marker is not None:
            marker()

    def _write(self, session_id: str | None, events: list[EncodedEvent]) -> None:
        report = self.gateway._report
        while events:
            try:
                del events[: self.gateway._write_and_hand_over(session_id, events)]
            except OSError as error:
                # A full disk, a directory replaced by a link: other sessions may be better off.
                self._failing = True
                report.local(error, "session file")
                warn("write", f"cannot write a session file ({error.strerror}); events are kept")
                return
            except Exception as error:
                # A defect of ours: the event that shows it must not block all after it.
                report.local(error, "session file")
                report.drop_untold("internal_error", session_id)
                del events[0]
        del self._kept[session_id]

    @property
    def kept(self) -> int:
        """How many events were taken from the hand-off and could not be written yet."""
        return sum(map(len, list(self._kept.values())))

    def _tell_losses(self) -> None:
        """Put a line for each new loss in front of what its session's file gets next."""
        report = self.gateway._report
        for (session_id, reason), count in report.take_untold().items():
            fields = {"type": "eventlog.dropped", "session_id": session_id}
            body = encode({**fields, "reason": reason, "count": count})
            notice = EncodedEvent(
                session_id, "eventlog.dropped", new_id(), timestamp(time.time()), body
            )
            self._kept.setdefault(session_id, []).append(notice)
            report.notices += 1

    def drain(self, deadline: float) -> bool:
        """Wait until all that was put before is written; return whether it was by `deadline`."""
        if threading.current_thread() is self._thread:
            # An error handler that flushes: waiting for itself would be until the deadline.
            return False
        reached = threading.Event()
        self._handoff.put_marker(reached.set)
        if not self._running:
            self.start()
        reached.wait(max(0.0, deadline - time.monotonic()))
        while self.kept and time.monotonic() < deadline:
            time.sleep(FULL_PAUSE_SECONDS)
        return reached.is_set() and not self.kept

    def end_soon(self, owned: bool) -> None:
        """Have the thread write what is left and end; nothing here waits, for a finalizer.

        Args:
            owned: Whether to close the gateway too.
        """
        self._owned = owned
        self._deadline = time.monotonic() + self.shutdown_timeout_seconds
        self._ending = True
        self._handoff.put_marker(self._close_owned)

    def _close_owned(self) -> None:
        if self._owned:
            self.gateway._closed = True
            self.gateway._delivery.close_soon()
            self.gateway._files.close()

    def end(self, deadline: float) -> None:
        """Write what is left until `deadline`, and end the thread.

        Events that come later are written by whoever puts them.
        """
        self._deadline = deadline
        self._ending = True
        self._handoff.put_marker(lambda: None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            # It may be in the pause before its last try.
            thread.join(max(0.0, deadline - time.monotonic()) + RETRY_SECONDS)
        self.drain_here(deadline)
        if self._running:
            # Stuck in a write that does not return: its batch is its own.
            return
        for events in list(self._kept.values()):
            for _ in events:
                # No line tells of these: it could not be written either.
                self.gateway._report.drop("unwritable")
        self._kept.clear()

    @property
    def ending(self) -> bool:
        """Whether the thread is gone or about to go."""
        return self._ending

    def at_exit(self, deadline: float) -> None:
        """End; what an exit hook that runs after ours still logs is written at once."""
        self.end(deadline)

    def after_fork_in_child(self) -> None:
        """What was waiting is the parent's; the thread did not come along."""
        self._handoff = MemoryHandoff(self._capacity)
        self._kept = {}
        self._running = False
        self._starting = threading.Lock()
        self._consuming = threading.Lock()


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
            listener = Listener(self.gateway, handoff["handoff_capacity"])
        # Before any event: from 3.12 on no thread can be started once the interpreter ends.
        self.gateway._delivery.start()
        self._listener = listener
        self._owned = owned
        block = handoff["overflow"] == "block"
        self._block_seconds = handoff["block_timeout_seconds"] if block else 0.0
        self._ignore_unknown = handoff["missing_session"] == "ignore"
        self._closed = self._late = False
        listener.users += 1
        self._release = weakref.finalize(self, _release, listener, owned)
        self._release.atexit = False

    def put(
        self, fields: EventFields, seconds: float, session_id: Any = None, complete: bool = True
    ) -> None:
        """Snapshot an event and hand it off.

        Args:
            fields: Its own dict.
            seconds: Unix time of the call.
            session_id: Where it is known apart from the fields.
            complete: Whether a missing session id is added to the fields.
        """
        gateway = self.gateway
        if gateway._closed or (self._closed and not self._late):
            gateway._report.drop("closed")
            return
        session_id = gateway._intake.session_of(fields, session_id)
        if session_id is None and self._ignore_unknown:
            gateway._report.drop("no_session")
            return
        event = gateway._intake.snapshot(fields, session_id, seconds, complete)
        if event is not None and not captures and not self._listener.put(event):
            self._wait_for_room(event)

    def _wait_for_room(self, event: EncodedEvent) -> None:
        deadline = time.monotonic() + self._block_seconds
        while time.monotonic() < deadline:
            time.sleep(FULL_PAUSE_SECONDS)
            if self._listener.put(event):
                return
        self.gateway._report.drop_untold("overflow", event.session_id)

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until all events handed off so far are in their files; return whether they are."""
        longest = self._listener.shutdown_timeout_seconds
        seconds = longest if timeout_seconds is None else timeout_seconds
        return self._listener.drain(time.monotonic() + seconds)

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
    "durability": "memory",
    "overflow": "block",
    "block_timeout_seconds": 1.0,
    "handoff_capacity": 100_000,
    "missing_session": "unknown",
}


def _check_handoff(options: dict[str, Any]) -> None:
    check_one_of("memory")("durability", options["durability"])
    check_one_of("block", "drop")("overflow", options["overflow"])
    check_one_of("unknown", "ignore")("missing_session", options["missing_session"])
    check_seconds("block_timeout_seconds", options["block_timeout_seconds"])
    check_one_or_more("handoff_capacity", options["handoff_capacity"])
