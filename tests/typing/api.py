"""Checked by mypy, never run: the API as users type against it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import structlog

from eventlog_handler import (
    EventLogHandler,
    EventLogProcessor,
    EventSessionLogger,
    NullTransport,
    SessionEvent,
    Stats,
    TransportInterface,
    create_with_callback,
    create_with_transport,
    redact_keys,
    redact_patterns,
    session_context,
)


async def callback(event: object) -> None: ...


def on_error(error: Exception, context: str) -> None: ...


class Own(TransportInterface):
    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        return True

    async def close(self) -> None: ...

    async def health_check(self) -> bool:
        return True

    @property
    def is_connected(self) -> bool:
        return True


async def use_the_gateway() -> None:
    gateway = EventSessionLogger(
        Path("logs"),
        callback,
        Own(),
        error_handler=on_error,
        processors=[redact_keys("password"), redact_patterns(r"sk-\w+")],
    )
    written: bool = await gateway(SessionEvent("t", "s"))
    path: Path = gateway.get_log_file_path("s")
    stats: Stats = gateway.stats()
    async with create_with_callback(callback) as other:
        await other({"type": "t"})
    create_with_transport(NullTransport(), max_retry_attempts=1)
    print(written, path, stats.transports["Own"].lag_events)


def use_logging() -> None:
    handler: logging.Handler = EventLogHandler("INFO", log_base_dir="logs")
    logging.getLogger().addHandler(handler)
    structlog.configure(processors=[EventLogProcessor(passthrough=False)])


@session_context("s", user="ada")
def decorated(number: int) -> str:
    return str(number)


async def bound() -> None:
    async with session_context("s"):
        text: str = decorated(1)
        print(text)
