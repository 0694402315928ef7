"""Amazon SQS, against moto in a process of the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme
from aiohttp import web
from botocore.config import Config
from botocore.session import get_session

from eventlog_handler import TransportConnectionError, TransportRejectedError
from eventlog_handler.transports._url import header_text
from eventlog_handler.transports.sqs import REQUESTS
from eventlog_handler.typing import OutgoingEvent
from tests.transports.contract import TransportContract, leftovers_collected, outgoing, transport_of
from tests.transports.proxy import Proxy
from tests.transports.servers import PASSWORD, Broker, Received, encoded, query
from tests.transports.sqs_server import REGION

KEY = "AKIATESTSOFEVENTLOG1"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep botocore from what this machine knows, and from asking who it is."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def told(message: dict[str, Any], name: str) -> str:
    """Return an attribute of a message, or nothing."""
    text: str = message["attributes"].get(name, {"StringValue": ""})["StringValue"]
    return text


class SqsServer(Broker):
    """moto, which checks signatures, with a journal of what it has taken (`sqs_server.py`).

    `received` reads that: only so all is found, also what a consumer has deleted.
    """

    tls_options = {"tls": "true"}
    suffix: ClassVar[str] = ""
    attributes: ClassVar[dict[str, str]] = {}

    def command(self) -> list[str]:
        """Return the command."""
        server = Path(__file__).with_name("sqs_server.py")
        journal = self.folder / "journal"
        return [sys.executable, str(server), str(self.port), str(journal), KEY, PASSWORD]

    def client(self) -> Any:
        """Return a client of another kind than the transport's."""
        return contextlib.closing(
            get_session().create_client(
                "sqs",
                region_name=REGION,
                endpoint_url=f"http://127.0.0.1:{self.port}",
                aws_access_key_id=KEY,
                aws_secret_access_key=PASSWORD,
                config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=2),
            )
        )

    def ready(self) -> bool:
        """Return whether it answers."""
        with self.client() as client:
            return bool(client.list_queues())

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a queue."""
        password = encoded(options.pop("password", PASSWORD))
        options = {"region": REGION, "tls": "false", **options}
        scheme = "https" if options["tls"] == "true" else "http"
        options["endpoint_url"] = f"{scheme}://127.0.0.1:{port or self.port}"
        return f"sqs://{KEY}:{password}@{destination}{self.suffix}?{query(**options)}"

    def make(self, destination: str, **attributes: str) -> None:
        """Make a queue."""
        name = f"{destination}{self.suffix}"
        with self.client() as client:
            client.create_queue(QueueName=name, Attributes={**self.attributes, **attributes})

    def messages(self, destination: str) -> list[dict[str, Any]]:
        """Return what is kept of each message of a queue."""
        lines = (self.folder / "journal").read_bytes().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
        name = f"{destination}{self.suffix}"
        return [each for each in entries if each["queue"] == name and "body" in each]

    def received(self, destination: str) -> list[Received]:
        """Return the messages of a queue."""
        return [
            Received(each["body"].encode(), told(each, "id"), told(each, "session_id"))
            for each in self.messages(destination)
        ]


class FifoServer(SqsServer):
    """The same, with FIFO queues."""

    dedupes = True
    suffix = ".fifo"
    attributes = {"FifoQueue": "true"}


class TestSqs(TransportContract):
    """The contract, with standard queues; moto keeps these in order too."""

    broker_type = SqsServer
    consumer = "from_sqs.py"
    name_of_session = staticmethod(header_text)

    def test_a_queues_own_url(
        self, broker: SqsServer, destination: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The queue's URL with another scheme does, with credentials from the environment."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
        queue = f"127.0.0.1:{broker.port}/123456789012/{destination}{broker.suffix}"
        event = outgoing("chat-1", 1)

        async def send() -> None:
            transport = transport_of(f"sqs://{queue}?region={REGION}&tls=false")
            assert await transport.send(event.line, event.metadata) is True
            await transport.close()

        asyncio.run(send())
        assert broker.received(destination) == [Received(event.line, event.id, "chat-1")]

    def test_what_a_consumer_gets(self, broker: SqsServer, destination: str) -> None:
        """A reader finds the line as body, and attributes."""
        events = [outgoing(f"chat {n}", n, "ä\u2028\x7f") for n in range(3)]

        async def send() -> None:
            transport = transport_of(broker.url(destination))
            assert await transport.send_batch(events) == [None] * 3
            await transport.close()

        asyncio.run(send())
        with broker.client() as client:
            name = f"{destination}{broker.suffix}"
            answer = client.receive_message(
                QueueUrl=client.get_queue_url(QueueName=name)["QueueUrl"],
                MaxNumberOfMessages=10,
                MessageAttributeNames=["All"],
            )
        got = [
            (
                each["Body"].encode(),
                *(told({"attributes": each["MessageAttributes"]}, name) for name in event.metadata),
            )
            for event, each in zip(events, answer["Messages"], strict=True)
        ]
        assert got == [(each.line, *each.metadata.values()) for each in events]

    def test_a_queue_that_takes_less(self, broker: SqsServer, destination: str) -> None:
        """Where one message is too long for the queue, only that one is refused, for good."""
        name = f"small-{destination}"
        broker.make(name, MaximumMessageSize="1024")
        events = [outgoing("s", n, "x" * (2000 if n == 5 else 20)) for n in range(12)]

        async def send() -> None:
            transport = transport_of(broker.url(name))
            outcomes = await transport.send_batch(events)
            assert isinstance(outcomes.pop(5), TransportRejectedError)
            assert outcomes == [None] * 11
            await transport.close()

        asyncio.run(send())
        assert [each.id for each in broker.received(name)] == [
            event.id for n, event in enumerate(events) if n != 5
        ]

    def test_a_batch_of_long_lines(self, broker: SqsServer, destination: str) -> None:
        """No request is longer than SQS takes."""
        events = [outgoing("s", n, "x" * 400_000) for n in range(5)]

        async def send() -> None:
            transport = transport_of(broker.url(destination))
            assert await transport.send_batch(events) == [None] * 5
            await transport.close()

        asyncio.run(send())
        assert [each.id for each in broker.received(destination)] == [each.id for each in events]

    def test_a_certificate_of_ones_own(
        self, broker: SqsServer, destination: str, tmp_path: Path
    ) -> None:
        """Where the far side asks for a certificate, it gets ours."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        ours = authority.issue_cert("client.example")
        trusted, cert, key = (tmp_path / each for each in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(str(trusted))
        ours.cert_chain_pems[0].write_to_path(str(cert))
        ours.private_key_pem.write_to_path(str(key))
        files = {"tls_ca_file": trusted, "tls_cert_file": cert, "tls_key_file": key}
        event = outgoing("s", 1)

        async def send(port: int) -> None:
            transport = transport_of(broker.url(destination, port, tls="true", **files))
            assert await transport.send(event.line, event.metadata) is True
            await transport.close()

        with leftovers_collected(), Proxy(broker.port, context) as proxy:
            asyncio.run(send(proxy.port))


class TestSqsFifo(TestSqs):
    """The contract, with FIFO queues."""

    broker_type = FifoServer


class Service:
    """What answers as SQS does, but says what a test wants.

    Args:
        answer: Gets an operation and its parameters; returns a status and what the answer holds.
    """

    def __init__(self, answer: Callable[[str, Any], tuple[int, Any]]) -> None:
        self._answer = answer
        self.operations: list[str] = []
        self.headers: list[Any] = []

    async def __aenter__(self) -> Service:
        app = web.Application(client_max_size=2**22)
        app.router.add_post("/", self._handle)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        operation = request.headers["X-Amz-Target"].partition(".")[2]
        self.operations.append(operation)
        self.headers.append(request.headers)
        if operation == "GetQueueUrl":
            return web.json_response({"QueueUrl": "https://sqs/123456789012/q"})
        # A turn for the other requests that are in flight.
        await asyncio.sleep(0.01)
        status, body = self._answer(operation, json.loads(await request.read()))
        return web.json_response(body, status=status)

    def transport(self, queue: str = "q", **options: Any) -> Any:
        """Return a transport that sends here."""
        options = {"region": REGION, "tls": "false", **options}
        options["endpoint_url"] = f"http://127.0.0.1:{self.port}"
        return transport_of(f"sqs://{KEY}:s3cret-key@{queue}?{query(**options)}")


def taken(entries: list[Any], **failed: Any) -> tuple[int, Any]:
    """Return the answer that all entries are taken but some, by their id."""
    good = [{"Id": e["Id"], "MessageId": "m", "MD5OfMessageBody": "5"} for e in entries]
    return 200, {
        "Successful": [each for each in good if each["Id"] not in failed],
        "Failed": [{"Id": name, **what} for name, what in failed.items()],
    }


def deliver(
    answer: Callable[[str, Any], tuple[int, Any]], batch: list[OutgoingEvent], queue: str = "q"
) -> tuple[list[Exception | None], Service]:
    """Send a batch to what answers so; return the outcomes and what was asked."""

    async def send() -> tuple[list[Exception | None], Service]:
        async with Service(answer) as service:
            transport = service.transport(queue)
            try:
                outcomes: list[Exception | None] = await transport.send_batch(batch)
            finally:
                await transport.close()
            return outcomes, service

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqs://a,b", "write one host"),
        ("sqs://sqs.eu-west-1.amazonaws.com/queue", "the path of a queue's URL is account/queue"),
        ("sqs://localhost:9324", "a queue's name has no port"),
        ("sqs://q?endpoint_url=http://127.0.0.1:1", "http://… with tls=false"),
        ("sqs://q?endpoint_url=https://127.0.0.1:1&tls=false", "http://… with tls=false"),
        ("sqs://key@q", "access key id and secret together"),
        ("sqs://q?session_token=s3cret", "access key id and secret together"),
        ("sqs://q?regoin=eu-west-1", "region"),
    ],
)
def test_options_that_cannot_be(url: str, message: str) -> None:
    """A URL that cannot work is refused at once, and says what to write."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        transport_of(url)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("sqs.eu-west-1.amazonaws.com", "eu-west-1"),
        ("sqs-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("vpce-0a1b-2c3d.sqs.ap-southeast-2.vpce.amazonaws.com", "ap-southeast-2"),
        ("sqs.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("localhost:9324", None),
    ],
)
def test_the_region_of_a_queues_url(host: str, region: str | None) -> None:
    """A queue's URL says its region, unless the option says another one."""
    url = f"sqs://{host}/123456789012/q.fifo"
    assert transport_of(url).options.region == region
    assert transport_of(f"{url}?region=us-east-2").options.region == "us-east-2"


