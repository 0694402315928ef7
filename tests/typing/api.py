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
    FlushReceipt,
    NullTransport,
    OutgoingEvent,
    SessionEvent,
    Stats,
    TransportError,
    TransportInterface,
    TransportRejectedError,
    create_with_callback,
    create_with_transport,
    redact_keys,
    redact_patterns,
    session_context,
)
from eventlog_handler.metrics import PrometheusCollector


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


async def flush_and_send_again(gateway: EventSessionLogger) -> int:
    receipt: FlushReceipt = await gateway.flush("s", until="transport", timeout=5)
    behind: tuple[str, ...] = receipt.behind
    return gateway.resend_rejected("Own") if receipt else len(behind)


class Batches(Own):
    async def send_batch(self, batch: list[OutgoingEvent]) -> list[Exception | None]:
        return [TransportRejectedError("no") if event.type == "bad" else None for event in batch]


def busy() -> TransportError:
    return TransportError("slow down", retry_after_seconds=30)


def use_logging() -> None:
    handler = EventLogHandler("INFO", log_base_dir="logs")
    as_logging_has_it: logging.Handler = handler
    logging.getLogger().addHandler(as_logging_has_it)
    assert handler.flush("s", until="file", timeout=1.0)
    PrometheusCollector(handler)
    structlog.configure(processors=[EventLogProcessor(passthrough=False)])


@session_context("s", user="ada")
def decorated(number: int) -> str:
    return str(number)


async def bound() -> None:
    async with session_context("s"):
        text: str = decorated(1)
        print(text)
