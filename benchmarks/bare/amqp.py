"""aio-pika by itself: a batch published at once, each message confirmed."""

import asyncio
from collections.abc import Sequence

import aio_pika

from eventlog_handler.typing import OutgoingEvent
from tests.transports.servers import PASSWORD
from tests.transports.test_amqp import USER, VHOST, RabbitServer


async def send(
    server: RabbitServer, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    connection = await aio_pika.connect(
        host="127.0.0.1", port=server.port, login=USER, password=PASSWORD, virtualhost=VHOST
    )
    async with connection:
        channel = await connection.channel(on_return_raises=True)
        for batch in batches:
            messages = [
                aio_pika.Message(
                    event.line,
                    message_id=event.id,
                    content_type="application/json",
                    delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                    headers=event.metadata,
                )
                for event in batch
            ]
            publish = channel.default_exchange.publish
            await asyncio.gather(*(publish(message, destination) for message in messages))
