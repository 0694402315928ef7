"""NATS JetStream, against a nats-server of the tests' own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import nats
import nkeys
import pytest
import trustme
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, StreamConfig

from eventlog_handler.exceptions import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports import _remote
from eventlog_handler.transports._url import header_text
from eventlog_handler.transports.nats import NatsTransport
from eventlog_handler.typing import OutgoingEvent
from tests.reliability.harness import missing
from tests.transports.contract import HOSTILE, TransportContract, outgoing
from tests.transports.servers import (
    PASSWORD,
    Broker,
    Received,
    encoded,
    free_port,
    installed,
    query,
)

T = TypeVar("T")
WRITER = 'user: writer, password: pw, permissions: {publish: "free.>", subscribe: "_MINE.>"}'
"""A user that may not do much."""
PATIENCE = 40.0
"""Seconds; nothing here takes half of it."""


class NatsServer(Broker):
    """A nats-server with JetStream that wants user and password.

    What a stream has acknowledged is written to its file, and so it stays when the server is
    killed; a crash of the machine is another matter (`sync_interval`).
    """

    missing = None if installed("nats-server") else "nats-server is not installed"
    dedupes = True
    # Without `tls_first` the server's first line comes in plain text, before the proxy's TLS.
    tls_options = {"tls": "true", "tls_first": "true"}
    login: dict[str, Any] = {"user": "eventlog", "password": PASSWORD}
    """Of the tests' own client."""

    def lines(self) -> list[str]:
        """Return what its configuration says of who may log in, and how."""
        admin = f'user: eventlog, password: "{PASSWORD}"'
        return [f"authorization {{ users: [{{ {admin} }}, {{ {WRITER} }}] }}"]

    def command(self) -> list[str]:
        """Return the command."""
        data = json.dumps(str(self.folder / "data"))
        listen = [f"listen: 127.0.0.1:{self.port}", f"jetstream {{ store_dir: {data} }}"]
        path = self.folder / "nats.conf"
        path.write_text("\n".join(listen + self.lines()))
        return [str(installed("nats-server")), "-c", str(path)]

    def ask(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Do something with a client of its own."""

        async def run() -> T:
            client = await nats.connect(
                f"nats://127.0.0.1:{self.port}",
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                error_cb=quiet,
                **self.login,
            )
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(run())

    def ready(self) -> bool:
        """Return whether its streams answer."""
        return self.ask(lambda client: client.jetstream().account_info()) is not None

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL for subjects below a stream's name."""
        user = options.pop("user", "eventlog")
        password = encoded(options.pop("password", PASSWORD))
        options = {"subject": destination + ".{session_id}", **options}
        return f"nats://{user}:{password}@127.0.0.1:{port or self.port}?{query(**options)}"

    def make(self, destination: str, **config: Any) -> None:
        """Make a stream that takes all subjects below its name."""
        made = StreamConfig(name=destination, subjects=[f"{destination}.>"], **config)
        self.ask(lambda client: client.jetstream().add_stream(made))

    def messages(self, destination: str) -> list[Any]:
        """Return what lies in a stream, in order."""

        async def read(client: Any) -> list[Any]:
            js = client.jetstream()
            left = (await js.stream_info(destination)).state.messages
            config = ConsumerConfig(ack_policy=AckPolicy.NONE, mem_storage=True)
            consumer = await js.pull_subscribe(">", stream=destination, config=config)
            found: list[Any] = []
            while len(found) < left:
                found += await consumer.fetch(left - len(found), timeout=10)
            return found

        return self.ask(read)

    def received(self, destination: str) -> list[Received]:
        """Return the messages of a stream."""
        found = self.messages(destination)
        return [Received(m.data, m.headers["Nats-Msg-Id"], m.headers["session_id"]) for m in found]


class SmallServer(NatsServer):
    """Takes messages of at most 1,000 bytes."""

    def lines(self) -> list[str]:
        """Return who may log in, and the limit."""
        return [*super().lines(), "max_payload: 1000"]


class TokenServer(NatsServer):
    """Wants a token."""

    login = {"token": PASSWORD}

    def lines(self) -> list[str]:
        """Return the token."""
        return [f'authorization {{ token: "{PASSWORD}" }}']


class TlsServer(NatsServer):
    """Says its first line in plain text and then wants TLS, with a certificate of the client."""

    def lines(self) -> list[str]:
        """Make certificates, and return where they are."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        for name, host in {"server": "127.0.0.1", "client": "client.example"}.items():
            path = self.folder / f"{name}.pem"
            authority.issue_cert(host).private_key_and_cert_chain_pem.write_to_path(str(path))
        server, ca = self.folder / "server.pem", self.folder / "ca.pem"
        files = f'cert_file: "{server}", key_file: "{server}", ca_file: "{ca}"'
        return [*super().lines(), f"tls {{ {files}, verify: true }}"]

    def ready(self) -> bool:
        """Return whether it has said that it is."""
        return b"Server is ready" in (self.folder / "output").read_bytes()


class JwtServer(NatsServer):
    """Knows accounts and users by what an operator has signed."""

    def lines(self) -> list[str]:
        """Make an operator, an account with JetStream, and a user's credentials."""
        _, operator = _key(nkeys.PREFIX_BYTE_OPERATOR)
        _, account = _key(nkeys.PREFIX_BYTE_ACCOUNT)
        _, system = _key(nkeys.PREFIX_BYTE_ACCOUNT)
        seed, user = _key(nkeys.PREFIX_BYTE_USER)
        names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
        stores = ("mem_storage", "disk_storage", "streams", "consumer")
        limits = dict.fromkeys(names + stores, -1) | {"wildcards": True}
        jwt = _signed(account, user, {"type": "user", **dict.fromkeys(names[:3], -1)})
        self.credentials.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
        self.login = {"user_credentials": str(self.credentials)}
        accounts = {
            account: _signed(operator, account, {"type": "account", "limits": limits}),
            system: _signed(operator, system, {"type": "account"}),
        }
        known = ", ".join(f"{_name(key)}: {jwt}" for key, jwt in accounts.items())
        return [
            f"operator: {_signed(operator, operator, {'type': 'operator'})}",
            f"system_account: {_name(system)}",
            "resolver: MEMORY",
            f"resolver_preload: {{ {known} }}",
        ]

    @property
    def credentials(self) -> Path:
        """The user's file."""
        return self.folder / "user.creds"


def _key(kind: int) -> tuple[str, Any]:
    seed = nkeys.encode_seed(os.urandom(32), kind)
    return seed.decode(), nkeys.from_seed(bytearray(seed))


def _name(key: Any) -> str:
    return bytes(key.public_key).decode()


def _signed(issuer: Any, subject: Any, claims: dict[str, Any]) -> str:
    body = {"jti": "x", "iat": 1, "iss": _name(issuer), "sub": _name(subject), "name": "n"}
    head = {"typ": "JWT", "alg": "ed25519-nkey"}
    parts = [
        json.dumps(each).encode() for each in (head, {**body, "nats": {"version": 2} | claims})
    ]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    return (text + b"." + base64.urlsafe_b64encode(issuer.sign(text)).rstrip(b"=")).decode()


async def quiet(error: Exception) -> None:
    """Keep what the driver would log."""


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that the driver says nothing, and that nothing goes wrong behind its back."""
    caplog.set_level(logging.INFO)
    yield
    gc.collect()
    said = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name.partition(".")[0] in ("nats", "asyncio")
    ]
    # On 3.11 asyncio reports the tasks that our proxy cancels.
    assert [text for text in said if "proxy.py" not in text] == []


class TestNats(TransportContract):
    """The contract."""

    broker_type = NatsServer
    consumer = "from_nats.py"
    name_of_session = staticmethod(header_text)


@contextlib.contextmanager
def running(kind: type[NatsServer], folder: Path) -> Iterator[Any]:
    """Run a server."""
    if kind.missing:
        missing(kind.missing)
    server = kind(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server for the tests that do it no harm."""
    with running(NatsServer, tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def stream(server: NatsServer, request: pytest.FixtureRequest) -> str:
    """The name of a stream of this test's own, that is not made yet."""
    name: str = request.node.name.translate(str.maketrans(".[] ", "____"))
    return name


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a goodbye take its time, so that one that waits is noticed."""
    monkeypatch.setattr(_remote, "SHUT_SECONDS", PATIENCE)


def use(url: str, work: Callable[[NatsTransport], Awaitable[T]], **options: Any) -> T:
    """Do something with a transport; check that it leaves no task behind."""

    async def run() -> T:
        transport = NatsTransport(url, **options)
        try:
            return await work(transport)
        finally:
            await transport.close()
            await asyncio.sleep(0)
            assert asyncio.all_tasks() - others == set()

    async def observed() -> T:
        others.update(asyncio.all_tasks())
        return await run()

    others: set[Any] = set()
    return asyncio.run(observed())


def send(url: str, *events: OutgoingEvent, **options: Any) -> list[Exception | None]:
    """Send a batch."""
    return use(url, lambda transport: transport.send_batch(list(events)), **options)


def healthy(url: str, **options: Any) -> bool:
    """Return what `health_check` says."""
    return use(url, lambda transport: transport.health_check(), **options)


@contextlib.asynccontextmanager
async def peer(
    acknowledged: int, end: bytes | None, heard: list[bytes] | None = None
) -> AsyncIterator[str]:
    """Run what speaks as little NATS as is needed, and goes away after so many events.

    Args:
        acknowledged: How many it takes.
        end: What it says then; None breaks the connection off.
        heard: Gets what it is told.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        left, sid = acknowledged, b""
        writer.write(b'INFO {"headers":true,"max_payload":1048576}\r\n')
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                if heard is not None:
                    heard.append(line)
                operation, *words = line.split()
                if operation == b"PING":
                    writer.write(b"PONG\r\n")
                elif operation == b"SUB":
                    sid = words[-1]
                elif operation == b"HPUB":
                    await reader.readexactly(int(words[-1]) + 2)
                    if not left:
                        break
                    left -= 1
                    answer = b'{"stream":"s","seq":1}'
                    # Twice: the second is to be taken for nothing.
                    message = b"MSG %s %s %d\r\n%s\r\n" % (words[1], sid, len(answer), answer)
                    writer.write(message * 2)
            await writer.drain()
            if end is not None:
                writer.write(end)
                await reader.read()
        writer.transport.abort()

    tasks: list[Any] = []
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        _, hanging = await asyncio.wait(tasks, timeout=10)
        assert not hanging


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nats://h?subject=a b", "tokens of printable ASCII"),
        ("nats://h?subject=a.*.{type}", "tokens of printable ASCII"),
        ("nats://h?subject=a.%3E", "tokens of printable ASCII"),
        ("nats://h?subject=.{session_id}", "tokens of printable ASCII"),
        ("nats://h?subject=a..b", "tokens of printable ASCII"),
        ("nats://h?subject=ä.{session_id}", "tokens of printable ASCII"),
        ("nats://h?subject=a%0Ab", "tokens of printable ASCII"),
        ("nats://h?subject={session}", "there are {session_id} and {type}"),
        ("nats://h/eventlog", r"\?subject="),
        ("nats://s3cret@h", r"\?token="),
        ("nats://:s3cret@h", r"\?token="),
        ("nats://h?tls_first=true", "add tls=true"),
    ],
)
def test_what_cannot_be_is_refused(url: str, said: str) -> None:
    """A subject, path, login or option that cannot be is refused, with what to write instead."""
    with pytest.raises(ValueError, match=said) as caught:
        NatsTransport(url)
    assert "s3cret" not in str(caught.value)


