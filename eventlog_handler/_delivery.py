"""All that lies downstream of one gateway: which lanes there are, and what goes to which."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping

from eventlog_handler._backlog import Backlog
from eventlog_handler._config import Settings
from eventlog_handler._context import silence
from eventlog_handler._cursor import Released
from eventlog_handler._downstream import Callback
from eventlog_handler._lanes import CallbackLane, Called
from eventlog_handler._lines import find_files
from eventlog_handler._outbox import Outbox
from eventlog_handler._report import Report, warn
from eventlog_handler._sender import Committed, Sender
from eventlog_handler._worker import Worker
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import TransportStats, Written

SETTLE_SECONDS = 0.001
"""Between two looks whether a lane has begun."""


class Delivery:
    """Hands what was written to the lanes.

    Args:
        settings: The gateway's options.
        report: Hears of every failure.
        committed: Returns how much of a session's file is written, see `SessionFiles.committed`.
    """

    def __init__(self, settings: Settings, report: Report, committed: Committed) -> None:
        self._report = report
        self._committed = committed
        self._senders: dict[str, tuple[Sender, Worker]] = {}
        self._callback: tuple[CallbackLane, Worker] | None = None
        self._parting: list[Worker] = []
        self._backlogs: dict[str, Backlog] = {}
        self._last: dict[str, Sender] = {}
        self._outboxes: list[Outbox] = []
        self._numbers = itertools.count()
        self._changes = 0
        self._closed = False
        # Re-entrant: a signal handler may ask for figures, or end us, while its thread is in here.
        self._lock = threading.RLock()
        self.outbox: Outbox | None = None
        self._where: object = None
        self.use_settings(settings)

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""
        self._settings = settings
        durable = settings.enable_local_logging and settings.log_format == "jsonl"
        where = settings.log_base_dir if durable else None
        if where != self._where:
            self._where, self.outbox = where, None
            if where is not None:
                self.outbox = Outbox(
                    where,
                    settings.directory_mode,
                    self._report,
                    lambda: find_files(where, settings.paths("unknown")),
                )
                self._outboxes.append(self.outbox)
            self._changes += 1
            self._say_where_live_only()
        for lane, _ in self._lanes():
            lane.use_settings(settings)
        for sender, _ in self._senders.values():
            sender.outbox = self.outbox

    def use_callback(self, callback: Callback | None) -> None:
        """Call `callback` for what is handed over from now on; the old one gets what is queued."""
        with self._lock:
            old, self._callback = self._callback, None
            if callback is not None:
                lane = CallbackLane(callback, self._report, self.decide)
                self._callback = lane, Worker(lane, self._report)
            if old is not None:
                self._part(old[1])

    def use_transports(self, transports: Mapping[str, TransportInterface]) -> None:
        """Send to `transports` from now on.

        A transport that stays keeps its lane. One that goes gets what was written for it, and is
        closed. One of the same name goes on where the other stopped.
        """
        for transport in transports.values():
            silence(getattr(transport, "loggers", ()))
        with self._lock:
            old, kept = self._senders, dict[str, tuple[Sender, Worker]]()
            for name, transport in transports.items():
                if name in old and old[name][0].transport is transport:
                    kept[name] = old[name]
                else:
                    kept[name] = self._new(name, transport)
            gone = [name for name in old if kept.get(name) is not old[name]]
            for name in gone:
                sender, worker = old[name]
                sender.replaced = name in kept
                self._part(worker)
            self._senders = kept
            self._changes += 1
            if any(name in kept for name in gone):
                self.start()
            self._say_where_live_only()

    def _say_where_live_only(self) -> None:
        if self._senders and self.outbox is None:
            why = "log_format is not 'jsonl'"
            if not self._settings.enable_local_logging:
                why = "local logging is off"
            warn(
                "live-only",
                f"delivery is live only, as {why}: an outage that outlasts max_pending_events, or "
                "the end of the process, costs transports events",
            )

    def _new(self, name: str, transport: TransportInterface) -> tuple[Sender, Worker]:
        backlog = self._backlogs.setdefault(name, Backlog(name, self._report))
        before = self._last.get(name)
        for worker in self._parting:
            if worker.lane is before:
                before.replaced = True
                worker.end(float("inf"))
        sender = self._last[name] = Sender(
            name,
            transport,
            self._settings,
            self._report,
            self.outbox,
            self._committed,
            lambda: tuple(self._senders),
            backlog,
            before,
        )
        return sender, Worker(sender, self._report)

    def _part(self, worker: Worker) -> None:
        """Let a lane that is not used any more end by itself."""
        # It is ours to close, even if it never ran.
        worker.start()
        self._parting = [each for each in self._parting if not each.over] + [worker]
        worker.end(float("inf"))

    @property
    def generation(self) -> int:
        """A number that changes when files have to be made known again."""
        return self._changes + (0 if self.outbox is None else self.outbox.losses)

    def register(self, outbox: Outbox | None, path: str, session: str, size: int) -> int:
        """Make a file known before it is written, see `Registrar`."""
        generation, senders = self.generation, self._senders
        if outbox is None or not senders:
            return generation
        positions = {
            name: sender.backlog.position(outbox, session, path, size)
            for name, (sender, _) in senders.items()
        }
        found = outbox.register(path, session, positions)
        if found is None:
            return -1
        for name, theirs in found.items():
            for owed in theirs:
                senders[name][0].owe(outbox, owed)
        # After the end each write is made known: somebody may have sent the file to its end since.
        return -1 if self._closed else generation

    def hand_over(self, written: Written) -> None:
        """Take events that nobody awaits: to the callback, else to the transports."""
        callback = self._callback
        if callback is None:
            self.send(written)
            return
        written = self.send(written, undecided=True)
        lane, worker = callback
        for index in range(len(written.events)):
            if self._closed or not lane.put(Called(written, index)):
                self.decide(written, index, taken=False)
        worker.poke()

    def send(self, written: Written, undecided: bool = False) -> Written:
        """Take events for the transports.

        Args:
            written: What was written just now.
            undecided: Whether they wait for `decide`.

        Returns:
            The same, as `decide` and `when` take it.
        """
        if not self._senders and written.outbox is not None:
            return written
        with self._lock:
            if written.outbox is None:
                # Without a file that is read back, numbers stand in the place of its bytes.
                ends = [next(self._numbers) + 1 for _ in written.events]
                written = written._replace(begin=ends[0] - 1, ends=ends)
            for sender, worker in self._senders.values():
                room = 0 if self._closed else self._settings.max_pending_events
                sender.backlog.grow(written, undecided, room)
                if self._closed:
                    # Its row may have gone since the file was made known.
                    sender.save_all()
                else:
                    worker.poke()
        return written

    def decide(self, written: Written, index: int, taken: bool) -> None:
        """Note whether the callback took an event, so that transports need not get it."""
        # Those that are away too: they may come back.
        for backlog in tuple(self._backlogs.values()):
            backlog.decide(written, index, taken)
        for _, worker in tuple(self._senders.values()):
            worker.poke()

    @property
    def live(self) -> bool:
        """Whether there are transports, and all will probably soon have what comes now."""
        senders = self._senders.values()
        return bool(senders) and not self._closed and all(s.live for s, _ in senders)

    def when(self, written: Written, call: Released) -> int:
        """Have `call` called by each transport that gets past these events; return how often."""
        count = 0
        for sender, worker in tuple(self._senders.values()):
            count += sender.backlog.when(call, written.session, written)
            worker.poke()
        return count

    def flush(self, session: str | None, deadline: float) -> tuple[str, ...]:
        """Wait until transports have all that is written now.

        Args:
            session: Of this session; None is all.
            deadline: At the latest, on the monotonic clock.

        Returns:
            The names of those that have not.
        """
        waits = []
        for name, (sender, worker) in tuple(self._senders.items()):
            worker.poke()
            # What the processes before left is to be sent too, and it may not know of that yet.
            while not _settled(sender) and time.monotonic() < deadline:
                time.sleep(SETTLE_SECONDS)
            reached = threading.Semaphore(0)
            count = sender.backlog.when(reached.release, session)
            worker.poke()
            waits.append((name, sender, reached, count))
        return tuple(
            name
            for name, sender, reached, count in waits
            # One that ends in an outage releases who waits for it.
            if not _all(reached, count, deadline)
            or not _settled(sender)
            or (sender.ended and sender.backlog.lags(session))
        )

    def resend_rejected(self, name: str | None) -> int:
        """Send what was refused again; return how many events that are.

        Args:
            name: By which transport; None is any.

        Raises:
            ValueError: There is none of that name, or nothing is kept.
        """
        if name is not None and name not in self._senders:
            raise ValueError(f"no transport is named {name!r}; there are {sorted(self._senders)}")
        if self.outbox is None:
            raise ValueError("rejected events can be sent again from session files in 'jsonl' only")
        count = 0
        for known, (sender, worker) in tuple(self._senders.items()):
            if name in (None, known):
                count += sender.resend()
                worker.poke()
        return count

    def start(self) -> None:
        """Start the threads, unless there is nothing to deliver to."""
        if not self._closed:
            for _, worker in self._lanes():
                worker.start()

    def _lanes(self) -> list[tuple[CallbackLane | Sender, Worker]]:
        callback = [self._callback] if self._callback is not None else []
        return [*callback, *self._senders.values()]

    def close_soon(self) -> None:
        """Begin to end every lane, without waiting; for a garbage collection."""
        self._closed = True
        deadline = time.monotonic() + self._settings.shutdown_timeout_seconds
        for _, worker in self._lanes():
            worker.end(deadline)

    def close(self, deadline: float) -> None:
        """End every lane and its thread, and close the transports. Blocks until `deadline`."""
        with self._lock:
            # A transport that was never used is ours to close all the same.
            for _, worker in self._senders.values():
                worker.start()
            self._closed = True
            # Files take late events still, which the next process has to know of.
            self._changes += 1
        # Callbacks first, as what they do not take goes to the transports.
        callback = [] if self._callback is None else [self._callback[1]]
        transports = [worker for _, worker in self._senders.values()]
        for workers in (callback, [*transports, *self._parting]):
            for worker in workers:
                worker.end(deadline)
            for worker in workers:
                if worker.join(deadline):
                    worker.lane.abandon()
        for sender in self._last.values():
            if sender.ended:
                sender.release(keep=False)
        for outbox in self._outboxes:
            outbox.close()
        for sender in self._last.values():
            # What was written while all this ended.
            sender.save_all()

    def after_fork_in_child(self) -> None:
        """The parent delivers what was handed over before; the child starts threads of its own."""
        self._lock = threading.RLock()
        self._parting = []
        for _, worker in self._lanes():
            worker.forked()

    @property
    def kind(self) -> str:
        """What is promised: `at-least-once`, `unsaved` or `live-only`."""
        if self.outbox is None:
            return "live-only"
        return "unsaved" if self.outbox.failing else "at-least-once"

    def stats(self) -> dict[str, TransportStats]:
        """Return the figures of each downstream, by name."""
        return {lane.name: lane.stats() for lane, _ in self._lanes()}


def _settled(sender: Sender) -> bool:
    """Whether a lane knows of all that it has to send."""
    return sender.settled or sender.ended or sender.outbox is None


def _all(reached: threading.Semaphore, count: int, deadline: float) -> bool:
    """Wait for `count` releases."""
    return all(reached.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in range(count))


class FileRegister:
    """What one gateway's files know of its delivery, see `Registrar`.

    Args:
        delivery: Whose lanes read the files.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self.outbox = delivery.outbox

    @property
    def generation(self) -> int:
        """A number that changes when files have to be made known again."""
        return self._delivery.generation

    def register(self, path: str, session: str, size: int) -> int:
        """Make a file known."""
        return self._delivery.register(self.outbox, path, session, size)
