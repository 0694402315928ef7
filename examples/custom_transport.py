"""A transport of your own, with a URL of its own: here a TCP connection, one line an event.

In the package that has it, setup.cfg (or its like in pyproject.toml) offers the scheme:

    [options.entry_points]
    eventlog_handler.transports =
        lines = custom_transport:LineTransport

Once that is installed, `downstream_transport: lines://host:9000` is all that a `dictConfig`, or
`AGENT_LOG_TRANSPORT=lines://host:9000` all that the environment has to say.
"""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

from eventlog_handler import (
    TransportConnectionError,
    TransportInterface,
    create_with_transport,
)


class LineTransport(TransportInterface):
    """Sends each line to a TCP server and waits for its `ok`: `lines://host:port`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise ValueError("write lines://host:port")
        self._address = parts.hostname, parts.port
        # Offsets are kept under it, and it is shown: so it holds no password.
        self.name = f"lines://{parts.hostname}:{parts.port}"
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Return True once the server has said that it has the line."""
        try:
            if self._writer is None or self._reader is None:
                # Here and not in the constructor: this is the loop that transports run on.
                self._reader, self._writer = await asyncio.open_connection(*self._address)
            self._writer.write(event + b"\n")
            await self._writer.drain()
            answer = await self._reader.readline()
            if not answer:
                raise ConnectionError("the server has hung up")
        except OSError as error:
            # Nothing that the event can help: it is sent again for as long as it takes.
            await self.close()
            raise TransportConnectionError(str(error)) from error
        return answer == b"ok\n"

    async def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def health_check(self) -> bool:
        """Return whether the server accepts connections."""
        try:
            _, writer = await asyncio.open_connection(*self._address)
        except OSError:
            return False
        writer.close()
        return True

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open."""
        return self._writer is not None


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Acknowledge each line."""
    while line := await reader.readline():
        print("received:", json.loads(line)["event"])
        writer.write(b"ok\n")
    writer.close()


async def main() -> None:
    """Send three events to a server in this process."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport = LineTransport(f"lines://127.0.0.1:{port}")
    async with create_with_transport(transport) as gateway:
        for number in range(3):
            await gateway({"type": "step", "session_id": "chat-42", "number": number})
    print(gateway.stats().transports[transport.name].sent, "events sent")
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
