"""Kafka, against a server of the tests' own, and against librdkafka's mock cluster for errors."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
)

from eventlog_handler import (
    TransportConnectionError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.typing import OutgoingEvent
from tests.transports.contract import Pipeline, TransportContract, check, outgoing, transport_of
from tests.transports.proxy import Proxy
from tests.transports.servers import Broker, Received, free_port, query, wait_for

SECONDS = 30.0


class _Renamed:
    """A reader of a server's answers in which one port stands for another."""

    def __init__(self, reader: asyncio.StreamReader, port: int, by: int) -> None:
        self._reader = reader
        self._old, self._new = (b"127.0.0.1" + each.to_bytes(4, "big") for each in (port, by))

    async def read(self, count: int) -> bytes:
        """Read."""
        return (await self._reader.read(count)).replace(self._old, self._new)


class KafkaProxy(Proxy):
    """Tells clients its own port, where the server tells them its: they go where they are told."""

    async def _pump(self, reader: Any, writer: asyncio.StreamWriter, to_server: bool) -> None:
        if not to_server:
            reader = _Renamed(reader, self._server_port, self.port)
        await super()._pump(reader, writer, to_server)


class Gate(KafkaProxy):
    """A proxy on a port of one's choice."""

    def __init__(self, server_port: int, port: int) -> None:
        super().__init__(server_port)
        self.port = port

    def __enter__(self) -> Gate:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", self.port))
        return self


class KafkaServer(Broker):
    """noida-db, behind a gate.

    It saves what it has acknowledged about once a second, and would lose the rest with `kill -9`.
    So before that the gate closes for answers, and it is waited until all is saved: what is
    acknowledged is there after the next start, as on a server that writes at once.
    """

    missing = None if importlib.util.find_spec("noida_db") else "noida-db is not installed"
    passwords = False
    tls_options = {"tls": "true"}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server_port = free_port()
        self._gate: Gate | None = None

    def command(self) -> list[str]:
        """Return the command: the program itself, which is started by a script of its package."""
        import noida_db

        program = Path(noida_db.__file__).with_name("noida-db")
        program.chmod(0o755)
        words = "start --only kafka --data-dir data --kafka-port"
        return [str(program), *words.split(), str(self.server_port)]

    def admin(self) -> AdminClient:
        """Return a client of another kind than the transport's."""
        return AdminClient({"bootstrap.servers": f"127.0.0.1:{self.server_port}", "log_level": 0})

    def ready(self) -> bool:
        """Return whether it answers; topics are not to be made by asking for them."""
        with socket.create_connection(("127.0.0.1", self.server_port)):
            pass
        set_ = AlterConfigOpType.SET
        never = ConfigEntry("auto.create.topics.enable", "false", incremental_operation=set_)
        broker = ConfigResource(ConfigResource.Type.BROKER, "1", incremental_configs=[never])
        admin = self.admin()
        admin.incremental_alter_configs([broker])[broker].result(SECONDS)
        return True

    def start(self) -> None:
        """Start the server, then open the gate."""
        super().start()
        self._gate = Gate(self.server_port, self.port)
        self._gate.__enter__()

    def kill(self) -> None:
        """Close the gate, wait until all is saved, kill."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.lose_answers()
            wait_for("all to be saved", lambda: self._saved() == self._held())
            gate.__exit__()
        super().kill()

    def _held(self) -> dict[str, dict[int, int]]:
        with self._consumer() as consumer:
            topics = consumer.list_topics(timeout=SECONDS).topics
            return {name: self._ends(consumer, name) for name in topics if name[:2] != "__"}

    def _saved(self) -> dict[str, dict[int, int]]:
        try:
            topics = json.loads((self.folder / "data" / "kafka.json").read_bytes())["topics"]
        except (OSError, ValueError):
            return {}
        return {
            name: {number: each["high_watermark"] for number, each in topic["partitions"]}
            for name, topic in topics
            if name[:2] != "__"
        }

    def _consumer(self) -> Any:
        servers = f"127.0.0.1:{self.server_port}"
        return contextlib.closing(
            Consumer({"bootstrap.servers": servers, "group.id": "t", "log_level": 0})
        )

    @staticmethod
    def _ends(consumer: Any, topic: str) -> dict[int, int]:
        partitions = consumer.list_topics(topic, timeout=SECONDS).topics[topic].partitions
        return {
            each: consumer.get_watermark_offsets(TopicPartition(topic, each), timeout=SECONDS)[1]
            for each in partitions
        }

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a topic."""
        return f"kafka://127.0.0.1:{port or self.port}/{destination}?{query(**options)}"

    def make(self, destination: str, **config: str) -> None:
        """Make a topic."""
        topic = NewTopic(destination, num_partitions=3, replication_factor=1, config=config)
        admin = self.admin()
        admin.create_topics([topic])[destination].result(SECONDS)

    def delete(self, destination: str) -> None:
        """Delete a topic."""
        admin = self.admin()
        admin.delete_topics([destination])[destination].result(SECONDS)

    def received(self, destination: str) -> list[Received]:
        """Return the records of a topic, partition by partition in their order."""
        return [
            Received(each.value(), dict(each.headers())["id"].decode(), _session(each))
            for each in self.records(destination)
        ]

    def records(self, destination: str) -> list[Any]:
        """Return the records as the client gives them."""
        records: list[Any] = []
        with self._consumer() as consumer:
            ends = self._ends(consumer, destination)
            consumer.assign([TopicPartition(destination, each, 0) for each in ends])
            while len(records) < sum(ends.values()):
                for each in consumer.consume(sum(ends.values()) - len(records), timeout=1):
                    if each.error():
                        raise KafkaException(each.error())
                    records.append(each)
        return records