def test_credentials_want_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library that signs, a credentials file is refused with what to install."""
    monkeypatch.setitem(sys.modules, "nkeys", None)
    with pytest.raises(ImportError, match="pip install"):
        NatsTransport("nats://h?credentials_file=user.creds")


def test_a_message_says_what_it_is(server: NatsServer, stream: str) -> None:
    """A message has the event's four headers, and its id for the stream to deduplicate by."""
    server.make(stream)
    event = OutgoingEvent(b'{"a":1}', "1\u00e4", "chat 42", "step.\n", "2026-11-22T06:31:56+00:00")
    url = server.url(stream, subject=stream + ".{type}.of.{session_id}")
    assert send(url, event, event) == [None, None]
    assert send(url, event) == [None]
    [message] = server.messages(stream)
    assert message.subject == f"{stream}.step%2E%0A.of.chat%2042"
    assert message.data == event.line
    assert message.headers == {
        "id": "1%C3%A4",
        "session_id": "chat 42",
        "type": "step.%0A",
        "timestamp": "2026-11-22T06:31:56+00:00",
        "Nats-Msg-Id": "1%C3%A4",
    }


def test_sessions_have_subjects_of_their_own(server: NatsServer, stream: str) -> None:
    """Each session id is one token that no other has, cut where it is too long for a line."""
    server.make(stream)
    long = "\U0001f600" * 500
    ids = [*HOSTILE, "", "%", "a.b", "x" * 255, "x" * 256, long, long + "!"]
    assert send(server.url(stream), *(outgoing(each, 0) for each in ids)) == [None] * len(ids)
    tokens = [message.subject.removeprefix(f"{stream}.") for message in server.messages(stream)]
    assert len(set(tokens)) == len(ids)
    assert not any("." in token or len(token) > 256 for token in tokens)
    assert "x" * 255 in tokens
    assert {"%", "%25", "a%2Eb"} < set(tokens)


