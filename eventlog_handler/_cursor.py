"""How far a transport is in one file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from eventlog_handler._outbox import Outbox
from eventlog_handler.typing import OutgoingEvent, Written

Released = Callable[[], None]
MOST_STRETCHES = 10_000
"""Of what a callback has taken, for each file; beyond it the transport gets such events too."""


class Cursor:
    """How far a transport is in one file, or in the events of a session that has no file.

    Args:
        outbox: Where the position is saved; None where there is no file.
        path: The file's, below the base.
        session: Whose events these are.
        position: The byte up to which all is done with.
        growing: Whether we write the file, so that having sent it is not the end of it.
    """

    __slots__ = (
        "_taken",
        "_taken_ends",
        "attempts",
        "buffer",
        "end",
        "growing",
        "lag",
        "oldest",
        "outbox",
        "path",
        "position",
        "refusals",
        "session",
        "undecided",
        "waiters",
    )

    def __init__(
        self, outbox: Outbox | None, path: str, session: str, position: int, growing: bool
    ) -> None:
        self.outbox = outbox
        self.path = path
        self.session = session
        self.position = self.end = position
        self.growing = growing
        self.buffer: deque[tuple[OutgoingEvent, int, int]] = deque()
        """The next events, without a gap, with where each begins and ends."""
        self.lag = 0
        self.oldest = ""
        self.attempts = 0
        """How often the next event has failed."""
        self.refusals = 0
        """How often that was its own fault, as far as can be known."""
        self.undecided: set[int] = set()
        """Where events begin that the callback is being asked about."""
        self._taken: dict[int, tuple[int, int]] = {}
        self._taken_ends: dict[int, int] = {}
        self.waiters: list[tuple[int, Released]] = []

    def is_of(self, outbox: Outbox | None, path: str) -> bool:
        """Whether this is the cursor of a file."""
        return self.outbox is outbox and self.path == path

    def continues(self, written: Written) -> bool:
        """Whether what was written follows what is here, with nothing for others between."""
        same = self.is_of(written.outbox, written.path)
        return same and (self.outbox is None or self.end == written.begin)

    @property
    def done(self) -> bool:
        """Whether nothing is left to send."""
        return not self.buffer if self.outbox is None else self.position >= self.end

    @property
    def head(self) -> int:
        """Where the next event begins."""
        return self.buffer[0][1] if self.buffer else self.position

    @property
    def held(self) -> bool:
        """Whether the next event waits for the callback."""
        return self.head in self.undecided

    def skip(self, begin: int, end: int) -> None:
        """Note that the callback has taken an event; those that adjoin become one stretch."""
        count = 1
        if end in self._taken:
            end, more = self._taken.pop(end)
            count += more
        if begin in self._taken_ends:
            begin = self._taken_ends.pop(begin)
            count += self._taken[begin][1]
        elif len(self._taken) >= MOST_STRETCHES:
            return
        self._taken[begin] = end, count
        self._taken_ends[end] = begin

    def pass_taken(self) -> int:
        """Go on past what the callback has taken; return how many events that were."""
        passed = 0
        while self.head in self._taken:
            self.position, count = self._taken.pop(self.head)
            del self._taken_ends[self.position]
            passed += count
        return passed

    def sendable(self) -> Iterator[OutgoingEvent]:
        """Return events of the buffer, up to one that is undecided or taken."""
        for event, begin, _ in self.buffer:
            if begin in self.undecided or begin in self._taken:
                return
            yield event
