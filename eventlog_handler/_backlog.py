"""What one transport has yet to get: by session, in order.

The session files hold it, so that an outage of any length costs disk and no memory. Of what has
just been written a little is kept in memory too: a transport that keeps up causes no reading.
Without session files (live-only delivery) the memory is all there is.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict, deque

from eventlog_handler._cursor import Cursor, Released
from eventlog_handler._lines import CHUNK_BYTES, Extent, parse_line, read_lines
from eventlog_handler._outbox import Outbox, Owed
from eventlog_handler._report import Report
from eventlog_handler.exceptions import TransportError
from eventlog_handler.typing import OutgoingEvent, Written

BUFFER_BYTES = 1024 * 1024
"""Kept in memory for each transport beside the files."""
_OBJECT_BYTES = 600
"""What an event costs in memory beyond its line."""
LINE_BYTES = 1024
"""Read at once for each event that is wanted."""
READ_AGAIN_SECONDS = 5.0
"""Until a file that cannot be read is tried again."""


class Backlog:
    """All cursors of one transport.

    Writers call `grow`, `decide` and `when` from any thread; the rest is for the transport's own.

    Args:
        name: The transport's.
        report: Hears of files that are gone.
    """

    def __init__(self, name: str, report: Report) -> None:
        self._name = name
        self._report = report
        self.dropped = 0
        self._reset()

    def _reset(self) -> None:
        # Re-entrant: a signal handler may ask for figures while its thread is in here.
        self._lock = threading.RLock()
        self._queues: dict[str, deque[Cursor]] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()
        self._later: dict[str, float] = {}
        self._flying: set[str] = set()
        self._changed: dict[Cursor, None] = {}
        self._bytes = self._buffered = 0
        self.lag_events = 0
        self.unread: list[Owed] = []
        """Files that are owed, and could not be read."""

    def grow(self, written: Written, undecided: bool, capacity: int) -> None:
        """Take what was just written.

        Args:
            written: The events.
            undecided: Whether they wait for the callback's word, see `decide`.
            capacity: How many events are kept where no file is read; more are dropped.
        """
        with self._lock:
            outbox = written.outbox
            queue = self._queues.setdefault(written.session, deque())
            cursor = queue[-1] if queue and queue[-1].continues(written) else None
            if cursor is None:
                cursor = Cursor(outbox, written.path, written.session, written.begin, growing=True)
                queue.append(cursor)
            follows = cursor.buffer[-1][2] if cursor.buffer else cursor.position
            for index in range(len(written.events)):
                if outbox is None and self._buffered >= capacity:
                    self.dropped += 1
                    continue
                begin, end = written.span(index)
                size = end - begin - 1 + _OBJECT_BYTES
                if outbox is None or (follows == begin and self._bytes + size <= BUFFER_BYTES):
                    self._keep(cursor, written.outgoing(index), begin, end)
                    follows = end
                if undecided:
                    cursor.undecided.add(begin)
                cursor.oldest = cursor.oldest if cursor.lag else written.events[index].timestamp
                cursor.lag += 1
                self.lag_events += 1
            cursor.end = max(cursor.end, written.ends[-1])
            self._moved(cursor)

    def owe(self, outbox: Outbox, owed: Owed, extent: Extent) -> int:
        """Take what a file that nobody writes any more still holds.

        Args:
            outbox: Where its position is saved.
            owed: The file.
            extent: What is in it.

        Returns:
            How many events that are; 0 where it is here already.
        """
        with self._lock:
            if any(c.is_of(outbox, owed.path) for c in self._queues.get(owed.session, ())):
                return 0
            cursor = Cursor(outbox, owed.path, owed.session, owed.position, growing=False)
            cursor.end, cursor.oldest = extent.end, extent.oldest
            queue = self._queues.setdefault(owed.session, deque())
            # A file of which nobody knew when the session went on in another comes first.
            later = (n for n, other in enumerate(queue) if other.oldest > cursor.oldest)
            queue.insert(next(later, len(queue)), cursor)
            self._count(cursor, -extent.events)
            self._moved(cursor)
            return extent.events

    def decide(self, written: Written, index: int, taken: bool) -> None:
        """Note what the callback did with an event.

        Args:
            written: As given to `grow`.
            index: Which of its events.
            taken: Whether the callback has it, so that the transport does not get it.
        """
        begin, end = written.span(index)
        with self._lock:
            for cursor in self._queues.get(written.session, ()):
                if cursor.is_of(written.outbox, written.path) and begin in cursor.undecided:
                    cursor.undecided.discard(begin)
                    if taken:
                        cursor.skip(begin, end)
                    self._moved(cursor)
                    return

    def when(self, call: Released, session: str | None, written: Written | None = None) -> int:
        """Have `call` called once for each cursor that reaches what it has to reach.

        Args:
            call: Called on the transport's thread, or at once. Never for what is gone already.
            session: Of this session; None is all.
            written: Wait for these events alone; None is all that is there now.

        Returns:
            How many calls there will be.
        """
        with self._lock:
            queues = self._queues.values() if session is None else [self._queues.get(session, ())]
            cursors = [cursor for queue in queues for cursor in queue]
            if written is not None:
                cursors = [c for c in cursors if c.is_of(written.outbox, written.path)]
            for cursor in cursors:
                target = cursor.end if written is None else written.ends[-1]
                cursor.waiters.append((target, call))
                self._moved(cursor)
            return len(cursors)

    def take(self, now: float, limit: int, most_bytes: int) -> list[tuple[Cursor, OutgoingEvent]]:
        """Return the next events to send, in order within each session, with their cursors.

        Each cursor has to be given to `settle` or `postpone` before its session is served again.

        Args:
            now: The time, of the same clock as `postpone`'s.
            limit: Events, at most.
            most_bytes: Of their lines, at most; but one event at least.
        """
        with self._lock:
            for session in [s for s, at in self._later.items() if at <= now]:
                del self._later[session]
                self._place(session)
        batch: list[tuple[Cursor, OutgoingEvent]] = []
        while len(batch) < limit and most_bytes > 0:
            cursor = self._next()
            if cursor is None:
                break
            try:
                events = self._events_of(cursor, limit - len(batch))
            except OSError as error:
                self._report.tell(error, f"{self._name}: reading {cursor.path}")
                self.postpone(cursor, now + READ_AGAIN_SECONDS)
                continue
            for event in events:
                if batch and len(event.line) > most_bytes:
                    most_bytes = 0
                    break
                most_bytes -= len(event.line)
                batch.append((cursor, event))
            if not batch or batch[-1][0] is not cursor:
                self._return(cursor)
        return batch

    def _return(self, cursor: Cursor) -> None:
        """Have a cursor of which nothing was taken served first the next time."""
        with self._lock:
            self.settle(cursor, 0)
            if cursor.session in self._ready:
                self._ready.move_to_end(cursor.session, last=False)

    def _next(self) -> Cursor | None:
        with self._lock:
            if not self._ready:
                return None
            session, _ = self._ready.popitem(last=False)
            self._flying.add(session)
            return self._queues[session][0]

    def _events_of(self, cursor: Cursor, limit: int) -> list[OutgoingEvent]:
        if not cursor.buffer and cursor.outbox is not None:
            self._read(cursor, cursor.outbox, limit)
        with self._lock:
            return list(itertools.islice(cursor.sendable(), limit))

    def _read(self, cursor: Cursor, outbox: Outbox, limit: int) -> None:
        """Read what is taken now, and no more: many sessions would add up to much memory.

        Without the lock, as the disk may be slow.
        """
        size = min(CHUNK_BYTES, limit * LINE_BYTES)
        try:
            begin = cursor.position
            lines = read_lines(outbox.base, cursor.path, begin, cursor.end, size)
        except (FileNotFoundError, EOFError) as error:
            if not outbox.base.is_dir():
                # All of it is gone, for a moment perhaps: an unmounted disk.
                raise OSError(f"the base directory {outbox.base} is gone") from error
            self._lose(cursor, error)
            return
        with self._lock:
            for line in lines[:limit] if cursor.position == begin else ():
                end = begin + len(line) + 1
                self._keep(cursor, parse_line(line, cursor.session), begin, end)
                begin = end

    def _keep(self, cursor: Cursor, event: OutgoingEvent, begin: int, end: int) -> None:
        cursor.buffer.append((event, begin, end))
        self._bytes += len(event.line) + _OBJECT_BYTES
        self._buffered += 1

    def _let_go(self, event: OutgoingEvent) -> None:
        self._bytes -= len(event.line) + _OBJECT_BYTES
        self._buffered -= 1

    def _lose(self, cursor: Cursor, error: Exception) -> None:
        """Give up a file that somebody has taken away or cut."""
        with self._lock:
            count = cursor.lag
            self.dropped += count
            cursor.position = cursor.end
            self._moved(cursor)
        told = TransportError(f"{count} events were not sent: {cursor.path} is gone or cut")
        told.__cause__ = error
        self._report.tell(told, self._name)

    def settle(self, cursor: Cursor, count: int, hold: bool = False) -> None:
        """Note that the first events that were taken of a cursor are done with.

        Args:
            cursor: Whose.
            count: How many.
            hold: Whether its session is not to be served yet, as the next one has failed.
        """
        with self._lock:
            if not hold:
                self._flying.discard(cursor.session)
            for _ in range(min(count, len(cursor.buffer))):
                event, _, cursor.position = cursor.buffer.popleft()
                self._let_go(event)
                self._count(cursor, 1)
                cursor.oldest = event.timestamp
                cursor.attempts = cursor.refusals = 0
            if self._bytes > BUFFER_BYTES and not hold:
                # What was read and did not fit into a batch; each session would keep some.
                self._clear(cursor)
            self._moved(cursor)

    def _count(self, cursor: Cursor, count: int) -> None:
        cursor.lag -= count
        self.lag_events -= count
        if count:
            self._changed[cursor] = None

    def postpone(self, cursor: Cursor, until: float) -> None:
        """Serve a cursor's session again at `until`; what its file has is not kept in memory."""
        with self._lock:
            self._flying.discard(cursor.session)
            self._later[cursor.session] = until
            self._place(cursor.session)
            self._clear(cursor)

    def _clear(self, cursor: Cursor) -> None:
        """Keep nothing in memory that its file has."""
        while cursor.buffer and cursor.outbox is not None:
            self._let_go(cursor.buffer.pop()[0])

    def land(self) -> None:
        """Serve again what was taken and never given back: its sender has failed, or is gone."""
        with self._lock:
            landed, self._flying = self._flying, set()
            for session in landed:
                self._place(session)

    def resume(self) -> None:
        """Serve all postponed sessions now: the transport has recovered."""
        with self._lock:
            resumed, self._later = self._later, {}
            for session in resumed:
                self._place(session)

    def seconds_to_next(self, now: float) -> float:
        """Return how long until there is something to take: 0, or infinite until more comes."""
        with self._lock:
            if self._ready:
                return 0.0
            return max(0.0, min(self._later.values(), default=math.inf) - now)

    def _moved(self, cursor: Cursor) -> None:
        """Bring everything in line with a cursor that may have moved."""
        passed = -1
        while passed:
            passed = cursor.pass_taken()
            self._count(cursor, passed)
            while cursor.buffer and cursor.buffer[0][2] <= cursor.position:
                self._let_go(cursor.buffer.popleft()[0])
        queue = self._queues.get(cursor.session, ())
        if cursor.done and cursor in queue:
            # Counts of a file that somebody has changed may be wrong.
            self._count(cursor, cursor.lag)
            self._changed[cursor] = None
            self._queues[cursor.session].remove(cursor)
        self._place(cursor.session)
        waiters, cursor.waiters = cursor.waiters, []
        for target, call in waiters:
            if cursor.done or target <= cursor.position:
                call()
            else:
                cursor.waiters.append((target, call))

    def _place(self, session: str) -> None:
        """Decide whether a session is to be served: all that changes anything asks here."""
        queue = self._queues.get(session)
        if not queue:
            self._queues.pop(session, None)
            self._flying.discard(session)
            self._later.pop(session, None)
        if not queue or session in self._flying or session in self._later or queue[0].held:
            self._ready.pop(session, None)
        else:
            self._ready.setdefault(session)

    @property
    def sessions(self) -> int:
        """How many sessions have something left."""
        return len(self._queues)

    def lags(self, session: str | None) -> bool:
        """Whether something of a session is left, or of any."""
        return bool(self._queues) if session is None else session in self._queues

    @property
    def lag_bytes(self) -> int:
        """How many bytes of lines wait."""
        filed = (c.end - c.position for c in self.cursors() if c.outbox is not None)
        return sum(filed) or self._bytes

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for something to be sent."""
        return any(cursor.waiters for cursor in self.cursors())

    def changes(self) -> list[Cursor]:
        """Return the cursors whose positions have changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, {}
        return list(changed)

    def cursors(self) -> list[Cursor]:
        """Return the cursors that have something left."""
        with self._lock:
            return [cursor for queue in self._queues.values() for cursor in queue]

    def position(self, outbox: Outbox | None, session: str, path: str, otherwise: int) -> int:
        """Return up to where a file is done with.

        Args:
            outbox: Where its position is saved.
            session: Whose it is.
            path: Below the base.
            otherwise: If nothing is left of it.
        """
        with self._lock:
            for cursor in self._queues.get(session, ()):
                if cursor.is_of(outbox, path):
                    return cursor.position
        return otherwise

    @property
    def oldest(self) -> str:
        """The timestamp of the oldest event that waits, about; empty where none does."""
        return min((c.oldest for c in self.cursors() if c.oldest), default="")

    def abandon(self) -> None:
        """End: what has no file is dropped, who waits is released."""
        with self._lock:
            for cursor in self.cursors():
                for _, call in cursor.waiters:
                    call()
                cursor.waiters.clear()
                if cursor.outbox is None:
                    self.dropped += cursor.lag
                    while cursor.buffer:
                        self._let_go(cursor.buffer.pop()[0])
                    self._moved(cursor)

    def forked(self) -> None:
        """In a child: all of it is the parent's to send."""
        self._reset()
