"""The package's vocabulary: aliases, protocols and the tuples that travel between modules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol

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


class EncodedEvent(NamedTuple):
    """An event as it leaves its caller: a snapshot that nothing can change any more."""

    session_id: str | None
    """None where no session is known."""
    type: str
    id: str
    """Unique for ever, and the same at every redelivery."""
    timestamp: str
    """ISO 8601, UTC, microseconds: when the call was made."""
    body: bytes
    """The event's JSON object, UTF-8."""

    def line(self, seq: int | None) -> bytes:
        """Return the line of the session file, without its line feed.

        Args:
            seq: The event's number within its file, from 1; None where there is no file.
        """
        number = b"" if seq is None else b'"seq":%d,' % seq
        head = f'{{"timestamp":"{self.timestamp}","id":"{self.id}",'.encode()
        return b'%b%b"event":%b}' % (head, number, self.body)


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


class TransportStats(NamedTuple):
    """One downstream transport, since the gateway began."""

    sent: int
    failed: int
    """Attempts that did not end in an acknowledgement."""
    retried: int
    rejected: int
    """Events given up on after all their retries, while the transport was healthy otherwise."""
    dropped: int
    """Events that found no room in memory during an outage, or were left at shutdown."""
    lag_events: int
    """Events accepted and not yet sent, rejected or dropped."""
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
    transports: Mapping[str, TransportStats]


Marker = Callable[[], None]


class DrainedBeforeClose(Protocol):
    """What a gateway lets finish before it closes its files: its listener."""

    @property
    def depth(self) -> int:
        """How many events have not reached their files."""

    @property
    def durability(self) -> str:
        """What a handed-off event survives."""

    def drain(self, deadline: float) -> bool:
        """Wait for what is handed off, until `deadline` on the monotonic clock; whether all was."""
