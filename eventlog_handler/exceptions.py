"""Every error this package raises on purpose.

```
EventSessionLoggerError
├── LocalLoggingError
├── SerializationError
└── TransportError
    ├── TransportConnectionError
    ├── TransportRejectedError
    └── TransportTimeoutError
```

A wrong option is a plain `ValueError` or `TypeError`, raised where it is configured.
"""

from __future__ import annotations


class EventSessionLoggerError(Exception):
    """Base of all errors of this package; raised itself for an event after `close()`."""


class LocalLoggingError(EventSessionLoggerError):
    """The event's line could not be written to its session file; the cause is chained."""


class SerializationError(EventSessionLoggerError):
    """A processor or a custom formatter failed; a readable substitute was written instead.

    It reaches `error_handler` only, never the caller: the event has a line all the same.
    """


class TransportError(EventSessionLoggerError):
    """A transport did not take an event; raise it, or one of its children, from `send`.

    Args:
        *args: The reason, without secrets: it is told and kept.
        retry_after_seconds: How long the far side asks to be left alone (HTTP's `Retry-After`).
    """

    def __init__(self, *args: object, retry_after_seconds: float | None = None) -> None:
        super().__init__(*args)
        self.retry_after_seconds = retry_after_seconds


class TransportConnectionError(TransportError):
    """The far side cannot be reached."""


class TransportRejectedError(TransportError):
    """The far side refuses this event for good (too large, malformed): it is parked."""


class TransportTimeoutError(TransportError):
    """The far side did not answer in time; whether it took the event is not known."""
