"""The package's vocabulary: aliases, protocols and the tuples that travel between modules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from eventlog_handler import _stamp

DownstreamCallback = Callable[[Any], Awaitable[None]]
"""Gets the live event (from the handler or processor: its fields as a dict)."""

ErrorHandler = Callable[[Exception, str], None]
"""Gets every contained failure, and what was being done when it happened."""

EventFields = dict[str, Any]
"""An event on its way to being encoded."""

EventProcessor = Callable[[EventFields], Mapping[str, Any]]
"""Gets its own copy of an event's fields, returns what is stored; may raise `DropEvent`."""

LineFormatter = Callable[[EventFields], "str | bytes"]
"""Turns one line's object (`timestamp`, `id`, `seq`, `event`) into the text of a custom file."""


EventHead = tuple[str | None, str, int, float]
"""Session, type, number within the process, and Unix time of an event that has no id yet.

A plain tuple, as one of a class is dearer for callers.
"""

Bytes = bytes | memoryview
"""A large text is a view of what its caller encoded, and not cut out of it."""


class EncodedEvent(NamedTuple):
    """An event as it leaves its caller: a snapshot that nothing can change any more."""

    session_id: str | None
    """None where no session is known."""
    type: str
    id: str
    """Unique for ever, and the same at every redelivery."""
    seconds: float
    """Unix time of the call."""
    body: Bytes
    """The event's JSON object, UTF-8."""

    @property
    def timestamp(self) -> str:
        """The time of the call in ISO 8601, in UTC, with microseconds."""
        return _stamp.timestamp(self.seconds)

    def line(self, seq: int | None) -> bytes:
        """Return the line of the session file, without its line feed.

        Args:
            seq: The event's number within its file, from 1; None where there is no file.
        """
        return b"".join((self.head(seq), self.body, b"}"))

    def head(self, seq: int | None) -> bytes:
        """Return what stands before `body` in the line; behind it stands a brace.

        Args:
            seq: As for `line`.
        """
        _, _, unique, seconds, _ = self
        number = "" if seq is None else f'"seq":{seq},'
        time = _stamp.timestamp(seconds)
        return f'{{"timestamp":"{time}","id":"{unique}",{number}"event":'.encode()


class OutgoingEvent(NamedTuple):
    """An event on its way to the transports: the line, and what is needed to route it."""

    line: bytes
    """Exactly the session file's line (`jsonl`), without its line feed."""
    id: str
    session_id: str
    """The session's id; of an unknown session, the name of its directory."""
    type: str
    timestamp: str

    @property
    def metadata(self) -> dict[str, Any]:
        """What `TransportInterface.send` gets beside the line."""
        return {
            "id": self.id,
            "session_id": self.session_id,
            "type": self.type,
            "timestamp": self.timestamp,
        }


class Written(NamedTuple):
    """Events of one session that were written together."""

    outbox: Any
    """Where it is saved how far the file is sent; None where that is not saved."""
    path: str
    """The file's, below the base."""
    session: str
    """As `OutgoingEvent.session_id`."""
    begin: int
    """The byte of the file at which the first begins."""
    seq: int | None
    """The number of the first within the file; None where there is no file."""
    events: Sequence[EncodedEvent]
    ends: list[int]
    """The byte after each of them, its line feed included."""

    def outgoing(self, index: int) -> OutgoingEvent:
        """Return one of the events as transports get it."""
        event = self.events[index]
        line = event.line(None if self.seq is None else self.seq + index)
        return OutgoingEvent(line, event.id, self.session, event.type, event.timestamp)

    def span(self, index: int) -> tuple[int, int]:
        """Return where one of the events begins and ends in the file."""
        return self.ends[index - 1] if index else self.begin, self.ends[index]


class Registrar(Protocol):
    """Who must know of a file before its first line: the delivery."""

    @property
    def outbox(self) -> Any:
        """Where it is saved how far files are sent."""

    @property
    def generation(self) -> int:
        """A number that changes when files that are known have to be made known again."""

    def register(self, path: str, session: str, size: int) -> int:
        """Make a file known.

        Args:
            path: Below the base.
            session: Whose lines it holds.
            size: Its bytes so far; they are not news.

        Returns:
            The generation in which it is known; another one asks to be called again.
        """


class TransportStats(NamedTuple):
    """One downstream transport, or the callback, since the gateway began."""

    sent: int
    """Events that were acknowledged."""
    failed: int
    """Attempts that did not end in an acknowledgement."""
    retried: int
    """Attempts for an event that had failed before."""
    rejected: int
    """Events that the far side refuses for good, and that are parked."""
    dropped: int
    """Events that are lost for it: live-only delivery without room in memory or at its end, or a
    file that somebody has taken away."""
    lag_events: int
    """Events accepted and not yet sent, rejected or dropped."""
    lag_seconds: float
    """How long the oldest of these has waited, about."""
    state: str
    """`live`; or `behind`: its breaker is not closed, or more than a batch waits."""
    breaker: str
    """`closed`, `open` or `half-open`."""
    connected: bool
    last_error: str | None


class Stats(NamedTuple):
    """A gateway's figures, since it began."""

    received: int
    """Events that were handed over: written, waiting, or dropped."""
    written: int
    bytes: int
    local_errors: int
    """Failures of writing and encoding; a failed write that is tried again counts each time."""
    dropped: Mapping[str, int]
    """Events that got no line, by reason."""
    handoff_depth: int
    """Events handed off and not yet in their files."""
    durability: str
    """The level in force."""
    overhead_mean_seconds: float
    """Mean time that `await gateway(event)` spent on encoding and writing."""
    overhead_max_seconds: float
    direct_mean_seconds: float
    """The part of the mean that was the write itself: what logging directly would cost too."""
    delivery: str
    """`at-least-once`; `unsaved` while offsets cannot be saved, so that a kill now would cost
    events or send many again; `live-only` without session files in `jsonl`."""
    transports: Mapping[str, TransportStats]


class FlushReceipt(NamedTuple):
    """What a flush has reached; true if it is all that was asked for."""

    complete: bool
    until: str
    session_id: str | None
    waiting: int
    """Events that are not in their files yet."""
    behind: tuple[str, ...]
    """Transports that have not acknowledged all of it, by name."""

    def __bool__(self) -> bool:
        """Whether all was reached."""
        return self.complete


Marker = Callable[[], None]


class DrainedBeforeClose(Protocol):
    """What a gateway lets finish before it closes its files: its listener."""

    @property
    def depth(self) -> int:
        """How many events have not reached their files."""

    @property
    def durability(self) -> str:
        """What a handed-off event survives."""

    def drain(self, deadline: float, session_id: str | None = None) -> int:
        """Wait until what is handed off is in its files.

        Args:
            deadline: At the latest, on the monotonic clock.
            session_id: Only this session's; None is all.

        Returns:
            How many events are not.
        """
