"""Events a second through the handler to each broker, beside the same driver used bare.

`python benchmarks/transports.py [broker …]` starts each broker's test server and sends the same
lines to it in turn, in child processes: bare (`benchmarks/bare/`: the driver alone, batches of 500,
each confirmed before the next), from the files (the handler's delivery of what was logged before),
and whole (from the first `logger.info` until all is acknowledged, which bare need not log). Needs
`.[test]` and the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from eventlog_handler import EventLogHandler  # noqa: E402
from eventlog_handler.testing import RecordingTransport  # noqa: E402
from eventlog_handler.transports import named_transports  # noqa: E402

BATCH = 500
SESSIONS = 50
PATIENCE_SECONDS = 600.0


class Subject(NamedTuple):
    """A broker: its test server, and a URL's options beyond the destination."""

    server: str
    events: int
    options: dict[str, Any] = {}  # noqa: RUF012


SUBJECTS = {
    "redis": Subject("test_redis:RedisServer", 50_000),
    "amqp": Subject("test_amqp:RabbitServer", 20_000),
    "kafka": Subject("test_kafka:KafkaServer", 100_000),
    "nats": Subject("test_nats:NatsServer", 50_000),
    "sqs": Subject("test_sqs:SqsServer", 2_000),
    "servicebus": Subject("test_servicebus:ServiceBusPeer", 10_000),
    "http": Subject("test_http:HttpReceiver", 100_000, {"format": "ndjson"}),
    "otlp": Subject("test_otlp:OtlpReceiver", 100_000),
}


def server_of(broker: str, folder: Path) -> Any:
    """Return the broker's test server, not started."""
    module, _, name = SUBJECTS[broker].server.partition(":")
    return getattr(importlib.import_module(f"tests.transports.{module}"), name)(folder)


def log(logger: logging.Logger, count: int) -> None:
    """Log what all three send: about 300 bytes a line."""
    for number in range(count):
        extra = {"session_id": f"chat-{number % SESSIONS}", "n": number, "text": "x" * 80}
        logger.info("token %d", number, extra=extra)


def logger_of(handler: logging.Handler) -> logging.Logger:
    """Return a logger with this handler."""
    logger = logging.Logger("app")
    logger.addHandler(handler)
    return logger


def bare(server: Any, destination: str, broker: str, base: Path) -> float:
    """Send with the driver alone; return the seconds."""
    count, recorder = SUBJECTS[broker].events, RecordingTransport()
    events: list[Any] = []

    async def keep(batch: list[Any]) -> bool:
        events.extend(batch)
        return True

    recorder.send_batch = keep  # type: ignore[attr-defined]
    handler = EventLogHandler(log_base_dir=base, downstream_transport=recorder)
    log(logger_of(handler), count)
    assert handler.flush(until="transport", timeout=PATIENCE_SECONDS)
    handler.close()
    batches = [events[begin : begin + BATCH] for begin in range(0, count, BATCH)]
    send = importlib.import_module(f"bare.{broker}").send
    begun = time.perf_counter()
    asyncio.run(send(server, destination, batches))
    return time.perf_counter() - begun


def files(server: Any, destination: str, broker: str, base: Path) -> float:
    """Log while nothing is sent, then time the delivery of it; return the seconds."""
    url = server.url(destination, **SUBJECTS[broker].options)
    [(name, transport)] = named_transports(url).items()
    closed = RecordingTransport(name)

    async def hold(batch: list[Any]) -> bool:
        raise ConnectionError("not yet")

    closed.send_batch = hold  # type: ignore[attr-defined]
    handler = EventLogHandler(
        log_base_dir=base, downstream_transport=closed, batch_events=BATCH, send_timeout_seconds=120
    )
    log(logger_of(handler), SUBJECTS[broker].events)
    assert handler.flush(until="file", timeout=PATIENCE_SECONDS)
    begun = time.perf_counter()
    handler.gateway.update_downstream_transport(transport)
    assert handler.flush(until="transport", timeout=PATIENCE_SECONDS)
    seconds = time.perf_counter() - begun
    handler.close()
    return seconds


def whole(server: Any, destination: str, broker: str, base: Path) -> float:
    """Log and send at the same time; return the seconds."""
    url = server.url(destination, **SUBJECTS[broker].options)
    handler = EventLogHandler(
        log_base_dir=base, downstream_transport=url, batch_events=BATCH, send_timeout_seconds=120
    )
    begun = time.perf_counter()
    log(logger_of(handler), SUBJECTS[broker].events)
    assert handler.flush(until="transport", timeout=PATIENCE_SECONDS)
    seconds = time.perf_counter() - begun
    handler.close()
    return seconds


WAYS: dict[str, Callable[[Any, str, str, Path], float]] = {
    "bare": bare,
    "files": files,
    "whole": whole,
}


def child(way: str, broker: str, port: int, destination: str) -> None:
    """Measure one way once, in this process, and print the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        server = server_of(broker, Path(folder) / "server")
        server.port = port
        print(WAYS[way](server, destination, broker, Path(folder) / "sessions"))


def measure(broker: str, rounds: int) -> dict[str, float]:
    """Return events a second by way: the median of the rounds, whose children alternate."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        server = server_of(broker, Path(folder))
        server.start()
        try:
            for number in range(rounds):
                for way in WAYS:
                    destination = f"{way}-{number}"
                    server.make(destination)
                    command = [sys.executable, __file__, "--child", way, str(server.port)]
                    done = subprocess.run(
                        [*command, destination, broker], capture_output=True, text=True, check=True
                    )
                    seconds[way].append(float(done.stdout.split()[-1]))
        finally:
            server.kill()
    events = SUBJECTS[broker].events
    return {way: events / statistics.median(found) for way, found in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("brokers", nargs="*", help="which; all unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, metavar=("WAY", "PORT", "DESTINATION"))
    arguments = parser.parse_args()
    if arguments.child:
        way, port, destination = arguments.child
        child(way, arguments.brokers[0], int(port), destination)
        return
    print(f"CPython {platform.python_version()}, {platform.platform()}")
    print(f"lines of about 300 bytes, {SESSIONS} sessions, batches of {BATCH}, events a second:\n")
    print("| broker | events | bare | from the files | of bare | whole | of bare |")
    print("|---|---|---|---|---|---|---|")
    for broker in arguments.brokers or SUBJECTS:
        found = measure(broker, arguments.rounds)
        row = [broker, f"{SUBJECTS[broker].events:,}", f"{found['bare']:,.0f}"]
        for way in ("files", "whole"):
            row += [f"{found[way]:,.0f}", f"{found[way] / found['bare']:.2f}"]
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
