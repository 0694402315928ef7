"""A durable, replayable record per session, from code that already calls `logging` or structlog.

```
logger.info(…)            structlog chain              await gateway(event)
     │ EventLogHandler         │ EventLogProcessor            │ EventSessionLogger
     └── record → event ───────┴── dict → event ──┐           │
                 encoded once, on the caller: a snapshot       │
                               │                               │
                hand-off journal (mapped, crash-safe)         │
                               │  listener thread, batches     │
                               └────────► EventSessionLogger ◄─┘
                                             │ 1. session file (always first)
                                             │ 2. the callback, if there is one
                                             ▼
                       logs/sessions/{session_id}/{timestamp}.jsonl
                                             │ 3. from there to each transport, at least once
```

Where to look, from the top; a module imports only from below it:

- `handler.py`, `processor.py`, `factories.py`: the ways in. `_feed.py`: what the first two share.
- `_listener.py`: the thread behind handler and processor, their shutdown and fork.
- `session_logger.py`: the gateway. What it does for an event stands in `__call__`.
- `_delivery.py`: what goes to which transport. `_worker.py`: the thread of each. `_sender.py`,
  `_lanes.py`: its loop, and the callback's. `_batch.py`, `_downstream.py`: one batch, one call.
- `_backlog.py`, `_cursor.py`: what a transport has yet to get. `_outbox.py`, `_owner.py`,
  `_database.py`: how far it is, for the next process. `_lines.py`: files read back.
  `_rejected.py`: what it refuses.
- `_intake.py`: an event's fields → its snapshot. `_waiter.py`: how a caller waits on any loop.
- `_files.py`: session files. `_handoff.py`, `_journal.py`: from the callers' threads to the
  listener's, in memory or crash-safe. `_ring.py`: the journal's format.
- `_recovery.py`: what dead processes left.
- `_snapshot.py`: what was logged → an event's fields. `_encode.py`: any value → JSON.
  `_payload.py`: an event on its way to the listener. `_stamp.py`: ids and times.
- `_paths.py`: ids and patterns → names. `_config.py`: every option. `redact.py`: processors.
- `_context.py`, `_breaker.py`, `_lifecycle.py`, `_report.py`: session_context · breaker · exit and
  fork · how failures are told.
- `transports/`: `__init__.py` makes them of URLs, `base.py` is their contract, `_remote.py` what
  those to servers share; a file for each broker.
- `events.py`, `exceptions.py`, `typing.py`, `metrics.py`, `testing.py`.
"""

from eventlog_handler._context import session_context
from eventlog_handler.events import SemiSessionEvent, SessionEvent
from eventlog_handler.exceptions import (
    EventSessionLoggerError,
    LocalLoggingError,
    SerializationError,
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.factories import (
    create_backward_compatible,
    create_from_environment,
    create_logging_only,
    create_session_logger,
    create_with_callback,
    create_with_transport,
    migrate_from_session_logger,
)
from eventlog_handler.handler import EventLogHandler
from eventlog_handler.processor import EventLogProcessor
from eventlog_handler.redact import redact_keys, redact_patterns
from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.transports.builtin import (
    CallbackTransport,
    LoggingTransport,
    NullTransport,
)
from eventlog_handler.typing import FlushReceipt, OutgoingEvent, Stats, TransportStats

__all__ = [
    "CallbackTransport",
    "EventLogHandler",
    "EventLogProcessor",
    "EventSessionLogger",
    "EventSessionLoggerError",
    "FlushReceipt",
    "LocalLoggingError",
    "LoggingTransport",
    "NullTransport",
    "OutgoingEvent",
    "SemiSessionEvent",
    "SerializationError",
    "SessionEvent",
    "Stats",
    "TransportConnectionError",
    "TransportError",
    "TransportInterface",
    "TransportRejectedError",
    "TransportStats",
    "TransportTimeoutError",
    "create_backward_compatible",
    "create_from_environment",
    "create_logging_only",
    "create_session_logger",
    "create_with_callback",
    "create_with_transport",
    "migrate_from_session_logger",
    "redact_keys",
    "redact_patterns",
    "session_context",
]