def _session(record: Any) -> str:
    text: str = record.key().decode("utf-8", "surrogatepass")
    assert dict(record.headers())["session_id"] == record.key()
    return text


class TestKafka(TransportContract):
    """The contract."""

    broker_type = KafkaServer
    proxy_type = KafkaProxy
    consumer = "from_kafka.py"

    def test_a_record_has_key_headers_and_the_time_of_sending(
        self, broker: Any, destination: str
    ) -> None:
        """The key is the session; the headers tell id, session, type and the event's own time."""
        event = outgoing("chat-1", 1)
        before = time.time() * 1000 - 1
        assert _outcomes(broker.url(destination, compression="gzip"), [event]) == [None]
        [record] = broker.records(destination)
        assert record.key() == b"chat-1"
        headers = [(name, text.encode()) for name, text in event.metadata.items()]
        assert record.headers() == headers
        assert record.timestamp()[1] >= before

    def test_a_login_with_a_password(self, broker: Any, destination: str) -> None:
        """A username makes the transport log in (this server takes any)."""
        url = broker.url(destination).replace("://", "://user:pass@")
        assert _outcomes(url, [outgoing("chat-1", 1)]) == [None]
        with pytest.raises(TransportConnectionError, match="does not support SCRAM-SHA-256"):
            _outcomes(f"{url}sasl_mechanism=SCRAM-SHA-256", [outgoing("chat-1", 2)])

    def test_of_several_brokers_one_is_enough(self, broker: Any, destination: str) -> None:
        """The first broker of the URL that answers is asked for all the others."""
        for others in (f"127.0.0.1:{free_port()}", f"[::1]:{free_port()}"):
            url = broker.url(destination).replace("://", f"://{others},")
            assert _outcomes(url, [outgoing("chat-1", 1)]) == [None]

    def test_more_than_a_partition_takes_goes_in_several_requests(
        self, broker: Any, destination: str
    ) -> None:
        """Records that come together are no more than `max_event_bytes`; order stays."""
        batch = [outgoing("chat-1", n, "x" * 500) for n in range(50)]
        assert _outcomes(broker.url(destination, max_event_bytes=2000), batch) == [None] * 50
        assert [each.line for each in broker.received(destination)] == [e.line for e in batch]

    def test_a_topic_that_takes_less(self, broker: Any, pipeline: Callable[..., Pipeline]) -> None:
        """What a topic refuses as too large is parked alone, even if it came with others."""
        broker.make("small", **{"max.message.bytes": "4000"})
        one = pipeline(broker.url("small"))
        one.log(20)
        one.log(1, text="x" * 5000)
        one.log(20)
        one.arrive()
        assert one.stats.rejected == 1
        written = {
            session: [line for line in lines if len(line) < 5000]
            for session, lines in one.written().items()
        }
        check(written, broker.received("small"))
        assert not any(isinstance(e, TransportTimeoutError) for e in one.errors)

    def test_health_is_that_of_the_server_now(self, broker: Any, destination: str) -> None:
        """`health_check` asks the server also where a connection is open."""

        async def ask() -> None:
            transport = transport_of(broker.url(destination))
            assert await transport.health_check() is True
            await asyncio.to_thread(broker.kill)
            assert transport.is_connected
            assert await transport.health_check() is False
            assert not transport.is_connected
            await transport.close()

        try:
            asyncio.run(ask())
        finally:
            broker.start()

    def test_a_topic_deleted_meanwhile(self, broker: Any, destination: str) -> None:
        """A topic that is gone while the connection is open is no event's fault."""

        async def send() -> None:
            transport = transport_of(broker.url(destination))
            assert await transport.send_batch([outgoing("chat-1", 1)]) == [None]
            await asyncio.to_thread(broker.delete, destination)
            [error] = await transport.send_batch([outgoing("chat-1", 2)])
            assert isinstance(error, TransportConnectionError)
            assert "UnknownTopicOrPartition" in str(error)
            await transport.close()

            broker.make(destination)
            assert await transport.send_batch([outgoing("chat-1", 3)]) == [None]
            await asyncio.to_thread(broker.delete, destination)
            # As the driver does every few minutes.
            await transport._client.force_metadata_update()
            with pytest.raises(TransportConnectionError, match="UnknownTopicOrPartition"):
                await transport.send_batch([outgoing("chat-1", 4)])
            await transport.close()

        asyncio.run(send())

    def test_what_cannot_be_sent_keeps_no_socket(self, broker: Any, destination: str) -> None:
        """A connection on which megabytes are stuck is broken off when it is given up."""
        batch = [outgoing("chat-1", n, "x" * 1_000_000) for n in range(16)]
        # Straight to the server: a gate would take some megabytes too.
        url = broker.url(
            destination, broker.server_port, timeout_seconds=3, max_event_bytes=30_000_000
        )

        async def send() -> None:
            transport = transport_of(url)
            assert await transport.health_check() is True
            broker.pause()
            before = len(os.listdir("/proc/self/fd"))
            errors = await transport.send_batch(batch)
            assert {type(error) for error in errors} == {TransportTimeoutError}
            assert len(set(map(id, errors))) == 1
            await transport.close()
            assert len(os.listdir("/proc/self/fd")) < before
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(send())

    def test_a_connection_that_is_closed_already(self, broker: Any, destination: str) -> None:
        """Closing is fine where the driver has closed a connection before."""

        async def close() -> None:
            transport = transport_of(broker.url(destination))
            assert await transport.health_check() is True
            for connection in transport._client._conns.values():
                await connection.close()
            await transport.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(close())


