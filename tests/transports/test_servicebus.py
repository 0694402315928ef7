"""Azure Service Bus: its driver against a peer that speaks AMQP as the service does."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from proton import Message

from eventlog_handler import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports.servicebus import ServiceBusTransport, _attach, _key
from tests.transports.contract import Pipeline, TransportContract, outgoing, transport_of
from tests.transports.servers import PASSWORD, Broker, Received, encoded, query

POLICY = "Send-Only_1"
PEER = Path(__file__).with_name("servicebus_peer.py")


class ServiceBusPeer(Broker):
    """The peer, in a process of its own; what it has acknowledged stays in its files.

    Microsoft's emulator needs a SQL Server beside it, so it is not run here.
    """

    tls_options = {"emulator": "false"}

    @property
    def entities(self) -> Path:
        """The folder with a file for each entity."""
        folder = self.folder / "entities"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def command(self) -> list[str]:
        """Return the command."""
        return [sys.executable, str(PEER), str(self.entities), str(self.port), POLICY, PASSWORD]

    def ready(self) -> bool:
        """Return whether it listens."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a queue."""
        login = f"{encoded(POLICY)}:{encoded(options.pop('password', PASSWORD))}"
        address = f"servicebus://{login}@127.0.0.1:{port or self.port}/{encoded(destination)}"
        return f"{address}?{query(**{'emulator': 'true', **options})}"

    def make(self, destination: str) -> None:
        """Make a queue."""
        (self.entities / encoded(destination)).touch()

    def refuse(self, destination: str, condition: str, part: str = "") -> None:
        """Have it refuse a transfer with some text in it; without a condition, none."""
        rule = self.entities / f"{encoded(destination)}.refusal"
        rule.write_text(f"{condition} {part}\n" if condition else "")

    def messages(self, destination: str) -> list[Message]:
        """Return the messages of a queue, as another library decodes them."""
        messages = []
        for line in (self.entities / encoded(destination)).read_bytes().split(b"\n")[:-1]:
            messages.append(Message())
            messages[-1].decode(base64.b64decode(line))
        return messages

    def received(self, destination: str) -> list[Received]:
        """Return the messages' bodies, their ids, and the sessions that their properties tell."""
        return [
            Received(bytes(m.body), m.id, m.properties["session_id"])
            for m in self.messages(destination)
        ]


