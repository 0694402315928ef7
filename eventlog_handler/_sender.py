"""Sends to one transport: batches, retries, what it refuses, and how far it is."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import anyio

from eventlog_handler._backlog import Backlog
from eventlog_handler._batch import Outcomes, offer
from eventlog_handler._breaker import CLOSED, HALF_OPEN, OPEN
from eventlog_handler._config import Settings
from eventlog_handler._cursor import Cursor
from eventlog_handler._downstream import Downstream, as_exception, seconds_asked_for
from eventlog_handler._journal import OWN_DIRECTORY
from eventlog_handler._lanes import Lane
from eventlog_handler._lines import measure
from eventlog_handler._outbox import CHUNK_ROWS, RETRY_SECONDS, Outbox, Owed
from eventlog_handler._rejected import park, set_aside
from eventlog_handler._report import Report
from eventlog_handler.exceptions import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import OutgoingEvent, TransportStats

TEND_SECONDS = 30.0
"""Between two looks for what dead processes left."""
Committed = Callable[[str, str], "int | None"]
AMBIGUOUS = (
    TransportConnectionError,
    TransportTimeoutError,
    OSError,
    asyncio.TimeoutError,  # no OSError before 3.11
)
"""Failures that say nothing of the event."""
Batch = Sequence[tuple[Cursor, OutgoingEvent]]
Failed = dict[Cursor, tuple[OutgoingEvent, Exception]]


class Sender(Lane):
    """The lane of a transport.

    Args:
        name: The transport's name.
        transport: Closed by the lane, when it ends.
        settings: The gateway's options.
        report: Hears of every failure.
        outbox: Where it is saved how far the transport is; None for live-only delivery.
        committed: Returns how much of a session's file is written, see `SessionFiles.committed`.
        names: Returns the names of all transports.
        backlog: What the transports of this name have yet to get.
        before: Who sent it until now.
    """

    def __init__(
        self,
        name: str,
        transport: TransportInterface,
        settings: Settings,
        report: Report,
        outbox: Outbox | None,
        committed: Committed,
        names: Callable[[], Sequence[str]],
        backlog: Backlog,
        before: Sender | None,
    ) -> None:
        super().__init__(name, report)
        self.transport = transport
        self.outbox = outbox
        self.backlog = backlog
        self._committed = committed
        self._names = names
        self._downstream: Downstream = Downstream(
            name,
            settings,
            report,
            lambda: self.cancelled,
            None if before is None else before._downstream,
        )
        self._breaker = self._downstream.breaker
        self._before = before
        self.replaced = False
        """Whether another one of its name takes over after the batch in hand."""
        self.detached = False
        """Whether another one has not waited for that: what comes back is not ours to note."""
        self.ended = False
        self._losses: dict[Outbox, int] = {}
        self._unsaved: list[Cursor] = []
        self._resending: set[str] = set()
        self._more = self.settled = False  # Settled: it knows of all that its predecessors left.
        self._tend_at = self._pause_until = 0.0
        self._limit = settings.batch_events
        self._batch_since: float | None = None
        self._due = 0
        """Events that have waited for a batch long enough."""

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on; the breaker keeps its own."""
        self._downstream.settings = settings

    @property
    def live(self) -> bool:
        """Whether an event that comes now will probably be sent soon."""
        settings, busy = self._downstream.settings, self._downstream.busy_since
        return (
            self._breaker.state == CLOSED
            and time.monotonic() >= self._pause_until
            and self.backlog.lag_events <= settings.batch_events
            and (busy is None or time.monotonic() - busy < settings.downstream_wait_seconds)
        )

    @property
    def finished(self) -> bool:
        """Whether all is sent; an outage does not hold up the end."""
        waits = self.backlog.seconds_to_next(time.monotonic()) < math.inf
        return self.replaced or self._breaker.state == OPEN or not waits

    async def step(self) -> float:
        """Send a batch, if there is one and the transport is well."""
        await self._succeed()
        now = time.monotonic()
        if not self.ending:
            self._tend(now)
        self.deaf = True
        if now < self._pause_until:
            return self._pause_until - now
        if not self._breaker.allow(now):
            return self._breaker.seconds_to_probe(now)
        probing = self._breaker.state == HALF_OPEN
        if probing and not await self._recovered():
            return 0.0
        self.deaf = False
        seconds = 0.0 if probing else self._seconds_to_batch(now)
        if seconds > 0:
            return seconds
        settings = self._downstream.settings
        limit = min(self._limit, settings.batch_events)
        batch = self.backlog.take(now, limit, settings.batch_bytes)
        if batch:
            await self._send(batch)
            return 0.0
        if probing:
            self._breaker.succeeded()
        self._save()
        if self._more and self.backlog.sessions < CHUNK_ROWS:
            return 0.0
        until_tend = math.inf if self.outbox is None else max(0.001, self._tend_at - now)
        return min(self.backlog.seconds_to_next(now), until_tend)

    async def _recovered(self) -> bool:
        """Ask whether an outage is over."""
        well = await self._downstream.healthy(self.transport)
        if self.detached:
            return False
        if not well:
            self._breaker.failed(time.monotonic())
            return False
        # Not all at once: a server that has just come back gets one event, then two, then four.
        self._limit = 1
        self.backlog.resume()
        return True

    def recover(self) -> None:
        """Serve again what was in hand when a step broke down."""
        self._breaker.interrupted()
        self.backlog.land()

    async def _succeed(self) -> None:
        """Wait until the transport before this one of the same name has ended its last batch.

        One that hangs is waited for no longer than an attempt may take. Then its batch is sent
        again.
        """
        before, self._before = self._before, None
        if before is None:
            return
        with anyio.move_on_after(self._downstream.settings.send_timeout_seconds):
            while not before.ended:
                await anyio.sleep(0.005)
        before.detached = True
        self._downstream.catch_up()
        self.backlog.land()

    def _seconds_to_batch(self, now: float) -> float:
        """Return how long a batch that is not full yet may wait for more events."""
        settings, lag = self._downstream.settings, self.backlog.lag_events
        self._due = min(self._due, lag)
        if not settings.batch_seconds or self.ending or not lag or self._due > 0:
            self._batch_since = None
            return 0.0
        if self._batch_since is None:
            self._batch_since = now
        left = self._batch_since + settings.batch_seconds - now
        full = lag >= settings.batch_events or self.backlog.lag_bytes >= settings.batch_bytes
        if left > 0 and not full and not self.backlog.awaited:
            return left
        # These go now, in however many batches; what comes meanwhile may wait for its own.
        self._due = lag
        self._batch_since = None
        return 0.0

    async def _send(self, batch: Batch) -> None:
        events = [event for _, event in batch]
        outcomes, error_of_all = await offer(self._downstream, self.transport, events)
        if self.detached:
            return
        if error_of_all is not None:
            # Which of them it was is not known: one by one from here, until one is taken.
            self._limit = 1
            self._downstream.retried += sum(c.attempts > 0 for c in {c for c, _ in batch})
            self._note_failed(error_of_all, of_all=True)
        failed = self._settle(batch, outcomes)
        self._save()
        await self._deal_with(failed)

    def _settle(self, batch: Batch, outcomes: Outcomes) -> Failed:
        """Move the cursors as far as all went well; return where it did not, and why."""
        counts = dict.fromkeys((cursor for cursor, _ in batch), 0)
        failed: Failed = {}
        sent = answers = 0
        for (cursor, event), outcome in zip(batch, outcomes, strict=False):
            if cursor in failed:
                continue
            self._downstream.retried += cursor.attempts > 0 and not counts[cursor]
            error = outcome
            if isinstance(error, TransportRejectedError):
                error = self._park(cursor, event, error)
            elif error is None:
                sent += 1
            if error is None:
                counts[cursor] += 1
                # A line that cannot be read says nothing of the far side.
                answers += bool(event.id)
            else:
                failed[cursor] = event, error
        if answers:
            self._downstream.note_sent(sent)
            self._limit = min(self._limit * 2, self._downstream.settings.batch_events)
        self._due -= sum(counts.values())
        for cursor, count in counts.items():
            self.backlog.settle(cursor, count, hold=cursor in failed)
        return failed

    def _note_failed(self, error: Exception, of_all: bool) -> None:
        """Count a failure, and pause where any event would have failed."""
        self._downstream.note_failed(error)
        pause = seconds_asked_for(error)
        if of_all and self._breaker.state == CLOSED:
            pause = max(pause, self._downstream.backoff(self._breaker.failures))
        self._pause_until = max(self._pause_until, time.monotonic() + pause)

    async def _deal_with(self, failed: Failed) -> None:
        """Decide on events that have failed: once more later, or parked."""
        noted: set[int] = set()
        well: bool | None = None
        for cursor, (event, error) in failed.items():
            ambiguous = isinstance(error, AMBIGUOUS)
            if id(error) not in noted:
                # A connection that broke under a hundred sessions is one failure.
                noted.add(id(error))
                self._note_failed(error, of_all=ambiguous)
            if ambiguous:
                # Perhaps it is an event that breaks it: one by one, so that others get past.
                self._limit = 1
            cursor.attempts += 1
            cursor.refusals += not ambiguous
            attempts = cursor.attempts if ambiguous else cursor.refusals
            if attempts > self._downstream.settings.max_retry_attempts:
                if well is None:
                    well = await self._downstream.healthy(self.transport)
                if self.detached:
                    return
                if not well:
                    self._breaker.trip(time.monotonic())
                    cursor.refusals = 0
                elif not ambiguous and self._give_up(cursor, event, error):
                    continue
            pause = self._downstream.backoff(cursor.attempts)
            self.backlog.postpone(cursor, time.monotonic() + pause)

    def _give_up(self, cursor: Cursor, event: OutgoingEvent, error: Exception) -> bool:
        """Park what a far side that is well refuses: it must not hold back the rest."""
        failure = self._park(cursor, event, error)
        if failure is not None:
            self._downstream.tell(failure, f"{self.name}: parking")
            return False
        self._breaker.succeeded()
        self.backlog.settle(cursor, 1)
        self._save()
        return True

    def _park(self, cursor: Cursor, event: OutgoingEvent, error: Exception) -> Exception | None:
        """Keep an event that is refused; return why that could not be done."""
        settings = self._downstream.settings
        base = settings.log_base_dir if cursor.outbox is None else cursor.outbox.base
        try:
            if settings.enable_local_logging:
                park(base, self.name, event, f"{type(error).__name__}: {error}"[:500])
        except OSError as failure:
            return failure
        self._downstream.rejected += 1
        self._downstream.tell(error, f"{self.name}: rejected")
        return None

    def _save(self) -> None:
        """Save what has moved."""
        changed: dict[Outbox, list[Cursor]] = {}
        unsaved, self._unsaved = self._unsaved, []
        for cursor in (*unsaved, *self.backlog.changes()):
            if cursor.outbox is not None:
                changed.setdefault(cursor.outbox, []).append(cursor)
        for outbox, cursors in changed.items():
            gone = [c.path for c in cursors if c.done and not c.growing]
            if not outbox.save(self.name, self._positions(cursors), gone):
                self._unsaved += cursors
                continue
            for path in gone:
                if path.startswith(f"{OWN_DIRECTORY}/"):
                    (outbox.base / path).unlink(missing_ok=True)
                    self._resending.discard(path)

    def _positions(self, cursors: Sequence[Cursor]) -> list[Owed]:
        left = [cursor for cursor in cursors if cursor.growing or not cursor.done]
        # Not their own: an earlier stretch of the same file may be behind.
        return [
            Owed(c.path, c.session, self.backlog.position(c.outbox, c.session, c.path, c.position))
            for c in left
        ]

    def _tend(self, now: float) -> None:
        """Take over what dead processes left, and save again what a lost database had."""
        more = self._more and self.backlog.sessions < CHUNK_ROWS
        if self.outbox is None or (now < self._tend_at and not more):
            return
        self._tend_at = now + TEND_SECONDS
        losses = self.outbox.losses
        if losses != self._losses.get(self.outbox) and self.save_all():
            self._losses[self.outbox] = losses
        owed, self.backlog.unread = self.backlog.unread, []
        found = self.outbox.adopt(self.name, self._names())
        self._more = len(found) >= CHUNK_ROWS
        if self.outbox.losses != losses:
            # It has failed, or there is a new one: what is to be found there is found soon.
            self._tend_at = now + RETRY_SECONDS
        for each in (*owed, *found):
            if self._committed(each.session, each.path) is None:
                self.owe(self.outbox, each)
        self.settled |= not self._more
        self._save()

    def save_all(self) -> bool:
        """Save how far all is that has something left; return whether that could be done."""
        left = [cursor for cursor in self.backlog.cursors() if cursor.outbox is not None]
        return all(
            outbox.save(self.name, self._positions([c for c in left if c.outbox is outbox]))
            for outbox in {c.outbox for c in left if c.outbox is not None}
        )

    def owe(self, outbox: Outbox, owed: Owed) -> int:
        """Take what is left of a file; return how many events that are.

        Args:
            outbox: That has the file's row.
            owed: The file.
        """
        try:
            extent = measure(outbox.base, owed.path, owed.position)
        except (OSError, EOFError) as error:
            gone = isinstance(error, (FileNotFoundError, EOFError)) and outbox.base.is_dir()
            if gone:
                told = TransportError(f"{owed.path} is gone or cut: what was left is not sent")
                self._downstream.tell(told, self.name)
                outbox.save(self.name, (), [owed.path])
                return 0
            self._downstream.tell(error, f"{self.name}: reading {owed.path}")
            self.backlog.unread.append(owed)
            return 0
        return self.backlog.owe(outbox, owed, extent)

    def resend(self) -> int:
        """Send what was refused again; return how many events that are."""
        count = 0
        if self.outbox is not None:
            for path in set_aside(self.outbox.base, self.name):
                if path in self._resending:
                    continue
                self._resending.add(path)
                owed = Owed(path, path, 0)
                self.outbox.save(self.name, [owed])
                count += self.owe(self.outbox, owed)
        return count

    async def close(self, grace_seconds: float) -> None:
        """Close the transport."""
        try:
            with anyio.move_on_after(grace_seconds, shield=True):
                await self.transport.close()
        except BaseException as error:
            # The scope is shielded, so a cancellation is a driver's own: nobody else must pay.
            self._report.tell(as_exception(error), f"{self.name}: close")

    def abandon(self) -> None:
        """Leave what is not sent: in the files, for the next process or one of this name."""
        if not (self.replaced or self.detached):
            self.release(keep=True)
        # Last: whoever takes over begins now.
        self.ended = True

    def release(self, keep: bool) -> None:
        """Let go of the files.

        Args:
            keep: Whether what is unfinished stays this process's.
        """
        self._save()
        cursors = self.backlog.cursors()
        outboxes = {c.outbox for c in cursors if c.outbox is not None}
        if self.outbox is not None:
            outboxes.add(self.outbox)
        for outbox in outboxes:
            unfinished = [c.path for c in cursors if c.outbox is outbox]
            outbox.release(self.name, [*unfinished, *(u.path for u in self.backlog.unread)], keep)
        self.backlog.abandon()

    def forked(self) -> None:
        """Begin with nothing to send."""
        self.ended = self.ending = self.cancelled = False
        self._stepping = False
        self._downstream.forked()
        self.backlog.forked()
        self._before, self._unsaved = None, []
        self._more, self._tend_at = False, 0.0

    def stats(self) -> TransportStats:
        """Return the transport's figures."""
        try:
            connected = bool(self.transport.is_connected)
        except Exception:
            connected = False
        backlog = self.backlog
        return self._downstream.stats(
            backlog.lag_events, backlog.oldest, backlog.dropped, connected
        )