# --- Errors that a server has to be told to make --------------------------------------------------


def _outcomes(url: str, batch: Sequence[OutgoingEvent]) -> Any:
    async def send() -> Any:
        transport = transport_of(url)
        try:
            return await transport.send_batch(list(batch))
        finally:
            await transport.close()

    return asyncio.run(send())


class Mock:
    """librdkafka's mock cluster of two brokers, with the topic `events`."""

    PRODUCE = 0
    METADATA = 3

    def __init__(self) -> None:
        folder = Path(confluent_kafka.__file__).parent.with_name("confluent_kafka.libs")
        [path] = folder.glob("librdkafka*")
        self._library = library = ctypes.CDLL(str(path))
        pointer = ctypes.c_void_p
        for name in ("conf_new", "new", "mock_cluster_new"):
            getattr(library, f"rd_kafka_{name}").restype = pointer
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        text = ctypes.create_string_buffer(500)
        library.rd_kafka_conf_new.argtypes = []
        configuration = pointer(library.rd_kafka_conf_new())
        self._client = pointer(library.rd_kafka_new(0, configuration, text, len(text)))
        self._cluster = pointer(library.rd_kafka_mock_cluster_new(self._client, 2))
        self.call("topic_create", b"events", 2, 1)
        brokers = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self.url = f"kafka://{brokers}/events"

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the mock cluster."""
        getattr(self._library, f"rd_kafka_mock_{name}")(self._cluster, *args)

    def answer(self, api: int, code: int) -> None:
        """Answer the next request of a kind with an error."""
        self.call("push_request_errors_array", ctypes.c_int16(api), 1, (ctypes.c_int * 1)(code))

    def close(self) -> None:
        """End the cluster."""
        self.call("cluster_destroy")
        self._library.rd_kafka_destroy(self._client)


@pytest.fixture
def mock() -> Iterator[Mock]:
    """A mock cluster."""
    cluster = Mock()
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    ("code", "meaning", "name"),
    [
        (3, TransportConnectionError, "UnknownTopicOrPartition"),
        (6, TransportConnectionError, "NotLeaderForPartition"),
        (7, TransportTimeoutError, "RequestTimedOut"),
        (10, TransportRejectedError, "MessageSizeTooLarge"),
        (18, TransportRejectedError, "RecordListTooLarge"),
        (19, TransportConnectionError, "NotEnoughReplicas"),
        (29, TransportConnectionError, "TopicAuthorizationFailed"),
        (56, TransportConnectionError, "KafkaStorageError"),
        (-1, TransportConnectionError, "UnknownError"),
    ],
)
def test_what_the_broker_answers(mock: Mock, code: int, meaning: type, name: str) -> None:
    """An error of the broker is told by its name; only a record too large is the event's own."""
    mock.answer(Mock.PRODUCE, code)
    [outcome] = _outcomes(mock.url, [outgoing("chat-1", 1)])
    assert type(outcome) is meaning
    assert name in str(outcome)