def test_an_expected_stream(server: NatsServer, stream: str) -> None:
    """With `stream` an event goes into that one or nowhere, and `health_check` knows it."""
    server.make(stream)
    url, event = server.url(stream), outgoing("s", 1)
    [error] = send(url, event, stream="another")
    assert isinstance(error, TransportConnectionError)
    assert "10060" in str(error)
    assert not healthy(url, stream="another")
    assert send(url, event, stream=stream) == [None]
    assert healthy(url, stream=stream)
    assert len(server.messages(stream)) == 1


def test_a_subject_without_a_stream(server: NatsServer, stream: str) -> None:
    """Where no stream takes the subject, one failure is told for all events."""
    url = server.url(stream)
    first, second = send(url, outgoing("a", 1), outgoing("b", 1))
    assert isinstance(first, TransportConnectionError)
    assert first is second
    assert "no JetStream stream takes the subject" in str(first)
    assert not healthy(url)


def test_health_is_asked_of_the_subject_that_was_used(server: NatsServer, stream: str) -> None:
    """`health_check` asks for a subject that events had, and stores nothing."""
    made = StreamConfig(name=stream, subjects=[f"{stream}.step"])
    server.ask(lambda client: client.jetstream().add_stream(made))

    async def work(transport: NatsTransport) -> tuple[bool, Any, bool]:
        before = await transport.health_check()
        outcomes = await transport.send_batch([outgoing("s", 1)])
        return before, outcomes, await transport.health_check()

    url = server.url(stream, subject=stream + ".{type}")
    assert use(url, work) == (False, [None], True)
    assert len(server.messages(stream)) == 1


