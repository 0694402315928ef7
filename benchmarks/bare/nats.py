"""nats-py by itself: publish and acknowledgement, a batch at once."""

import asyncio
from collections.abc import Sequence

import nats

from eventlog_handler.typing import OutgoingEvent
from tests.transports.servers import PASSWORD
from tests.transports.test_nats import NatsServer


async def send(
    server: NatsServer, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    client = await nats.connect(
        f"nats://127.0.0.1:{server.port}", user="eventlog", password=PASSWORD
    )
    jetstream = client.jetstream()
    for batch in batches:
        acknowledgements = [
            await jetstream.publish_async(
                f"{destination}.{event.session_id}",
                event.line,
                headers={**event.metadata, "Nats-Msg-Id": event.id},
            )
            for event in batch
        ]
        await asyncio.gather(*acknowledgements)
    await client.close()