class TestServiceBus(TransportContract):
    """The contract."""

    broker_type = ServiceBusPeer
    consumer = "from_servicebus.py"

    def test_a_message_tells_what_it_is(self, broker: ServiceBusPeer, destination: str) -> None:
        """Ids, type and time stand in the message's properties, for readers that parse no line."""
        event = outgoing("chat-1", 1)._replace(type="step \ud800")
        assert ask(broker.url(destination), lambda t: t.send_batch([event])) == [None]
        [message] = broker.messages(destination)
        assert (message.id, message.group_id) == (event.id, "chat-1")
        assert message.content_type == "application/json"
        assert message.properties == {**event.metadata, "type": "step \\ud800"}

    def test_an_event_without_metadata(self, broker: ServiceBusPeer, destination: str) -> None:
        """What is sent without a session has none."""
        assert ask(broker.url(destination), lambda t: t.send({"a": 1})) is True
        [message] = broker.messages(destination)
        assert (message.group_id, message.properties["session_id"]) == (None, "")

    def test_more_than_one_transfer_holds(self, broker: ServiceBusPeer, destination: str) -> None:
        """A batch that is larger than a transfer arrives in several, in order."""
        batch = [outgoing(f"chat-{n % 3}", n, "x" * 30_000) for n in range(40)]
        assert ask(broker.url(destination), lambda t: t.send_batch(batch)) == [None] * 40
        assert [each.id for each in broker.received(destination)] == [e.id for e in batch]

    def test_what_no_transfer_holds(self, broker: ServiceBusPeer, destination: str) -> None:
        """An event that is too large with its headers is refused, and those around it are sent."""
        batch = [outgoing("a", n, "x" * size) for n, size in enumerate((1, 262_000, 1))]
        outcomes = ask(
            broker.url(destination, max_event_bytes=300_000), lambda t: t.send_batch(batch)
        )
        assert [type(each) for each in outcomes] == [type(None), TransportRejectedError, type(None)]
        assert [each.id for each in broker.received(destination)] == [batch[0].id, batch[2].id]

    def test_partitioned_entities(self, broker: ServiceBusPeer, destination: str) -> None:
        """A transfer holds one session; after one that is refused none is sent."""
        batch = [outgoing(session, n) for n, session in enumerate("aabbccaa")]
        broker.refuse(destination, "amqp:internal-error", batch[2].id)
        url = broker.url(destination, partitioned=True)
        outcomes = ask(url, lambda t: t.send_batch(batch))
        assert outcomes[:2] == [None, None]
        assert isinstance(outcomes[2], TransportConnectionError)
        assert outcomes[2:] == [outcomes[2]] * 6
        assert [each.id for each in broker.received(destination)] == [e.id for e in batch[:2]]

    @pytest.mark.parametrize(
        ("condition", "alone", "together"),
        [
            ("amqp:link:message-size-exceeded", TransportRejectedError, TransportConnectionError),
            ("com.microsoft:argument-error", TransportError, TransportConnectionError),
            ("com.microsoft:timeout", TransportTimeoutError, TransportTimeoutError),
            *(
                (condition, TransportConnectionError, TransportConnectionError)
                for condition in (
                    "amqp:internal-error",
                    "amqp:not-allowed",
                    "amqp:resource-limit-exceeded",
                    "com.microsoft:entity-disabled",
                    "com.microsoft:server-busy",
                )
            ),
        ],
    )
    def test_refusals(
        self,
        broker: ServiceBusPeer,
        destination: str,
        condition: str,
        alone: type[Exception],
        together: type[Exception],
    ) -> None:
        """Only what says something of one event, which is alone, is held against it."""
        broker.refuse(destination, condition)
        batch = [outgoing("a", 1), outgoing("b", 2)]

        async def send(transport: Any) -> list[Any]:
            return [await transport.send_batch(batch[:1]), await transport.send_batch(batch)]

        [[one], both] = ask(broker.url(destination), send)
        assert type(one) is alone
        assert [type(each) for each in both] == [together, together]
        assert both[0] is both[1]
        assert condition in str(one)
        assert broker.received(destination) == []

    def test_throttling_says_how_long(self, broker: ServiceBusPeer, destination: str) -> None:
        """The service's wish for rest is passed on."""
        broker.refuse(destination, "com.microsoft:server-busy")
        [one] = ask(broker.url(destination), lambda t: t.send_batch([outgoing("a", 1)]))
        assert one.retry_after_seconds == 7

    def test_a_poisonous_event_is_parked(
        self, broker: ServiceBusPeer, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """An event that the service finds malformed is found among the others, and parked alone."""
        broker.refuse(destination, "com.microsoft:argument-error", "poison")
        one = pipeline(broker.url(destination), max_retry_attempts=1)
        one.log(5, sessions=5)
        one.log(1, sessions=5, text="poison")
        one.log(20, sessions=5)
        one.arrive()
        assert one.stats.rejected == 1
        assert {each.id for each in broker.received(destination)} == {
            id_of(line)
            for lines in one.written().values()
            for line in lines
            if b"poison" not in line
        }

    def test_an_unknown_entity(self, broker: ServiceBusPeer) -> None:
        """An entity that is not there is not well, and says so."""
        url = broker.url("nowhere")
        assert ask(url, lambda t: t.health_check()) is False
        with pytest.raises(TransportConnectionError, match="amqp:not-found"):
            ask(url, lambda t: t.send_batch([outgoing("a", 1)]))

    def test_a_driver_without_its_private_methods(self) -> None:
        """Where the driver can no longer be asked whether the link stays, that is left out."""

        class Opened:
            _handler = object()

            async def __aenter__(self) -> None:
                """Attach."""

        asyncio.run(_attach(Opened()))  # type: ignore[arg-type]

    def test_sockets_are_closed(self, broker: ServiceBusPeer, destination: str) -> None:
        """Neither a server that says nothing nor one that went away leaves a socket behind."""
        event = outgoing("a", 1)

        async def send(transport: Any) -> None:
            await transport.send_batch([event])
            before = sockets()
            broker.pause()
            for _ in range(2):
                assert not await transport.health_check()
            broker.resume()
            assert await transport.send_batch([event]) == [None]
            broker.kill()
            [failure] = await transport.send_batch([event])
            broker.start()
            assert isinstance(failure, TransportError)
            await transport.close()
            assert sockets() == before - 1

        ask(broker.url(destination, connect_timeout_seconds=2, timeout_seconds=2), send)

    def test_a_credential(self, broker: ServiceBusPeer, destination: str) -> None:
        """A token of an identity service will do instead of policy and key."""
        url = f"servicebus://127.0.0.1:{broker.port}/{destination}?emulator=true"
        good = ServiceBusTransport(url, credential=Identity(PASSWORD))
        bad = ServiceBusTransport(url, credential=Identity("another"))

        async def send() -> None:
            assert await good.send_batch([outgoing("a", 1)]) == [None]
            assert not await bad.health_check()
            await good.close()
            await bad.close()

        asyncio.run(send())
        assert len(broker.received(destination)) == 1
        assert PASSWORD not in repr(good) + good.name


class Identity:
    """Stands for a credential of azure-identity."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        """Return a token for an hour."""
        assert scopes == ("https://servicebus.azure.net//.default",)
        return AccessToken(self._token, int(time.time()) + 3600)


def ask(url: str, use: Callable[[Any], Awaitable[Any]]) -> Any:
    """Return what a transport answers, which is closed after that."""

    async def asking() -> Any:
        transport = transport_of(url)
        try:
            return await use(transport)
        finally:
            await transport.close()

    return asyncio.run(asking())


def sockets() -> int:
    """Return how many sockets this process has open."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except FileNotFoundError:
            continue
    return count


def id_of(line: bytes) -> str:
    """Return the id of a line."""
    return str(json.loads(line)["id"])


def test_ids_as_service_bus_takes_them() -> None:
    """An id below 128 characters of UTF-16 stays; all others differ in a SHA-256, and fit."""
    for text in ("chat-42", "a\nb", "ü" * 127, "\U0001f600" * 63):
        assert _key(text) == text
    long = ["x" * 128, "x" * 129, "\U0001f600" * 64, "\ud800", "\udc80", "%ED%A0%80" + "x" * 300]
    keys = [_key(text) for text in long]
    assert [len(key or "") for key in keys] == [128] * len(keys)
    assert len(set(keys)) == len(keys)
    # One that looks like a shortened one is shortened too.
    assert _key(str(keys[0])) not in keys
    assert all(str(key).isascii() for key in keys)
    assert str(keys[0]).startswith("x" * 63 + "~")
    assert _key("") is None


def test_a_url_without_a_port_is_the_real_service() -> None:
    """Without a port it is TLS on 5671, or plain AMQP on 5672 with the emulator."""
    for options, port in (("", 5671), ("?emulator=true", 5672)):
        with pytest.raises(TransportConnectionError, match=f"'127.0.0.1', {port}"):
            ask(
                f"servicebus://p:k@127.0.0.1/q{options}", lambda t: t.send_batch([outgoing("a", 1)])
            )


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("servicebus://p:k@host", {}, "the path is the queue or topic: write …/queue"),
        ("servicebus://p:k@host//", {}, "the path is the queue or topic"),
        ("servicebus://host/q", {}, "servicebus://name:key@…, or give credential=…"),
        ("servicebus://p@host/q", {}, "the policy's name and key"),
        ("servicebus://:k@host/q", {}, "the policy's name and key"),
        ("servicebus://host/q?credential=x", {}, "an object with get_token"),
        ("servicebus://p:k@a,b/q", {}, "write one host"),
        ("servicebus://p:k@h/q?emulator=true&tls_ca_file=/x", {}, "does not use TLS"),
        ("servicebus://p:k@h/q?emulator=maybe", {}, "neither true nor false"),
        ("servicebus://p:k@h/q", {"max_event_bytes": 0}, "out of range"),
    ],
)
def test_options_that_cannot_be(url: str, options: dict[str, Any], message: str) -> None:
    """A wrong option is told where it is written, and how it is right."""
    with pytest.raises(ValueError, match=message):
        ServiceBusTransport(url, **options)


def test_its_name_and_its_logs() -> None:
    """The name has host and entity and no secret; the driver's loggers are known."""
    transport = ServiceBusTransport("servicebus://p:secret@ns.servicebus.windows.net/a%2Fb")
    assert transport.name == "servicebus://ns.servicebus.windows.net/a/b"
    assert "secret" not in repr(transport)
    assert transport.loggers == ("azure",)
    assert transport.tls is not None
