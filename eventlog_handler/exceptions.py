"""Every error this package raises on purpose.

```
EventSessionLoggerError
├── LocalLoggingError
├── SerializationError
└── TransportError
    ├── TransportConnectionError
    └── TransportTimeoutError
```

A wrong option is a plain `ValueError` or `TypeError`, raised where it is configured.
"""


class EventSessionLoggerError(Exception):
    """Base of all errors of this package; raised itself for an event after `close()`."""


class LocalLoggingError(EventSessionLoggerError):
    """The event's line could not be written to its session file; the cause is chained."""


class SerializationError(EventSessionLoggerError):
    """A processor or a custom formatter failed; a readable substitute was written instead.

    It reaches `error_handler` only, never the caller: the event has a line all the same.
    """


class TransportError(EventSessionLoggerError):
    """A transport did not take an event; raise it, or one of its children, from `send`."""


class TransportConnectionError(TransportError):
    """The far side cannot be reached."""


class TransportTimeoutError(TransportError):
    """The far side did not answer in time; whether it took the event is not known."""
