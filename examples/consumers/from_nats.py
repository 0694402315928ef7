"""Print a session's events from NATS JetStream: `python from_nats.py nats://… chat-42`.

The URL is the transport's own. Needs `pip install 'eventlog-handler[nats]'`.
"""

import asyncio
import json
import sys
from urllib.parse import parse_qs, quote, unquote, urlsplit

import nats


async def main(url: str, session_id: str) -> None:
    """Read the session's subject from its beginning, and go on until interrupted."""
    parts = urlsplit(url)
    userinfo, _, hosts = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    subject = parse_qs(parts.query).get("subject", ["eventlog.{session_id}"])[0]
    # One token of the subject; an id that is longer than 255 so is cut, see the transport.
    token = quote(session_id, safe="").replace(".", "%2E")
    subject = subject.replace("{session_id}", token).replace("{type}", "*")
    client = await nats.connect(
        [f"nats://{host}" for host in hosts.split(",")],
        user=unquote(user) or None,
        password=unquote(password) or None,
    )
    # Of its own, without acknowledgements: it reads all from the beginning, in order.
    events = await client.jetstream().subscribe(subject, ordered_consumer=True)
    seen = set()
    async for message in events.messages:
        # At least once: whatever comes again has the same id.
        if message.headers["id"] not in seen:
            seen.add(message.headers["id"])
            print(json.dumps(json.loads(message.data)["event"]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