def test_only_the_events_of_one_partition_fail(mock: Mock) -> None:
    """A partition without a leader fails its own events, once; the other one's are confirmed."""
    batch = [outgoing(f"chat-{n % 10}", n) for n in range(30)]
    mock.call("partition_set_leader", b"events", 1, -1)
    outcomes = _outcomes(mock.url, batch)
    assert None in outcomes
    [failure] = {each for each in outcomes if each is not None}
    assert isinstance(failure, TransportConnectionError)
    by_session = {(event.session_id, each) for event, each in zip(batch, outcomes, strict=True)}
    assert len(by_session) == 10


def test_one_failure_of_several_partitions_counts_once(mock: Mock) -> None:
    """The same answer for all partitions is one error."""
    for _ in range(2):
        mock.answer(Mock.PRODUCE, 19)
    outcomes = _outcomes(mock.url, [outgoing(f"chat-{n}", n) for n in range(10)])
    assert len(set(map(id, outcomes))) == 1
    assert isinstance(outcomes[0], TransportConnectionError)


def test_nothing_follows_a_failure(mock: Mock) -> None:
    """Where a request fails, what is left of the batch is not sent: it would overtake."""
    mock.answer(Mock.PRODUCE, 19)
    batch = [outgoing("chat-1", n, "x" * 500) for n in range(10)]
    outcomes = _outcomes(f"{mock.url}?max_event_bytes=2000", batch)
    [failure] = set(outcomes)
    assert isinstance(failure, TransportConnectionError)


