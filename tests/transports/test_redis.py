"""Redis streams, against a redis-server of the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
import redis

from eventlog_handler import TransportConnectionError
from tests.reliability.harness import missing
from tests.transports.contract import TransportContract, outgoing, transport_of
from tests.transports.servers import PASSWORD, Broker, Received, encoded, installed, query


class RedisServer(Broker):
    """A redis-server that wants a password and writes each command to its file."""

    missing = None if installed("redis-server") else "redis-server is not installed"
    tls_options = {"scheme": "rediss"}

    def command(self) -> list[str]:
        """Return the command."""
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "save": "",
            "appendonly": "yes",
            "requirepass": PASSWORD,
        }
        pairs = [[f"--{name}", str(value)] for name, value in options.items()]
        return [str(installed("redis-server")), *(word for pair in pairs for word in pair)]

    def client(self) -> Any:
        """Return a client of another kind than the transport's."""
        return redis.Redis(port=self.port, password=PASSWORD)

    def ready(self) -> bool:
        """Return whether it answers."""
        with self.client() as client:
            return bool(client.ping())

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a stream."""
        scheme = options.pop("scheme", "redis")
        password = encoded(options.pop("password", PASSWORD))
        address = f":{password}@127.0.0.1:{port or self.port}"
        return f"{scheme}://{address}/0?{query(stream=destination, **options)}"

    def make(self, destination: str) -> None:
        """Leave the key to the first entry, which makes the stream."""
        with self.client() as client:
            client.delete(destination)

    def spoil(self, destination: str) -> None:
        """Have the key hold something that is no stream."""
        with self.client() as client:
            client.set(destination, "text")

    def received(self, destination: str) -> list[Received]:
        """Return the entries of a stream."""
        with self.client() as client:
            entries = [fields for _, fields in client.xrange(destination)]
        return [Received(e[b"line"], e[b"id"].decode(), e[b"session_id"].decode()) for e in entries]


class TestRedis(TransportContract):
    """The contract."""

    broker_type = RedisServer
    consumer = "from_redis.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for the tests of what is particular."""
    if RedisServer.missing:
        missing(RedisServer.missing)
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        found.start()
        yield found
    finally:
        found.kill()


def test_a_stream_for_each_session(server: RedisServer) -> None:
    """`{session_id}` and `{type}` in the stream's name stand for the event's."""
    transport = transport_of(server.url("{type}:{session_id}"))

    async def send() -> None:
        assert await transport.send_batch([outgoing("a b", 1), outgoing("c", 2)]) == [None, None]
        await transport.close()

    asyncio.run(send())
    assert [each.session_id for each in server.received("step:a b")] == ["a b"]
    assert [each.session_id for each in server.received("step:c")] == ["c"]


def test_a_stream_keeps_about_so_many_entries(server: RedisServer) -> None:
    """`maxlen` trims the stream as it grows; Redis does so in whole nodes."""
    transport = transport_of(server.url("trimmed", maxlen=10))

    async def send() -> None:
        await transport.send_batch([outgoing("a", n) for n in range(1000)])
        await transport.close()

    asyncio.run(send())
    kept = server.received("trimmed")
    assert 10 <= len(kept) < 500
    assert orjson.loads(kept[-1].line)["event"]["n"] == 999


def test_any_text_is_a_session(server: RedisServer) -> None:
    """A lone surrogate in a session's id goes as its three bytes."""
    transport = transport_of(server.url("any"))

    async def send() -> None:
        assert await transport.send(b"{}", {"session_id": "\ud800"}) is True
        await transport.close()

    asyncio.run(send())
    with server.client() as client:
        [(_, entry)] = client.xrange("any")
    assert entry[b"session_id"] == b"\xed\xa0\x80"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://h/name", "the path is the database's number"),
        ("redis://a,b", "write one host"),
        ("redis://h?maxlen=0", "maxlen='0' is out of range"),
        ("redis://h?stream=", "stream='' must be a str that is not empty"),
        ("redis://h?stream={id}", "has the field 'id'"),
    ],
)
def test_a_url_that_cannot_be(url: str, message: str) -> None:
    """What is wrong is told when it is configured."""
    with pytest.raises(ValueError, match=message):
        transport_of(url)


def test_a_database_that_is_not_there(server: RedisServer) -> None:
    """What fails while connecting leaves no connection behind."""

    async def send() -> None:
        transport = transport_of(server.url("x").replace("/0?", "/99?"))
        with pytest.raises(TransportConnectionError, match="DB index is out of range"):
            await transport.send(b"{}")
        await transport.close()

    asyncio.run(send())