def test_a_full_stream(server: NatsServer, stream: str) -> None:
    """A stream that is full and discards what is new costs nothing: it is tried again."""
    server.make(stream, max_msgs=1, discard=DiscardPolicy.NEW)
    url = server.url(stream)
    done, failed, failed_too = send(url, *(outgoing("s", n) for n in range(3)))
    assert done is None
    assert isinstance(failed, TransportConnectionError)
    assert failed is failed_too
    assert "10077" in str(failed)


def test_a_stream_with_a_limit_of_its_own(server: NatsServer, stream: str) -> None:
    """What is too large for the stream is rejected, and nothing else is."""
    server.make(stream, max_msg_size=1000)
    events = [outgoing("s", 1), outgoing("s", 2, "x" * 1000), outgoing("s", 3)]
    done, rejected, done_too = send(server.url(stream), *events)
    assert (done, done_too) == (None, None)
    assert isinstance(rejected, TransportRejectedError)
    assert "10054" in str(rejected)


def test_a_server_with_a_limit_of_its_own(tmp_path: Path) -> None:
    """What with its headers is over `max_payload` by one byte is rejected, and not sent."""
    with running(SmallServer, tmp_path) as server:
        server.make("events")
        url = server.url("events")
        [error] = send(url, OutgoingEvent(b"x" * 1000, "an id", "s", "step", "now"))
        assert isinstance(error, TransportRejectedError)
        over = int(str(error).partition("headers ")[2].split()[0]) - 1000
        events = [
            OutgoingEvent(b"x" * (1000 - over), "1", "s", "step", "12345678901"),
            OutgoingEvent(b"x" * (1001 - over), "2", "s", "step", "12345678901"),
            OutgoingEvent(b"x", "3", "s", "step", "now"),
        ]
        # Ids that are shorter by four characters, twice, and a time that is longer by eight.
        done, rejected, done_too = send(url, *events)
        assert (done, done_too) == (None, None)
        assert isinstance(rejected, TransportRejectedError)
        assert [message.headers["id"] for message in server.messages("events")] == ["1", "3"]


