"""Flushing: until the files, until the transports, of all sessions or of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog

from eventlog_handler import EventLogHandler, EventLogProcessor, EventSessionLogger, FlushReceipt
from eventlog_handler._outbox import CHUNK_ROWS
from eventlog_handler.testing import FailingTransport, GatedTransport, RecordingTransport
from tests.conftest import events_of
from tests.test_listener import record

Make = Callable[..., EventLogHandler]


def log(handler: EventLogHandler, session_id: str, message: str = "x") -> None:
    """Log one event of a session."""
    handler.handle(record(message, session_id))


def plant_a_link(base: Path, session: str) -> None:
    """Have a session whose directory cannot be used."""
    base.mkdir(exist_ok=True)
    (base / "elsewhere").mkdir()
    (base / session).symlink_to(base / "elsewhere")


def test_flush_waits_for_the_files(make_handler: Make, base: Path) -> None:
    """After a flush all events are in their files, and the receipt says so."""
    handler = make_handler()
    for number in range(100):
        log(handler, f"s{number % 7}")
    assert handler.flush() == FlushReceipt(True, "file", None, 0, ())
    assert len(events_of(base)) == 100


def test_a_receipt_is_true_only_if_all_was_reached() -> None:
    """`if handler.flush():` asks what a reader thinks it asks."""
    assert FlushReceipt(True, "file", None, 0, ())
    assert not FlushReceipt(False, "file", None, 1, ())


def test_flush_until_the_transports_have_it(make_handler: Make) -> None:
    """Until `transport` waits for acknowledgements, until `file` does not."""
    gated = GatedTransport()
    handler = make_handler(downstream_transport=gated)
    log(handler, "s")
    assert handler.flush(until="file", timeout=30)
    receipt = handler.flush(until="transport", timeout=0.05)
    assert receipt == FlushReceipt(False, "transport", None, 0, ("gated",))
    gated.open()
    assert handler.flush(until="transport", timeout=30)
    assert len(gated.sent) == 1


def test_flush_waits_for_what_was_left_before(make_handler: Make) -> None:
    """What an earlier gateway has not sent is sent before a receipt of the next one is true."""
    down, still_down, up = FailingTransport(), FailingTransport(), RecordingTransport()
    down.name = still_down.name = up.name = "far side"
    before = make_handler(downstream_transport=down, shutdown_timeout_seconds=0.1)
    # More sessions than are taken over at once.
    for number in range(CHUNK_ROWS + 50):
        log(before, f"s{number}")
    before.close()
    between = make_handler(downstream_transport=still_down, shutdown_timeout_seconds=0.1)
    assert between.flush(until="transport", timeout=0.2).behind == ("far side",)
    between.close()
    after = make_handler(downstream_transport=up)
    assert after.flush(until="transport", timeout=60)
    assert len({sent["session_id"] for sent in up.events}) == CHUNK_ROWS + 50


def test_flush_of_one_session_waits_for_no_other_file(make_handler: Make, base: Path) -> None:
    """A session whose directory cannot be written is none of another one's business."""
    plant_a_link(base, "bad")
    handler = make_handler(shutdown_timeout_seconds=0.1)
    log(handler, "bad")
    log(handler, "good")
    assert handler.flush("good", timeout=30)
    receipt = handler.flush("bad", timeout=0.01)
    assert (receipt.complete, receipt.session_id, receipt.waiting) == (False, "bad", 1)
    assert not handler.flush(timeout=0.01)


def test_flush_of_one_session_waits_for_no_other_delivery(make_handler: Make) -> None:
    """A session whose event the far side does not take holds up no other one's flush."""

    class Refusing(RecordingTransport):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            return (metadata or {})["session_id"] != "bad" and await super().send(event, metadata)

    handler = make_handler(
        downstream_transport=Refusing(), retry_delay_seconds=1000, breaker_failures=1000
    )
    log(handler, "bad")
    log(handler, "good")
    assert handler.flush("good", until="transport", timeout=30)
    assert handler.flush("bad", until="transport", timeout=0.01).behind == ("recording",)


