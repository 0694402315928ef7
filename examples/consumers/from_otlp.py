"""Receive OpenTelemetry logs and print a session's: `python from_otlp.py otlp://… chat-42`.

The URL is the transport's own, of this machine. Needs `pip install 'eventlog-handler[otlp]'`.
"""

import json
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest


def records(body: bytes) -> Iterator[tuple[dict[str, str], str]]:
    """Yield the attributes and the body of each log record."""
    for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
        for scope in resource.scope_logs:
            for record in scope.log_records:
                attributes = {each.key: each.value.string_value for each in record.attributes}
                yield attributes, record.body.string_value


def main(url: str, session_id: str) -> None:
    """Serve until interrupted."""
    parts = urlsplit(url)
    seen = set()

    async def receive(request: web.Request) -> web.Response:
        # aiohttp has unpacked what came with gzip.
        for attributes, line in records(await request.read()):
            # At least once: whatever comes again has the same id.
            unique = attributes["log.record.uid"]
            if attributes["session.id"] == session_id and unique not in seen:
                seen.add(unique)
                print(json.dumps(json.loads(line)["event"]), flush=True)
        # Empty is the answer that all were taken.
        return web.Response(content_type="application/x-protobuf")

    app = web.Application(client_max_size=2_000_000)
    app.router.add_post("/v1/logs", receive)
    web.run_app(app, host=parts.hostname, port=parts.port or 4318, print=None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