def test_a_missing_permission_is_told_at_once(server: NatsServer, stream: str) -> None:
    """A user that may not publish, or not listen for answers, hears it before any time-out."""
    server.make(stream)
    server.make("free")
    begin, event = time.monotonic(), outgoing("s", 1)
    login = {"user": "writer", "password": "pw"}
    with pytest.raises(TransportConnectionError, match="permissions violation for subscri"):
        send(server.url("free", **login), event)
    login["inbox_prefix"] = "_MINE"
    [error] = send(server.url(stream, **login), event)
    assert isinstance(error, TransportConnectionError)
    assert "permissions violation for publish" in str(error).lower()
    assert not healthy(server.url(stream, **login))
    assert time.monotonic() - begin < 9
    # That it may not use JetStream's own subjects does not matter.
    assert healthy(server.url("free", **login))
    assert send(server.url("free", **login), event) == [None]


def test_a_wrong_login_is_told(server: NatsServer, stream: str) -> None:
    """A wrong password is a failure of the connection, as the server says it."""
    with pytest.raises(TransportConnectionError, match="Authorization Violation"):
        send(server.url(stream, password="wrong"), outgoing("s", 1))


def test_a_token(tmp_path: Path) -> None:
    """A token logs in, and is shown nowhere."""
    with running(TokenServer, tmp_path) as server:
        server.make("eventlog")
        url = f"nats://127.0.0.1:{server.port}"
        assert send(f"{url}?token={encoded(PASSWORD)}", outgoing("s", 1)) == [None]
        with pytest.raises(TransportConnectionError) as caught:
            send(url, outgoing("s", 1), token="wr0ng")
        assert "wr0ng" not in str(caught.value)
        assert PASSWORD not in repr(NatsTransport(url, token=PASSWORD))


def test_a_credentials_file(tmp_path: Path) -> None:
    """A `.creds` file logs in; one that is none is told, as is one that is not there."""
    with running(JwtServer, tmp_path) as server:
        server.make("eventlog")
        url, event = f"nats://127.0.0.1:{server.port}", outgoing("s", 1)
        assert send(url, event, credentials_file=str(server.credentials)) == [None]
        other = tmp_path / "other.creds"
        with pytest.raises(TransportConnectionError, match="FileNotFoundError"):
            send(url, event, credentials_file=str(other))
        other.write_text("BEGIN NATS USER JWT")
        with pytest.raises(TransportConnectionError, match="has no JWT and seed"):
            send(url, event, credentials_file=str(other))


def test_tls_after_the_first_line(tmp_path: Path, patient: None) -> None:
    """With certificates for both sides TLS works as NATS usually has it."""
    with running(TlsServer, tmp_path) as server:
        client = str(tmp_path / "client.pem")
        files = {"tls_ca_file": tmp_path / "ca.pem", "tls_cert_file": client}
        url = server.url("eventlog", tls="true", **files)
        [error] = send(url, outgoing("s", 1))
        assert "no JetStream stream" in str(error)
        begin = time.monotonic()
        with pytest.raises(TransportConnectionError, match="certificate verify failed"):
            send(server.url("eventlog", tls="true"), outgoing("s", 1))
        assert time.monotonic() - begin < PATIENCE / 2


def test_nothing_is_said_without_tls_where_it_is_wanted() -> None:
    """A server that offers no TLS hears neither password nor event."""
    heard: list[bytes] = []

    async def run() -> None:
        async with peer(9, None, heard) as url:
            transport = NatsTransport(url, tls=True, username="u", password="s3cret")
            with pytest.raises(TransportConnectionError, match="secure connection not available"):
                await transport.send_batch([outgoing("s", 1)])
            await transport.close()

    asyncio.run(run())
    assert heard == []


