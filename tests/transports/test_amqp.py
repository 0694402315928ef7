"""RabbitMQ, against a server of the tests' own."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aio_pika
import anyio
import pytest

from eventlog_handler import (
    TransportConnectionError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports._url import header_text
from eventlog_handler.transports.amqp import AmqpTransport
from eventlog_handler.typing import OutgoingEvent
from tests.reliability.harness import missing
from tests.transports.contract import Pipeline, TransportContract, check, outgoing, transport_of
from tests.transports.proxy import Proxy
from tests.transports.servers import (
    PASSWORD,
    START_SECONDS,
    Broker,
    Received,
    encoded,
    free_port,
    installed,
    query,
    wait_for,
)

LEAVES_SOCKETS = sys.version_info < (3, 11)
"""Whether the driver's releases for this Python leave failed connections to garbage collection."""
if LEAVES_SOCKETS:
    pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
USER = "eventlog"
SCRIPTS = Path("/usr/lib/rabbitmq/bin")
"""Not those of /usr/sbin, which change the user."""
RUN = """
# Of its own, on a port of its own: the one that Erlang starts would stay.
until epmd -names; do setpriv --pdeathsig KILL epmd -address 127.0.0.1 & sleep 0.05; done
exec "$0"
"""
CONFIG = """
listeners.tcp.1 = 127.0.0.1:{port}
num_acceptors.tcp = 2
loopback_users = none
default_user = {user}
default_pass = {password}
default_vhost = {vhost}
disk_free_limit.absolute = 1MB
max_message_size = {most}
log.console = true
log.file = false
"""
MOST_BYTES = 1_000_000
VHOST = "te/st"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Have a test's own garbage collected where warnings of it are ignored."""
    yield
    if LEAVES_SOCKETS:
        gc.collect()