def test_flush_of_one_session_needs_no_event_of_it(make_handler: Make) -> None:
    """A session that nobody has logged to is flushed."""
    handler = make_handler(downstream_transport=FailingTransport.down())
    log(handler, "other")
    assert handler.flush("nobody", until="transport", timeout=30)


def test_flush_until_something_else_is_refused(make_handler: Make) -> None:
    """The error says what there is."""
    with pytest.raises(ValueError, match=r"until='disk' does not exist; write one of 'file', 't"):
        make_handler().flush(until="disk")


def test_a_processor_flushes_too(base: Path) -> None:
    """The same on a structlog chain."""
    transport = RecordingTransport()
    processor = EventLogProcessor(log_base_dir=base, downstream_transport=transport)
    structlog.configure(processors=[processor, structlog.dev.ConsoleRenderer()])
    processor(None, "info", {"event": "hello", "session_id": "s"})
    assert processor.flush("s", until="transport", timeout=30)
    assert [e["message"] for e in transport.events] == ["hello"]
    processor.close()


@pytest.mark.anyio
async def test_a_gateway_flushes_without_blocking_its_loop(base: Path) -> None:
    """The same, awaited."""
    transport = GatedTransport()
    async with EventSessionLogger(
        base, downstream_transport=transport, downstream_wait_seconds=0
    ) as gateway:
        await gateway({"type": "note", "session_id": "s"})
        assert await gateway.flush()
        assert not await gateway.flush("s", until="transport", timeout=0.01)
        transport.open()
        assert await gateway.flush("s", until="transport", timeout=30)
    assert len(transport.sent) == 1


@pytest.mark.anyio
async def test_a_gateway_sends_refused_events_again(base: Path) -> None:
    """What a transport has parked goes out again, under the same id."""
    transport = FailingTransport(failures=1, healthy=True)
    async with EventSessionLogger(
        base, downstream_transport=transport, max_retry_attempts=0, retry_delay_seconds=0
    ) as gateway:
        await gateway({"type": "note", "session_id": "s", "n": 1})
        assert await gateway.flush(until="transport", timeout=30)
        assert gateway.stats().transports["failing"].rejected == 1
        parked = base / ".eventlog" / "rejected" / "failing.jsonl"
        assert parked.exists()
        assert gateway.resend_rejected() == 1
        assert await gateway.flush(until="transport", timeout=30)
        assert [e["n"] for e in transport.events] == [1]
        assert not parked.exists()


@pytest.mark.anyio
async def test_what_one_gateway_leaves_the_next_one_sends(base: Path) -> None:
    """An outage that outlasts a process costs no event, and no order."""
    options = {"retry_delay_seconds": 0, "max_retry_attempts": 0, "breaker_failures": 1}
    async with EventSessionLogger(
        base, downstream_transport=FailingTransport.down(), **options
    ) as gateway:
        await gateway({"type": "note", "session_id": "s", "n": 1})
        await gateway({"type": "note", "session_id": "other", "n": 2})
    transport = RecordingTransport("down")
    async with EventSessionLogger(base, downstream_transport=transport, **options) as gateway:
        await gateway({"type": "note", "session_id": "s", "n": 3})
        with anyio.fail_after(30):
            while len(transport.sent) < 3:
                await anyio.sleep(0.001)
    assert [e["n"] for e in transport.events if e["session_id"] == "s"] == [1, 3]


@pytest.mark.anyio
async def test_a_flush_that_is_overtaken_by_the_end_says_what_is_missing(base: Path) -> None:
    """Where the gateway is closed in an outage, nothing is said to be acknowledged."""
    down, receipts = FailingTransport.down(), list[FlushReceipt]()
    gateway = EventSessionLogger(
        base,
        downstream_transport=down,
        downstream_wait_seconds=0,
        retry_delay_seconds=0.001,
        shutdown_timeout_seconds=0.1,
    )
    await gateway({"type": "note", "session_id": "s"})

    async def flush() -> None:
        receipts.append(await gateway.flush(until="transport", timeout=60))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(flush)
            while gateway.stats().transports["down"].breaker == "closed":
                await anyio.sleep(0.001)
            await gateway.close()
    assert [(receipt.complete, receipt.behind) for receipt in receipts] == [(False, ("down",))]
