"""aiohttp and opentelemetry-proto by themselves: a POST for each batch."""

import time
from collections.abc import Sequence
from datetime import datetime

from aiohttp import ClientSession
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from eventlog_handler.typing import OutgoingEvent
from tests.transports.test_http import LOGIN
from tests.transports.test_otlp import OtlpReceiver


async def send(
    server: OtlpReceiver, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    headers = {
        "Authorization": LOGIN,
        "Content-Type": "application/x-protobuf",
    }
    url = f"http://127.0.0.1:{server.port}/{destination}"
    async with ClientSession(headers=headers) as client:
        for batch in batches:
            request = ExportLogsServiceRequest()
            scope = request.resource_logs.add().scope_logs.add()
            for event in batch:
                record = scope.log_records.add()
                since = datetime.fromisoformat(event.timestamp).timestamp()
                record.time_unix_nano = int(since * 1_000_000) * 1000
                record.observed_time_unix_nano = time.time_ns()
                record.event_name = event.type
                record.body.string_value = event.line.decode()
                for key, value in (
                    ("log.record.uid", event.id),
                    ("session.id", event.session_id),
                    ("eventlog.type", event.type),
                ):
                    attribute = record.attributes.add()
                    attribute.key = key
                    attribute.value.string_value = value
            async with client.post(url, data=request.SerializeToString()) as answer:
                answer.raise_for_status()
                await answer.read()