def test_a_session_is_a_group() -> None:
    """Groups and deduplication ids are within SQS's limits, and differ where sessions do."""
    sessions = ["chat-1", "a b", "a.b", "é" * 200, "é" * 201, "x" * 128, "x" * 129, "\ud800", " "]
    batch = [outgoing("s", 1)._replace(session_id=session_id) for session_id in sessions]
    asked: list[Any] = []

    def answer(operation: str, parameters: Any) -> tuple[int, Any]:
        asked.extend(parameters["Entries"])
        return taken(parameters["Entries"])

    outcomes, _ = deliver(answer, batch, "q.fifo")
    assert outcomes == [None] * len(batch)
    groups = [each["MessageGroupId"] for each in asked]
    assert groups[:3] == ["chat-1", "a%20b", "a%2Eb"]
    assert len(set(groups)) == len(sessions)
    assert all(re.fullmatch(r"[!-~]{1,128}", each) for each in groups)
    assert [each["MessageDeduplicationId"] for each in asked] == [event.id for event in batch]


def test_a_standard_queue_has_no_groups() -> None:
    """Only a FIFO queue gets group and deduplication ids, which others refuse."""
    asked: list[Any] = []

    def answer(operation: str, parameters: Any) -> tuple[int, Any]:
        asked.extend(parameters["Entries"])
        return taken(parameters["Entries"])

    event = outgoing("é\n", 1)._replace(type="")
    deliver(answer, [event])
    [entry] = asked
    assert sorted(entry) == ["Id", "MessageAttributes", "MessageBody"]
    assert {k: v["StringValue"] for k, v in entry["MessageAttributes"].items()} == {
        "id": event.id,
        "session_id": "%C3%A9%0A",
        "timestamp": event.timestamp,
    }


