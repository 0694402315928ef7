"""aiobotocore by itself: SendMessageBatch, as many requests at a time."""

import asyncio
from collections.abc import Sequence
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from eventlog_handler.transports.sqs import REQUEST_EVENTS, REQUESTS
from eventlog_handler.typing import OutgoingEvent
from tests.transports.servers import PASSWORD
from tests.transports.sqs_server import REGION
from tests.transports.test_sqs import KEY, SqsServer


async def send(
    server: SqsServer, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    login = {"aws_access_key_id": KEY, "aws_secret_access_key": PASSWORD, "region_name": REGION}
    endpoint = f"http://127.0.0.1:{server.port}"
    config = AioConfig(max_pool_connections=REQUESTS)
    async with AioSession().create_client(
        "sqs", endpoint_url=endpoint, config=config, **login
    ) as client:
        name = f"{destination}{server.suffix}"
        queue_url = (await client.get_queue_url(QueueName=name))["QueueUrl"]
        for batch in batches:
            entries = [_entry(str(n), event) for n, event in enumerate(batch)]
            answers = await asyncio.gather(
                *(
                    client.send_message_batch(
                        QueueUrl=queue_url, Entries=entries[begin : begin + REQUEST_EVENTS]
                    )
                    for begin in range(0, len(entries), REQUEST_EVENTS)
                )
            )
            assert not any(answer.get("Failed") for answer in answers)


def _entry(number: str, event: OutgoingEvent) -> dict[str, Any]:
    attributes = {
        name: {"DataType": "String", "StringValue": value} for name, value in event.metadata.items()
    }
    return {"Id": number, "MessageBody": event.line.decode(), "MessageAttributes": attributes}
