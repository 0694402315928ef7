"""aiohttp by itself: a POST for each batch, in lines (`format=ndjson`)."""

import hashlib
from collections.abc import Sequence

from aiohttp import ClientSession

from eventlog_handler.typing import OutgoingEvent
from tests.transports.test_http import LOGIN, HttpReceiver


async def send(
    server: HttpReceiver, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    url = f"http://127.0.0.1:{server.port}/{destination}"
    async with ClientSession(headers={"Authorization": LOGIN}) as client:
        for batch in batches:
            ids = "\n".join(event.id for event in batch)
            headers = {
                "Content-Type": "application/x-ndjson",
                "Idempotency-Key": hashlib.sha256(ids.encode()).hexdigest(),
            }
            body = b"\n".join(event.line for event in batch)
            async with client.post(url, data=body, headers=headers) as answer:
                answer.raise_for_status()
                await answer.read()
