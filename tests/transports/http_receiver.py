"""A receiver of webhooks and OTLP logs: `python http_receiver.py port folder password`.

A destination is a path for which there is a file in the folder. What it takes it appends there, and
only then it answers: what is acknowledged outlives SIGKILL. It does not deduplicate.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

from aiohttp import web

OTLP = "application/x-protobuf"
POISON = b"POISON"
"""A body that has it is refused (400)."""
SMALL = "small"
"""Destinations whose name begins with it refuse bodies over `SMALL_BYTES` (413)."""
SMALL_BYTES = 2000


def lines_of(kind: str, body: bytes) -> list[bytes]:
    """Return the lines in a request of several events."""
    if kind == "application/x-ndjson":
        return body.split(b"\n")
    # Cut out where they stand, as an object that is encoded again may be another text.
    lines, text, begin = [], body.decode(), 1
    while begin < len(text):
        _, end = json.JSONDecoder().raw_decode(text, begin)
        lines.append(text[begin:end].encode())
        begin = end + 1
    return lines


def events_in(request: web.Request, body: bytes) -> list[dict[str, str]]:
    """Return the events of a request: line, id, and session's id."""
    if request.content_type == OTLP:
        return records_in(body)
    head = request.headers
    if "X-Event-Id" in head:
        return [event(body, head["X-Event-Id"], head["X-Session-Id"])]
    found = []
    for line in lines_of(request.content_type, body):
        told = json.loads(line)
        found.append(event(line, told["id"], told["event"]["session_id"]))
    return found


def records_in(body: bytes) -> list[dict[str, str]]:
    """Return the events of an export of logs."""
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    found = []
    for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
        for scope in resource.scope_logs:
            for record in scope.log_records:
                told = {each.key: each.value.string_value for each in record.attributes}
                line = record.body.string_value.encode()
                found.append(event(line, told["log.record.uid"], told["session.id"]))
    return found


def event(line: bytes, unique: str, session_id: str) -> dict[str, str]:
    """Return an event as it is written down."""
    return {"line": base64.b64encode(line).decode(), "id": unique, "session_id": session_id}


def main(port: int, folder: Path, password: str) -> None:
    """Serve until killed."""
    login = "Basic " + base64.b64encode(f"user:{password}".encode()).decode()

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()  # Unpacked, where it came with gzip.
        name = request.match_info["destination"]
        if request.headers.get("Authorization") != login:
            return web.Response(status=401)
        if not (folder / name).exists():
            return web.Response(status=404)
        if POISON in body:
            return web.Response(status=400, text="poison")
        if name.startswith(SMALL) and len(body) > SMALL_BYTES:
            return web.Response(status=413)
        written = "".join(json.dumps(each) + "\n" for each in events_in(request, body))
        file = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, written.encode())
        finally:
            os.close(file)
        return web.Response(content_type=request.content_type)

    app = web.Application(client_max_size=1 << 25)
    app.router.add_post("/{destination}", receive)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
