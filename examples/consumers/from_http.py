"""Receive events by HTTP and print a session's: `python from_http.py http://… chat-42`.

The URL is the transport's own, of this machine. Needs `pip install 'eventlog-handler[http]'`.
"""

import json
import sys
from urllib.parse import urlsplit

from aiohttp import web


def main(url: str, session_id: str) -> None:
    """Serve until interrupted."""
    parts = urlsplit(url)
    seen = set()

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        if request.content_type == "application/x-ndjson":
            lines = [json.loads(line) for line in body.split(b"\n")]
        else:
            told = json.loads(body)
            lines = told if isinstance(told, list) else [told]
        for line in lines:
            # At least once: whatever comes again has the same id.
            if line["event"]["session_id"] == session_id and line["id"] not in seen:
                seen.add(line["id"])
                print(json.dumps(line["event"]), flush=True)
        # Now, and not before it is done: what is answered with 2xx does not come again.
        return web.Response(status=204)

    app = web.Application(client_max_size=2_000_000)
    app.router.add_post(parts.path or "/", receive)
    web.run_app(app, host=parts.hostname, port=parts.port, print=None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