def test_a_line_that_sqs_does_not_take() -> None:
    """What is no text of XML is parked before it is sent, and costs the others nothing."""
    lines = [b'"\xef\xbf\xbf"', b"", b"\xff", b"\x00"]
    batch = [outgoing("s", 1)._replace(line=line) for line in lines]
    good = outgoing("s", 2)
    outcomes, service = deliver(lambda _, asked: taken(asked["Entries"]), [*batch, good])
    assert [type(each) for each in outcomes[:-1]] == [TransportRejectedError] * 4
    assert str(outcomes[0]) == "the line has '\\uffff', which SQS does not take"
    assert str(outcomes[1]) == "the line is empty, which SQS does not take"
    assert outcomes[-1] is None
    assert service.operations == ["GetQueueUrl", "SendMessageBatch"]


def test_entries_that_fail() -> None:
    """Only what is said of the message is the event's own failure, whoever is called at fault."""
    batch = [outgoing(f"s{n}", n) for n in range(5)]
    throttled = {"SenderFault": True, "Code": "ThrottlingException", "Message": "Rate exceeded"}
    contents = {"SenderFault": True, "Code": "InvalidMessageContents", "Message": "…"}
    long = {
        "SenderFault": True,
        "Code": "InvalidParameterValue",
        "Message": "Message must be shorter than 262144 bytes.",
    }

    def answer(operation: str, asked: Any) -> tuple[int, Any]:
        return taken(asked["Entries"], **{"0": throttled, "1": contents, "2": long, "4": throttled})

    outcomes, _ = deliver(answer, batch)
    kinds = [type(each) for each in outcomes]
    assert kinds[:3] == [TransportConnectionError, TransportRejectedError, TransportRejectedError]
    assert outcomes[3] is None
    # One failure, however many it befalls.
    assert outcomes[4] is outcomes[0]


