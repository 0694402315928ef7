"""aiokafka by itself: its idempotent producer, a batch at once."""

import asyncio
from collections.abc import Sequence

from aiokafka import AIOKafkaProducer

from eventlog_handler.typing import OutgoingEvent
from tests.transports.test_kafka import KafkaServer


async def send(
    server: KafkaServer, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    async with AIOKafkaProducer(
        bootstrap_servers=f"127.0.0.1:{server.port}",
        acks="all",
        enable_idempotence=True,
        max_batch_size=1_000_000,
    ) as producer:
        for batch in batches:
            confirmations = []
            for event in batch:
                headers = [(name, text.encode()) for name, text in event.metadata.items()]
                confirmations.append(
                    await producer.send(
                        destination, event.line, key=event.session_id.encode(), headers=headers
                    )
                )
            await asyncio.gather(*confirmations)
