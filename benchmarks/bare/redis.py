"""redis-py by itself: XADD in pipelines."""

from collections.abc import Sequence

from redis.asyncio import Redis

from eventlog_handler.typing import OutgoingEvent
from tests.transports.servers import PASSWORD
from tests.transports.test_redis import RedisServer


async def send(
    server: RedisServer, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    async with Redis(port=server.port, password=PASSWORD) as client:
        for batch in batches:
            pipeline = client.pipeline(transaction=False)
            for event in batch:
                fields = {**event.metadata, "line": event.line}
                pipeline.xadd(destination, fields)
            await pipeline.execute()
