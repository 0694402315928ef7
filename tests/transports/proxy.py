"""A TCP proxy that does to connections what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Coroutine
from typing import Any

CHUNK_BYTES = 65536


class Proxy:
    """Stands between a transport and its server; a context manager.

    Args:
        port: The server's, on loopback.
        tls: With it, what connects here has to speak TLS; what goes on to the server does not.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._server_port = port
        self._tls = tls
        self._loses_answers = False
        self._refuses = False
        self._bytes_left: int | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls))
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lose_answers(self) -> None:
        """From now on take what clients send to the server, and drop what it answers."""
        self._loses_answers = True

    def refuse(self) -> None:
        """From now on break off new connections at once."""
        self._refuses = True

    def cut_after(self, count: int) -> None:
        """Reset a connection once so many bytes have gone to the server from now on."""
        self._bytes_left = count

    def pass_on(self) -> None:
        """From now on behave."""
        self._loses_answers = self._refuses = False
        self._bytes_left = None

    def reset(self) -> None:
        """Break all connections off (RST)."""
        self._call(self._reset())

    async def _reset(self) -> None:
        for pair in list(self._pairs):
            for writer in pair:
                writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        # Connections that are broken off end by themselves, and one that has just been accepted is
        # broken off next time; to cancel their tasks is logged.
        for _ in range(100):
            await self._reset()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if not others:
                break
            await asyncio.wait(others, timeout=0.05)

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._pairs.add(pair)
        await asyncio.gather(
            self._pump(reader, far_writer, to_server=True),
            self._pump(far_reader, writer, to_server=False),
        )
        self._pairs.discard(pair)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self._loses_answers and not to_server:
                    continue
                if to_server and self._bytes_left is not None:
                    data = data[: self._bytes_left]
                    self._bytes_left -= len(data)
                writer.write(data)
                await writer.drain()
                if self._bytes_left == 0:
                    await self._reset()
        with contextlib.suppress(OSError):
            writer.close()
