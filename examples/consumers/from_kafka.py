"""Print a session's events from a Kafka topic: `python from_kafka.py kafka://… chat-42`.

The URL is the transport's own. Needs `pip install 'eventlog-handler[kafka]'`.
"""

import asyncio
import json
import ssl
import sys
from urllib.parse import unquote, urlsplit

from aiokafka import AIOKafkaConsumer


async def main(url: str, session_id: str) -> None:
    """Read the topic from its beginning, and go on until interrupted."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    tls = "tls=true" in parts.query
    consumer = AIOKafkaConsumer(
        parts.path.strip("/"),
        bootstrap_servers=hosts,
        auto_offset_reset="earliest",
        security_protocol=("SASL_" if login else "") + ("SSL" if tls else "PLAINTEXT"),
        ssl_context=ssl.create_default_context() if tls else None,
        sasl_plain_username=unquote(user),
        sasl_plain_password=unquote(password),
    )
    seen = set()
    async with consumer:
        async for record in consumer:
            # At least once: whatever comes again has the same id.
            number = dict(record.headers)["id"]
            if record.key == session_id.encode() and number not in seen:
                seen.add(number)
                print(json.dumps(json.loads(record.value)["event"]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