def test_several_servers(server: NatsServer, stream: str) -> None:
    """One server that is down is passed over; if all are, the reason is told."""
    server.make(stream)
    live, dead = f"127.0.0.1:{server.port}", f"127.0.0.1:{free_port()}"
    login, options = f"eventlog:{encoded(PASSWORD)}", query(subject=stream + ".{session_id}")
    for number in range(4):
        url = f"nats://{login}@{dead},{live}?{options}"
        assert send(url, outgoing("s", number)) == [None]
    begin = time.monotonic()
    with pytest.raises(TransportConnectionError, match="ConnectionRefusedError"):
        send(f"nats://{login}@{dead},127.0.0.1:{free_port()}?{options}", outgoing("s", 1))
    assert time.monotonic() - begin < 4


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (None, "connection|ConnectionReset|EOF"),
        (b"-ERR 'Maximum Connections Exceeded'\r\n", "maximum connections exceeded"),
        (b"-ERR 'Authorization Violation'\r\n", "authorization failed"),
        (b"nonsense\r\n", "protocol error"),
    ],
)
def test_a_connection_that_ends_in_the_middle_of_a_batch(end: bytes | None, said: str) -> None:
    """What was acknowledged before stays acknowledged, and the rest fails once, at once."""

    async def run() -> list[Exception | None]:
        async with peer(2, end) as url:
            transport = NatsTransport(url)
            begin = time.monotonic()
            outcomes = await transport.send_batch([outgoing("s", n) for n in range(5)])
            assert time.monotonic() - begin < 9
            assert not transport.is_connected
            await transport.close()
        return outcomes

    done, done_too, *failed = asyncio.run(run())
    assert (done, done_too) == (None, None)
    assert len(failed) == 3
    assert len(set(failed)) == 1
    assert isinstance(failed[0], TransportConnectionError)
    with pytest.raises(TransportError, match=f"(?i){said}"):
        raise failed[0]


def test_an_idle_connection_that_has_ended(tmp_path: Path) -> None:
    """After a restart of the server the old connection is known to be over, and a new one works."""

    async def work(transport: NatsTransport) -> None:
        assert await transport.health_check()
        reading = transport._client.client._reading_task
        server.kill()
        await asyncio.wait([reading], timeout=10)
        with pytest.raises(TransportConnectionError, match=r"EOF|ConnectionReset"):
            await transport.send_batch([outgoing("s", 1)])
        await asyncio.to_thread(server.start)
        assert await transport.send_batch([outgoing("s", 2)]) == [None]

    with running(NatsServer, tmp_path) as server:
        server.make("events")
        use(server.url("events"), work)


def test_a_server_that_hangs_is_left(tmp_path: Path, patient: None) -> None:
    """A server that takes nothing any more does not keep a connection, nor the end, waiting."""

    async def work(transport: NatsTransport) -> float:
        assert await transport.health_check()
        server.pause()
        with pytest.raises(TransportTimeoutError):
            await transport.send_batch([outgoing("s", n, "x" * 500_000) for n in range(30)])
        return time.monotonic()

    with running(NatsServer, tmp_path) as server:
        server.make("events")
        begin = use(server.url("events", timeout_seconds=0.2), work)
        assert time.monotonic() - begin < PATIENCE / 2


@pytest.mark.parametrize("answer", [b"hello", b"[]", b"{}", b'{"error": {}}', b'{"error": 1}'])
def test_something_else_answers(server: NatsServer, stream: str, answer: bytes) -> None:
    """What answers but is not JetStream has acknowledged nothing."""

    async def run() -> Any:
        client = await nats.connect(f"nats://127.0.0.1:{server.port}", **server.login)

        async def respond(message: Any) -> None:
            await message.respond(answer)

        await client.subscribe("core.>", cb=respond)
        await client.flush()
        transport = NatsTransport(server.url("core"))
        outcomes = await transport.send_batch([outgoing("s", 1)])
        assert not await transport.health_check()
        await transport.close()
        await client.close()
        return outcomes

    [error] = asyncio.run(run())
    assert isinstance(error, TransportConnectionError)
    assert "not JetStream" in str(error)