def test_an_entry_that_is_not_answered_for() -> None:
    """What the answer does not name has not arrived."""
    batch = [outgoing("s", n) for n in range(2)]
    outcomes, _ = deliver(lambda _, asked: taken(asked["Entries"][:1]), batch)
    assert outcomes[0] is None
    assert isinstance(outcomes[1], TransportConnectionError)


@pytest.mark.parametrize("whole", [True, False])
def test_after_a_failure_nothing_follows(whole: bool) -> None:
    """After a failed request or entry no other one begins; the driver does not try again."""
    failed = {"SenderFault": False, "Code": "InternalError", "Message": "…"}

    def answer(operation: str, asked: Any) -> tuple[int, Any]:
        if whole:
            return 500, {"__type": "InternalError", "message": "…"}
        return taken(asked["Entries"], **{"9": failed})

    batch = [outgoing(f"s{n}", n) for n in range(200)]
    outcomes, service = deliver(answer, batch)
    sent = service.operations.count("SendMessageBatch")
    assert sent <= REQUESTS
    assert outcomes.count(None) == (0 if whole else 9 * sent)
    assert all(isinstance(each, TransportConnectionError) for each in outcomes if each)


def test_requests_at_a_time() -> None:
    """Several requests are in flight, but never two with events of one session."""
    in_flight: list[set[str]] = []
    most = 0

    class Slow(Service):
        async def _handle(self, request: web.Request) -> web.Response:
            nonlocal most
            entries = json.loads(await request.read()).get("Entries", ())
            sessions = {each["MessageGroupId"] for each in entries}
            assert not any(sessions & others for others in in_flight)
            in_flight.append(sessions)
            most = max(most, len(in_flight))
            response = await super()._handle(request)
            in_flight.remove(sessions)
            return response

    got: dict[str, list[str]] = defaultdict(list)

    def answer(operation: str, asked: Any) -> tuple[int, Any]:
        for each in asked["Entries"]:
            got[each["MessageGroupId"]].append(each["MessageDeduplicationId"])
        return taken(asked["Entries"])

    batch = [outgoing(f"s{n % 30}", n) for n in range(300)]

    async def send() -> None:
        async with Slow(answer) as service:
            transport = service.transport("q.fifo")
            assert await transport.send_batch(batch) == [None] * 300
            assert await transport.send_batch(batch[:10]) == [None] * 10
            await transport.close()
            # As few as there can be: they are paid for.
            assert service.operations.count("SendMessageBatch") <= 40 + 1

    asyncio.run(send())
    assert most == REQUESTS
    for n in range(30):
        assert got[f"s{n}"][:10] == [event.id for event in batch if event.session_id == f"s{n}"]


def test_a_session_token_is_sent_and_not_shown() -> None:
    """Credentials for a time go along; whatever SQS says, they are in no message."""

    async def send() -> None:
        async with Service(lambda *_: (403, {"__type": "Bad", "message": "t0ken s3cret-key"})) as s:
            transport = s.transport(session_token="t0ken")
            [error] = await transport.send_batch([outgoing("s", 1)])
            await transport.close()
            assert isinstance(error, TransportConnectionError)
            shown = f"{transport!r} {transport.name} {error}"
            assert "***" in shown
            assert not any(secret in shown for secret in ("t0ken", "s3cret-key"))
            assert {each["X-Amz-Security-Token"] for each in s.headers} == {"t0ken"}

    asyncio.run(send())


def test_without_credentials_none_is_guessed() -> None:
    """Where botocore finds none, that is told, and nothing is parked."""

    async def send() -> None:
        transport = transport_of("sqs://q?region=eu-west-1&endpoint_url=https://127.0.0.1:1")
        with pytest.raises(TransportConnectionError, match="Unable to locate credentials"):
            await transport.send(b"{}")
        await transport.close()

    asyncio.run(send())