class RabbitServer(Broker):
    """A RabbitMQ whose queues are durable."""

    missing = (
        None
        if (SCRIPTS / "rabbitmq-server").exists() and installed("setpriv")
        else ("rabbitmq-server is not installed")
    )
    tls_options = {"scheme": "amqps"}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ports = {"RABBITMQ_DIST_PORT": free_port(), "ERL_EPMD_PORT": free_port()}
        self._taken: dict[str, list[Received]] = defaultdict(list)

    def command(self) -> list[str]:
        """Write the configuration and return the command."""
        config = CONFIG.format(
            port=self.port, user=USER, password=PASSWORD, vhost=VHOST, most=MOST_BYTES
        )
        (self.folder / "rabbitmq.conf").write_text(config)
        (self.folder / "enabled_plugins").write_text("[].\n")
        return ["sh", "-c", RUN, str(SCRIPTS / "rabbitmq-server")]

    def environment(self) -> dict[str, str]:
        """Return what keeps all of it in the folder and on loopback."""
        return {
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": f"t{self.port}@localhost",
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false +S 2:2"
            ),
            # The script becomes Erlang then, instead of its parent.
            "detached": "1",
            **{name: str(port) for name, port in self._ports.items()},
        }

    def control(self, *words: str) -> None:
        """Run a command of `rabbitmqctl`."""
        subprocess.run(
            [str(SCRIPTS / "rabbitmqctl"), *words],
            env={**os.environ, **self.environment()},
            check=True,
            capture_output=True,
            timeout=START_SECONDS,
        )

    def talk(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """Do something on a channel of another connection than the transport's."""

        async def run() -> Any:
            connection = await aio_pika.connect(
                host="127.0.0.1",
                port=self.port,
                login=USER,
                password=PASSWORD,
                virtualhost=VHOST,
                timeout=5,
            )
            async with connection:
                return await work(await connection.channel())

        return asyncio.run(run())

    def ready(self) -> bool:
        """Return whether it answers."""
        # Before the driver, which logs each failure.
        socket.create_connection(("127.0.0.1", self.port), 1).close()
        self.talk(lambda channel: channel.set_qos())
        return True

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a queue."""
        scheme = options.pop("scheme", "amqp")
        password = encoded(options.pop("password", PASSWORD))
        address = f"{USER}:{password}@127.0.0.1:{port or self.port}"
        return f"{scheme}://{address}/{encoded(VHOST)}?{query(routing_key=destination, **options)}"

    def declare(self, queue: str, **arguments: Any) -> None:
        """Make a queue."""
        self.talk(lambda channel: channel.declare_queue(queue, durable=True, arguments=arguments))

    def make(self, destination: str) -> None:
        """Make a queue, and have it written: killed within two seconds the server forgets it."""
        self.declare(destination)
        self.control("eval", "mnesia:sync_log().")

    def received(self, destination: str) -> list[Received]:
        """Take what is in a queue, and return all that has been taken from it."""
        for message in self.take(destination):
            session_id = message.headers["session_id"]
            self._taken[destination].append(Received(message.body, message.message_id, session_id))
        return list(self._taken[destination])

    def take(self, destination: str) -> list[Any]:
        """Take the messages that are in a queue."""

        async def get(channel: Any) -> list[Any]:
            queue = await channel.get_queue(destination)
            count = queue.declaration_result.message_count
            messages: list[Any] = []
            if count:
                async with queue.iterator() as incoming:
                    async for message in incoming:
                        messages.append(message)
                        if len(messages) == count:
                            await message.ack(multiple=True)
                            break
            return messages

        messages: list[Any] = self.talk(get)
        return messages


class TestAmqp(TransportContract):
    """The contract, with queues on the default exchange."""

    broker_type = RabbitServer
    consumer = "from_amqp.py"
    name_of_session = staticmethod(header_text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A server for the tests of what is particular."""
    if RabbitServer.missing:
        missing(RabbitServer.missing)
    found = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    try:
        found.start()
        yield found
    finally:
        found.kill()


def send(url: str, *events: OutgoingEvent) -> list[Exception | None]:
    """Send a batch through a transport of its own."""

    async def run() -> list[Exception | None]:
        transport = transport_of(url)
        try:
            found: list[Exception | None] = await transport.send_batch(list(events))
        finally:
            await transport.close()
        return found

    return asyncio.run(run())


def is_healthy(url: str) -> bool:
    """Ask a transport of its own."""

    async def run() -> bool:
        transport = transport_of(url)
        try:
            return bool(await transport.health_check())
        finally:
            await transport.close()

    return asyncio.run(run())


def bind(server: RabbitServer, exchange: str, queue: str, key: str) -> None:
    """Make a topic exchange, and a queue that gets what fits the key."""

    async def make(channel: Any) -> None:
        topic = await channel.declare_exchange(exchange, "topic", durable=True)
        await (await channel.declare_queue(queue, durable=True)).bind(topic, key)

    server.talk(make)


def test_a_message(server: RabbitServer) -> None:
    """The body is the line, the message's id the event's, and the rest stands in headers."""
    server.declare("message")
    event = outgoing("ünï\n", 1)
    assert send(server.url("message"), event) == [None]
    [message] = server.take("message")
    assert message.body == event.line
    assert message.message_id == event.id
    assert message.content_type == "application/json"
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert message.headers == {
        "id": event.id,
        "session_id": "%C3%BCn%C3%AF%0A",
        "type": "step",
        "timestamp": event.timestamp,
    }


def test_messages_that_need_not_survive(server: RabbitServer) -> None:
    """With `persistent=false` the server may forget them when it restarts."""
    server.declare("forgotten")
    assert send(server.url("forgotten", persistent="false"), outgoing("a", 1)) == [None]
    [message] = server.take("forgotten")
    assert message.delivery_mode == aio_pika.DeliveryMode.NOT_PERSISTENT


def test_a_routing_key_of_words(server: RabbitServer) -> None:
    """`{session_id}` and `{type}` are one word each, whatever they are, and stay distinct."""
    bind(server, "topic", "words", "log.*.step")
    long = "x" * 500
    sessions = ["a.b", "*", "", "\ud800", long, f"{long}y"]
    url = server.url("log.{session_id}.{type}", exchange="topic")
    batch = [outgoing("any", n)._replace(session_id=s) for n, s in enumerate(sessions)]
    assert send(url, *batch) == [None] * len(batch)
    words = [message.routing_key.split(".")[1] for message in server.take("words")]
    assert words[:4] == ["a%2Eb", "%2A", "", "%ED%A0%80"]
    assert words[4] == f"{'x' * 35}~{hashlib.sha256(long.encode()).hexdigest()}"
    assert len(set(words)) == len(words)
    assert all(len(word) <= 100 for word in words)


def test_texts_that_are_too_long_for_a_frame(server: RabbitServer) -> None:
    """Whatever comes from outside, headers and ids fit: the connection does not break."""
    server.declare("long")
    event = OutgoingEvent(b"{}", "i" * 300, "\ud800" * 100_000, "t" * 200_000, "")
    assert send(server.url("long"), event, outgoing("a", 1)) == [None, None]
    first, second = server.take("long")
    assert len(first.message_id) == 255
    assert [len(first.headers[name]) for name in ("id", "session_id", "type")] == [300, 1000, 1000]
    assert second.headers["session_id"] == "a"


def test_what_no_queue_gets(server: RabbitServer) -> None:
    """An event that comes back counts as failed; those of its batch that arrived are told."""
    bind(server, "some", "steps", "step")
    others = [outgoing("b", n)._replace(type="other") for n in (1, 2)]
    batch = [outgoing("a", 1), *others, outgoing("c", 3)]
    first, second, third, last = send(server.url("{type}", exchange="some"), *batch)
    assert first is last is None
    assert isinstance(second, TransportConnectionError)
    assert "NO_ROUTE" in str(second)
    # One failure, which is counted once.
    assert third is second


def test_a_full_queue(server: RabbitServer) -> None:
    """What the server refuses for want of room is tried again and not parked."""
    server.declare("full", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    assert send(server.url("full"), outgoing("a", 1)) == [None]
    [error] = send(server.url("full"), outgoing("a", 2))
    assert isinstance(error, TransportConnectionError)
    assert "Nack" in str(error)


@pytest.mark.parametrize("count", [1, 50])
def test_an_exchange_that_is_not_there(server: RabbitServer, count: int) -> None:
    """The server closes the channel, all of the batch fail at once, and none is parked."""
    url = server.url("key", exchange=f"none-{count}")
    batch = [outgoing("a", n) for n in range(count)]
    errors = send(url, *batch)
    assert {type(error) for error in errors} == {TransportConnectionError}
    assert "NOT_FOUND" in str(errors[0])
    assert all(error is errors[0] for error in errors)
    assert not is_healthy(url)
    bind(server, f"none-{count}", "late", "key")
    assert is_healthy(url)
    assert send(url, *batch) == [None] * count
    assert [each.line for each in server.received("late")][-count:] == [e.line for e in batch]


def test_an_exchange_that_takes_nothing(server: RabbitServer) -> None:
    """What is not allowed is no event's fault."""
    server.talk(lambda channel: channel.declare_exchange("internal", internal=True))
    [error] = send(server.url("key", exchange="internal"), outgoing("a", 1))
    assert isinstance(error, TransportConnectionError)
    assert "ACCESS_REFUSED" in str(error)


def test_whether_a_queue_would_take_an_event(server: RabbitServer) -> None:
    """The one queue is asked for; where the key varies, or the driver cannot ask, the server."""
    server.declare("there")
    assert is_healthy(server.url("there"))
    assert not is_healthy(server.url("elsewhere"))
    assert is_healthy(server.url("{session_id}"))
    assert is_healthy(server.url("ünï"))


def test_what_the_server_finds_too_large(server: RabbitServer, base: Path) -> None:
    """Where the server takes less than `max_event_bytes`, what it refuses is parked all the same.

    It closes the channel and does not say which event of a batch it was.
    """
    server.declare("small")
    large = outgoing("a", 1, "x" * MOST_BYTES)
    [refused] = send(server.url("small"), large)
    assert isinstance(refused, TransportRejectedError)
    outcomes = send(server.url("small"), outgoing("a", 0), large, outgoing("a", 2))
    assert isinstance(outcomes[1], TransportConnectionError)
    server.received("small")
    server.declare("smaller")
    one = Pipeline(base, server.url("smaller"))
    try:
        one.log(20, sessions=2)
        one.log(1, sessions=2, text="x" * MOST_BYTES)
        one.log(20, sessions=2)
        one.arrive()
        assert one.stats.rejected == 1
        assert one.stats.sent == 40
        kept = {
            session_id: [line for line in lines if len(line) < MOST_BYTES]
            for session_id, lines in one.written().items()
        }
        check(kept, server.received("smaller"))
    finally:
        one.handler.close()


def test_a_server_without_memory(server: RabbitServer, base: Path) -> None:
    """While the server takes nothing, events time out and none is parked; then all arrive."""
    server.declare("memory")
    server.control("set_vm_memory_high_watermark", "0")
    one = Pipeline(base, server.url("memory", timeout_seconds=0.5))
    try:
        one.log(50, sessions=5)
        wait_for("time-outs", lambda: one.stats.failed > 2)
        assert any(isinstance(error, TransportTimeoutError) for error in one.errors)
        server.control("set_vm_memory_high_watermark", "0.9")
        one.arrive()
        assert one.stats.rejected == 0
        check(one.written(), server.received("memory"))
    finally:
        one.handler.close()


def test_a_virtual_host_that_is_not_there(server: RabbitServer) -> None:
    """A URL without a path means `/`, and the message says which one was looked for."""
    url = server.url("key").replace(f"/{encoded(VHOST)}?", "/?")
    with pytest.raises(TransportConnectionError, match="is there a virtual host '/'"):
        send(url, outgoing("a", 1))


def test_a_connection_that_breaks_anywhere(server: RabbitServer) -> None:
    """Wherever opening breaks off, it is told as such, and nothing is left running."""
    server.declare("broken")

    async def run() -> set[type[BaseException]]:
        kinds: set[type[BaseException]] = set()
        transport = transport_of(server.url("broken", proxy.port, timeout_seconds=5))
        for count in range(1, 600, 5):
            proxy.cut_after(count)
            try:
                [outcome] = await transport.send_batch([outgoing("a", count)])
            except Exception as error:
                outcome = error
            if outcome is not None:
                kinds.add(type(outcome))
        proxy.pass_on()
        assert await transport.send_batch([outgoing("a", 0)]) == [None]
        await transport.close()
        # What the driver still has to do after a goodbye.
        with anyio.fail_after(10):
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0.01)
        return kinds

    with Proxy(server.port) as proxy:
        assert asyncio.run(run()) == {TransportConnectionError}


def test_opening_that_hangs(server: RabbitServer) -> None:
    """A server that connects and says nothing is given up in time."""
    with Proxy(server.port) as proxy:
        proxy.lose_answers()
        url = server.url("key", proxy.port, connect_timeout_seconds=0.2)
        with pytest.raises(TransportTimeoutError, match="no answer within"):
            send(url, outgoing("a", 1))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("amqp://a,b", "write one host"),
        ("amqp://h?exchange=a*b", "exchange='a.b': the driver takes letters"),
        ("amqp://h?routing_key=", "routing_key='' must be a str that is not empty"),
        ("amqp://h?routing_key={id}", "has the field 'id'"),
        (f"amqp://h?routing_key={'ä' * 128}", "is too long: AMQP takes 255 bytes"),
        ("amqp://h?routing_key={type}.{type}.{session_id}", "is too long: AMQP takes 255 bytes"),
        ("amqp://h?persistent=maybe", "persistent='maybe' is neither true nor false"),
    ],
)
def test_a_url_that_cannot_be(url: str, message: str) -> None:
    """What is wrong is told when it is configured."""
    with pytest.raises(ValueError, match=message):
        transport_of(url)


def test_an_exchange_is_a_text() -> None:
    """An option that is no text is refused too."""
    with pytest.raises(ValueError, match="exchange=5: the driver takes letters"):
        AmqpTransport("amqp://h", exchange=5)
