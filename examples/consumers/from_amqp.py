"""Print a session's events from a RabbitMQ queue: `python from_amqp.py amqp://… chat-42`.

The URL is the transport's own; the queue has the routing key's name. What is printed is taken out
of the queue; other sessions' events go back to it when this ends.

Needs `pip install 'eventlog-handler[amqp]'`.
"""

import asyncio
import json
import sys
from urllib.parse import parse_qs, urlsplit

import aio_pika


async def main(url: str, session_id: str) -> None:
    """Take messages, and go on until interrupted."""
    parts = urlsplit(url)
    name = parse_qs(parts.query).get("routing_key", ["eventlog"])[0]
    name = name.replace("{session_id}", session_id)
    seen = set()
    async with await aio_pika.connect(parts._replace(query="").geturl()) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(name)
        async with queue.iterator() as messages:
            async for message in messages:
                if message.headers["session_id"] != session_id:
                    continue
                # At least once: whatever comes again has the same id.
                if message.message_id not in seen:
                    seen.add(message.message_id)
                    print(json.dumps(json.loads(message.body)["event"]), flush=True)
                await message.ack()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
