"""The listener: a thread that takes events from the hand-off to the gateway, in batches.

Everything here may be called from a signal handler or a finalizer: no lock is waited for without a
limit.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from eventlog_handler import _lifecycle
from eventlog_handler._encode import encode
from eventlog_handler._handoff import MemoryHandoff
from eventlog_handler._journal import JournalHandoff, journal_directory
from eventlog_handler._payload import head_of, pack_body
from eventlog_handler._recovery import recover
from eventlog_handler._report import warn
from eventlog_handler._stamp import new_id
from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.typing import EncodedEvent, EventHead

BATCH = 50_000
"""Events taken at once: what waits is sorted by session, so that many share the opening of a file.

Beside a computing thread, too, each wake-up costs milliseconds, not events.
"""
RELEASE = 100
"""Events that are written before the hand-off hears of it: a call for each costs as much again."""
LINGER_SECONDS = 0.01
"""After a batch, before the next is waited for. As long as more comes within it no call has to wake
the thread: a system call, and beside a computing thread a fight for the interpreter's lock.
"""
RETRY_SECONDS = 0.2
RECOVERY_SECONDS = 30.0
"""Between two looks for what dead processes left."""
FULL_PAUSE_SECONDS = 0.001


class Listener:
    """Owns the thread and the hand-off of one gateway.

    Args:
        gateway: Where events go.
        options: Those of the hand-off. While files fail, up to twice `handoff_capacity` events
            are kept besides what waits.
    """

    def __init__(self, gateway: EventSessionLogger, options: Mapping[str, Any]) -> None:
        self.gateway = gateway
        self._options = options
        self._capacity: int = options["handoff_capacity"]
        self._handoff = self._new_handoff()
        self._durability = self._handoff.durability
        self._recover_at = 0.0
        self._kept: dict[str | None, list[EncodedEvent]] = {}
        self._unsynced: dict[str | None, list[EncodedEvent]] = {}
        self._done: list[EncodedEvent] = []
        self._failing = False
        self._running = False
        self._ending = False
        self._deadline = float("inf")
        self._owned = False
        self._starting = threading.Lock()
        self._consuming = threading.Lock()
        self._thread: threading.Thread | None = None
        self._hurry: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.users = 0
        gateway._listener = self
        self.start()
        _lifecycle.register(self, rank=5)

    def _new_handoff(self) -> MemoryHandoff:
        level, settings = self._options["durability"], self.gateway._settings
        if level == "memory":
            return MemoryHandoff(self._capacity)
        if not settings.enable_local_logging:
            warn("journal", "durability is 'memory': without local files there is no journal")
            return MemoryHandoff(self._capacity)
        try:
            directory = journal_directory(settings.log_base_dir, settings.directory_mode)
            ring_bytes = self._options["ring_bytes"]
            unknown = self.gateway.get_session_directory(None)
            below = "/".join(unknown.relative_to(settings.log_base_dir).parts)
            sync, report = level == "disk", self.gateway._report

            def failed(error: OSError) -> None:
                report.local(error, "journal")

            return JournalHandoff(directory, self._capacity, ring_bytes, sync, below, failed)
        except OSError as error:
            warn("journal", f"durability is 'memory': no journal can be made ({error.strerror})")
            self.gateway._report.tell(error, "journal")
            return MemoryHandoff(self._capacity)

    @property
    def shutdown_timeout_seconds(self) -> float:
        """The gateway's budget."""
        return self.gateway._settings.shutdown_timeout_seconds

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs on the listener's own thread."""
        return threading.current_thread() is self._thread

    @property
    def depth(self) -> int:
        """How many events have not reached their files."""
        return self._handoff.depth + self.kept

    @property
    def durability(self) -> str:
        """What a handed-off event survives: `memory`, `process` or `disk`."""
        return self._durability

    def put(self, head: EventHead, payload: bytes, sync: bool = False) -> bool:
        """Accept an event, or return False when full.

        Args:
            head: That of the event.
            payload: As `pack` makes it of the event.
            sync: Whether to return only after it is on the disk.
        """
        accepted = self._handoff.put(head, payload, sync)
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
                self._drain_at_once()
                return
            self._running = True
            thread = threading.Thread(target=self._run, name="eventlog-listener", daemon=True)
            thread.start()
            self._thread = thread
        except RuntimeError:
            # From 3.12 on no thread starts once the interpreter is about to end.
            self._running = False
            self._drain_at_once()
        finally:
            self._starting.release()

    def _run(self) -> None:
        try:
            with self._consuming:
                while not self._finished():
                    self._recover()
                    self._step(self._pause_seconds())
                    self._linger()
                if self._ending:
                    self._retire()
        finally:
            self._running = False
        if self._handoff.depth:
            # Put between the last look and the flag.
            self.start()

    def _linger(self) -> None:
        """Let events come, unless somebody waits for them."""
        # An end that let them come would go on for as long as somebody logs.
        if not self._ending:
            with contextlib.suppress(queue.Empty):
                self._hurry.get(timeout=LINGER_SECONDS)

    def hurry(self) -> None:
        """Have what waits taken now."""
        # Once is enough, however many wait for a disk that stands still.
        if self._hurry.empty():
            self._hurry.put(None)

    def _recover(self) -> None:
        """Write what dead processes left, at the start and then from time to time."""
        now = time.monotonic()
        if self._durability == "memory" or now < self._recover_at:
            return
        self._recover_at = now + RECOVERY_SECONDS
        gateway = self.gateway

        def write(session_id: str | None, events: list[EncodedEvent]) -> None:
            while events:
                del events[: gateway._write_and_hand_over(session_id, events)]

        try:
            base = gateway._settings.log_base_dir
            recover(base, gateway.get_session_directory, write, gateway._report)
        except Exception as error:
            # It is tried again; what is left stays where it is safe.
            gateway._report.local(error, "recovery")

    def _retire(self) -> None:
        """Close the hand-off; what comes later is written at once, by its caller."""
        retired, self._handoff = self._handoff, MemoryHandoff(self._capacity)
        events, _ = retired.take(self._capacity, 0.0)
        # What could not be written is safe there, if it is there, until the next process comes.
        lost = {s: [e for e in theirs if not retired.holds(e)] for s, theirs in self._kept.items()}
        self._kept = {session_id: theirs for session_id, theirs in lost.items() if theirs}
        retired.close()
        self._unsynced.clear()
        for event in events:
            head = head_of(event)
            self._handoff.put(head, pack_body(head, event.body))

    def _pause_seconds(self) -> float:
        if self.gateway._report.untold:
            return 0.0
        return RETRY_SECONDS if self._failing else RECOVERY_SECONDS

    def _finished(self) -> bool:
        return self._ending and (self.depth == 0 or time.monotonic() >= self._deadline)

    def _drain_at_once(self) -> None:
        """Write what no thread will write any more, also where the budget for an end is 0."""
        self.drain_here(time.monotonic() + max(RETRY_SECONDS, self.shutdown_timeout_seconds))

    def drain_here(self, deadline: float) -> None:
        """Write on this thread what is waiting, until `deadline`, unless another thread does."""
        if not self._consuming.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return
        try:
            while self.depth and time.monotonic() < deadline:
                self._step(RETRY_SECONDS if self._failing else 0.0, deadline)
        finally:
            self._consuming.release()

    def _step(self, timeout_seconds: float, deadline: float | None = None) -> None:
        """Take a batch and write it; what cannot be written is kept, in order, and tried again.

        Args:
            timeout_seconds: How long to wait for the first event.
            deadline: From then on no further file is begun; the thread's own unless given.
        """
        marker = None
        if self.kept < self._capacity:
            events, marker = self._handoff.take(BATCH, timeout_seconds)
            self._tell_losses()
            for event in events:
                self._kept.setdefault(event.session_id, []).append(event)
        else:
            time.sleep(timeout_seconds)
        self._failing = False
        try:
            for session_id in list(self._kept):
                if time.monotonic() >= (self._deadline if deadline is None else deadline):
                    break
                self._write(session_id, self._kept[session_id])
        finally:
            self._release()
        for session_id in list(self._unsynced):
            self._sync(session_id, self._unsynced[session_id])
        if marker is not None:
            marker()

    def _write(self, session_id: str | None, events: list[EncodedEvent]) -> None:
        report = self.gateway._report
        while events:
            try:
                count = self.gateway._write_and_hand_over(session_id, events)
                if self._handoff.must_sync(events[:count]):
                    self._unsynced.setdefault(session_id, []).extend(events[:count])
                else:
                    self._done += events[:count]
                del events[:count]
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
                self._done.append(events.pop(0))
            if len(self._done) >= RELEASE:
                self._release()
        del self._kept[session_id]

    def _release(self) -> None:
        """Have the hand-off let go of what is written."""
        done, self._done = self._done, []
        self._handoff.written(done)

    def _sync(self, session_id: str | None, events: list[EncodedEvent]) -> None:
        """Have written events on the disk before the journal lets go of them."""
        try:
            error = self.gateway._files.sync(session_id)
        except OSError as lost:
            # Their lines may be gone with it: once more, and to a new file.
            error = lost
            self._kept[session_id] = events + self._kept.get(session_id, [])
            del self._unsynced[session_id]
        if error is None:
            del self._unsynced[session_id]
            self._handoff.written(events)
        else:
            self._failing = True
            self.gateway._report.local(error, "session file")
            warn("sync", f"cannot sync a session file ({error.strerror}); it is tried again")

    @property
    def kept(self) -> int:
        """How many events were taken from the hand-off and are not safe in their files yet."""
        waiting = (*list(self._kept.values()), *list(self._unsynced.values()))
        return sum(map(len, waiting))

    def _tell_losses(self) -> None:
        """Put a line for each new loss in front of what its session's file gets next."""
        report = self.gateway._report
        for (session_id, reason), count in report.take_untold().items():
            fields = {"type": "eventlog.dropped", "session_id": session_id}
            body = encode({**fields, "reason": reason, "count": count})
            notice = EncodedEvent(session_id, "eventlog.dropped", new_id(), time.time(), body)
            self._kept.setdefault(session_id, []).append(notice)
            report.notices += 1

    def drain(self, deadline: float, session_id: str | None = None) -> int:
        """Wait until all that was put before is written; return how many events are not.

        Args:
            deadline: At the latest, on the monotonic clock.
            session_id: Only this session's; None is all.
        """
        if self.is_current_thread:
            # An error handler that flushes: waiting for itself would be until the deadline.
            return self.depth
        reached = threading.Event()
        self._handoff.put_marker(reached.set)
        self.hurry()
        if not self._running:
            self.start()
        reached.wait(max(0.0, deadline - time.monotonic()))
        while self._kept_of(session_id) and time.monotonic() < deadline:
            if self._ending and not self._running:
                # No thread tries again by itself then: it is being written by who has logged it,
                # or could not be.
                break
            time.sleep(FULL_PAUSE_SECONDS)
        return self._kept_of(session_id) if reached.is_set() else max(1, self.depth)

    def _kept_of(self, session_id: str | None) -> int:
        if session_id is None:
            return self.kept
        kept, unsynced = self._kept.get(session_id, ()), self._unsynced.get(session_id, ())
        return len(kept) + len(unsynced)

    def end_soon(self, owned: bool) -> None:
        """Have the thread write what is left and end; nothing here waits, for a finalizer.

        Args:
            owned: Whether to close the gateway too.
        """
        self._owned = owned
        self._deadline = time.monotonic() + self.shutdown_timeout_seconds
        self._ending = True
        self._handoff.put_marker(self._close_owned)
        self.hurry()

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
        self.hurry()
        thread = self._thread
        if thread is not None and not self.is_current_thread:
            # It may be in the pause before its last try.
            thread.join(max(0.0, deadline - time.monotonic()) + RETRY_SECONDS)
        self.drain_here(deadline)
        if self._running or not self._consuming.acquire(timeout=RETRY_SECONDS):
            # Stuck in a write that does not return, or a caller's thread writes what came later:
            # its batch is its own.
            return
        try:
            self._retire()
            for events in list(self._kept.values()):
                for _ in events:
                    # No line tells of these: it could not be written either.
                    self.gateway._report.drop("unwritable")
            self._kept.clear()
        finally:
            self._consuming.release()

    @property
    def ending(self) -> bool:
        """Whether the thread is gone or about to go."""
        return self._ending

    def at_exit(self, deadline: float) -> None:
        """End; what an exit hook that runs after ours still logs is written at once."""
        self.end(deadline)

    def after_fork_in_child(self) -> None:
        """What was waiting is the parent's; the thread did not come along."""
        self._handoff.abandon()
        self._handoff = self._new_handoff()
        self._durability = self._handoff.durability
        self._recover_at = time.monotonic() + RECOVERY_SECONDS
        self._kept = {}
        self._unsynced = {}
        self._done = []
        self._running = False
        self._hurry = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._consuming = threading.Lock()
