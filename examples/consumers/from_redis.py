"""Print a session's events from a Redis stream: `python from_redis.py redis://… chat-42`.

The URL is the transport's own. Needs `pip install 'eventlog-handler[redis]'`.
"""

import json
import sys
from urllib.parse import parse_qs, urlsplit

from redis import Redis


def main(url: str, session_id: str) -> None:
    """Read the stream from its beginning, and go on until interrupted."""
    parts = urlsplit(url)
    stream = parse_qs(parts.query).get("stream", ["eventlog"])[0]
    stream = stream.replace("{session_id}", session_id)
    last, seen = "0", set()
    with Redis.from_url(parts._replace(query="").geturl()) as client:
        while True:
            for _, entries in client.xread({stream: last}, block=1000) or []:
                for number, entry in entries:
                    last = number
                    # At least once: whatever comes again has the same id.
                    if entry[b"session_id"].decode() == session_id and entry[b"id"] not in seen:
                        seen.add(entry[b"id"])
                        print(json.dumps(json.loads(entry[b"line"])["event"]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