def test_a_large_event_between_others_holds_none_of_them_back(mock: Mock) -> None:
    """What is refused alone is rejected, and the batch goes on."""
    mock.answer(Mock.PRODUCE, 10)
    batch = [outgoing("chat-1", n, "x" * 1500) for n in range(4)]
    outcomes = _outcomes(f"{mock.url}?max_event_bytes=2000", batch)
    assert isinstance(outcomes[0], TransportRejectedError)
    assert outcomes[1:] == [None] * 3


def test_a_topic_without_permission(mock: Mock) -> None:
    """A topic that may not be described is told as such."""
    mock.call("topic_set_error", b"events", 29)
    with pytest.raises(TransportConnectionError, match="TopicAuthorizationFailed"):
        _outcomes(mock.url, [outgoing("chat-1", 1)])


# --- Logging in -----------------------------------------------------------------------------------


class Doorkeeper:
    """A broker that refuses a login, with a text that has the password in it, and tells no more."""

    async def __aenter__(self) -> int:
        self._left = asyncio.Event()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._left.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                request = await reader.readexactly(size)
                kind, _, number = struct.unpack_from(">hhi", request)
                if kind == 18:  # ApiVersions: Metadata 0, SaslHandshake up to 1, SaslAuthenticate 0
                    answer = struct.pack(">hi3h3h3h", 0, 3, 3, 0, 0, 17, 0, 1, 36, 0, 0)
                elif kind == 3:
                    continue
                elif kind == 17:
                    answer = struct.pack(">hih5s", 0, 1, 5, b"PLAIN")
                else:
                    given = request.rpartition(b"\0")[2]
                    text = b"not yours: " + given
                    answer = struct.pack(f">hh{len(text)}si", 58, len(text), text, 0)
                writer.write(struct.pack(">ii", len(answer) + 4, number) + answer)
        writer.close()
        await writer.wait_closed()
        self._left.set()


def test_a_wrong_password() -> None:
    """A refused login is no event's fault, is told by its name, and without the password."""

    async def send() -> None:
        async with Doorkeeper() as port:
            transport = transport_of(f"kafka://user:wr0ng%2Fp%40ss@127.0.0.1:{port}/events")
            with pytest.raises(
                TransportConnectionError, match="SaslAuthenticationFailed"
            ) as caught:
                await transport.send_batch([outgoing("chat-1", 1)])
            assert "not yours: ***" in str(caught.value)
            assert "wr0ng" not in f"{caught.value} {transport!r} {transport.name}"
            await transport.close()

    asyncio.run(send())


def test_a_broker_that_does_not_answer_any_more() -> None:
    """One that lets us in and then hangs is given up in time, and its connection is closed."""

    async def send() -> None:
        async with Doorkeeper() as port:
            transport = transport_of(f"kafka://127.0.0.1:{port}/events?connect_timeout_seconds=0.3")
            with pytest.raises(TransportTimeoutError):
                await transport.send_batch([outgoing("chat-1", 1)])
            await transport.close()

    asyncio.run(send())


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("kafka://h", "the path is the topic"),
        ("kafka://h/a/b", "the path is the topic"),
        (f"kafka://h/{'x' * 250}", "the path is the topic"),
        ("kafka://user@h/events", "both username and password"),
        ("kafka://:secret@h/events", "both username and password"),
        ("kafka://h/events?sasl_mechanism=GSSAPI", "'SCRAM-SHA-256'"),
        ("kafka://h/events?compression=zstd", "'none', 'gzip'"),
    ],
)
def test_options_that_cannot_be(url: str, message: str) -> None:
    """A URL or an option that cannot be is refused at once, with what to write."""
    with pytest.raises(ValueError, match=message) as caught:
        transport_of(url)
    assert "secret" not in str(caught.value)


def test_its_name_has_all_brokers_and_the_topic() -> None:
    """The name says where to, and no password."""
    transport = transport_of("kafka://user:secret@a,b:9093/events?compression=gzip")
    assert transport.name == "kafka://a:9092,b:9093/events"
