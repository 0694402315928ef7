"""HTTP, against a receiver of the tests' own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import hashlib
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from eventlog_handler import (
    OutgoingEvent,
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports import http
from eventlog_handler.transports._url import header_text
from eventlog_handler.transports.http import HttpTransport
from tests.transports import http_receiver
from tests.transports.contract import Pipeline, TransportContract, check, outgoing
from tests.transports.servers import PASSWORD, Broker, Received, encoded, free_port, query

LOGIN = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
Answer = Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]


class HttpReceiver(Broker):
    """The receiver, which wants a login. What it has taken is read from its files."""

    tls_options = {"scheme": "https"}
    format: ClassVar[str] = "single"

    def command(self) -> list[str]:
        """Return the command."""
        return [sys.executable, http_receiver.__file__, str(self.port), str(self.folder), PASSWORD]

    def ready(self) -> bool:
        """Return whether it answers."""
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5)
        return True

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a path."""
        scheme = options.pop("scheme", "http")
        password = encoded(options.pop("password", PASSWORD))
        address = f"{scheme}://user:{password}@127.0.0.1:{port or self.port}/{destination}"
        return f"{address}?for=them#{query(**{'format': self.format, **options})}"

    def example(self, destination: str) -> tuple[str, str]:
        """Return a URL at which the consumer itself is the server, twice."""
        url = f"http://127.0.0.1:{free_port()}/hook#format={self.format}"
        return url, url

    def make(self, destination: str) -> None:
        """Make the file of a path."""
        (self.folder / destination).touch()

    def received(self, destination: str) -> list[Received]:
        """Return what it has written down."""
        events = [json.loads(e) for e in (self.folder / destination).read_bytes().splitlines()]
        return [Received(base64.b64decode(e.pop("line")), **e) for e in events]


class NdjsonReceiver(HttpReceiver):
    """The same, for batches of lines."""

    format = "ndjson"


class JsonReceiver(HttpReceiver):
    """The same, for JSON arrays."""

    format = "json"


class TestHttpSingle(TransportContract):
    """A request for each event."""

    broker_type = HttpReceiver
    consumer = "from_http.py"
    name_of_session = staticmethod(header_text)


class BatchContract(TransportContract):
    """A request for a batch: which session an event is of stands in its line only."""

    consumer = "from_http.py"

    def test_poison_is_found_and_parked(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """A batch is refused for one event (400): that one is parked, the rest arrives once."""
        one = pipeline(broker.url(destination))
        one.log(40, sessions=3)
        one.log(1, text="POISON")
        one.log(40, sessions=3)
        one.arrive()
        lines = one.written()
        written = {s: [w for w in each if b"POISON" not in w] for s, each in lines.items()}
        assert check(written, broker.received(destination)) == 0
        assert one.stats.rejected == 1

    def test_a_batch_that_is_too_large_for_the_server_is_halved(
        self, broker: Broker, pipeline: Callable[..., Pipeline]
    ) -> None:
        """A server that takes less than `request_bytes` (413) gets it in smaller requests."""
        destination = f"{http_receiver.SMALL}-{broker.format}"
        broker.make(destination)
        one = pipeline(broker.url(destination))
        one.log(60, sessions=3)
        one.arrive()
        assert check(one.written(), broker.received(destination)) == 0
        assert one.stats.rejected == 0


class TestHttpNdjson(BatchContract):
    """A request for a batch, in lines."""

    broker_type = NdjsonReceiver


class TestHttpJson(BatchContract):
    """A request for a batch, in a JSON array."""

    broker_type = JsonReceiver


# One request, to a server in this process that answers as it is told.


class Seen:
    """A request."""

    def __init__(self, request: web.BaseRequest, body: bytes) -> None:
        self.target = request.raw_path
        self.headers = request.headers.copy()
        self.body = body


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[str, list[Seen]]]:
    """Serve; gives the URL without a path, and what is asked."""
    seen: list[Seen] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        assert request.method == "POST"
        body = await request.content.read()
        seen.append(Seen(request, body))
        return await answer(request, body)

    server = RawTestServer(handle)
    await server.start_server()
    try:
        yield f"http://127.0.0.1:{server.port}", seen
    finally:
        await server.close()


def always(status: int, text: str = "", **headers: str) -> Answer:
    """Answer everything with the same."""

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, text=text, headers=named)

    return answer


def exchange(
    answer: Answer, *batches: list[OutgoingEvent], target: str = "/hook", **options: Any
) -> tuple[list[list[Any]], list[Seen]]:
    """Send batches; return how it went, and what the server has seen."""

    async def run() -> tuple[list[list[Any]], list[Seen]]:
        async with serving(answer) as (url, seen):
            transport = HttpTransport(url + target, **options)
            try:
                return [await transport.send_batch(batch) for batch in batches], seen
            finally:
                await transport.close()

    return asyncio.run(run())


def fate(answer: Answer, **options: Any) -> Any:
    """Send one event; return how it went."""
    [[outcome]], _ = exchange(answer, [outgoing("s", 1)], **options)
    return outcome


def test_path_and_query_go_as_they_are_written() -> None:
    """Nothing is decoded, joined or sorted, and what is behind `#` stays here."""
    target = "/a%2fb/../%7Ex//?t=%41&u=a+b;&&x=%zz?"
    [[outcome]], [seen] = exchange(
        always(200), [outgoing("s", 1)], target=f"{target}#concurrency=2"
    )
    assert outcome is None
    assert seen.target == target


@pytest.mark.parametrize(("target", "sent"), [("", "/"), ("?x=1", "/?x=1"), ("/", "/")])
def test_without_a_path_it_is_the_root(target: str, sent: str) -> None:
    """A URL of a host only has the path `/`."""
    _, [seen] = exchange(always(200), [outgoing("s", 1)], target=target)
    assert seen.target == sent


def test_a_single_event_and_its_headers() -> None:
    """The body is the line; headers say what else there is, and its id is the key."""
    event = outgoing("ünï\n", 1)._replace(type="tool call")
    _, [seen] = exchange(always(204), [event])
    assert seen.body == event.line
    told = {name.lower(): value for name, value in seen.headers.items()}
    assert told.pop("host").startswith("127.0.0.1:")
    assert told == {
        "accept": "*/*",
        "accept-encoding": "identity",
        "content-length": str(len(event.line)),
        "content-type": "application/json",
        "idempotency-key": event.id,
        "user-agent": "eventlog-handler",
        "x-event-id": event.id,
        "x-event-timestamp": event.timestamp,
        "x-event-type": "tool call",
        "x-session-id": "%C3%BCn%C3%AF%0A",
    }


def test_a_long_session_id_fits_into_a_header() -> None:
    """It has 1,000 characters then, which differ for all that differ."""
    names = ["x" * 999, "x" * 1000, "x" * 1001]
    names.append(http._short(names[1]))
    _, seen = exchange(always(200), [outgoing(name, 1) for name in names])
    told = {each.headers["X-Session-Id"] for each in seen}
    assert len(told) == 4
    assert {len(each) for each in told} == {999, 1000}


@pytest.mark.parametrize(
    ("form", "kind", "body"),
    [("ndjson", "application/x-ndjson", b"%b\n%b"), ("json", "application/json", b"[%b,%b]")],
)
def test_a_batch_and_its_headers(form: str, kind: str, body: bytes) -> None:
    """One request has all lines; the same batch has the same key."""
    batch = [outgoing("a", 1), outgoing("b", 2)]
    _, [first, again, other] = exchange(always(200), batch, batch, batch[:1], format=form)
    assert first.body == again.body == body % (batch[0].line, batch[1].line)
    assert first.headers["Content-Type"] == kind
    key = first.headers["Idempotency-Key"]
    assert key == hashlib.sha256(f"{batch[0].id}\n{batch[1].id}".encode()).hexdigest()
    assert again.headers["Idempotency-Key"] == key != other.headers["Idempotency-Key"]
    assert "X-Event-Id" not in first.headers


def test_a_batch_goes_in_requests_of_a_size() -> None:
    """`request_bytes` limits them; after one that failed none follows."""
    batch = [outgoing("a", n, "x" * 400) for n in range(6)]

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        return web.Response(status=503 if b'"n":2' in body else 200)

    [outcomes], seen = exchange(answer, batch, format="ndjson", request_bytes=1100)
    assert [len(each.body.split(b"\n")) for each in seen] == [2, 2]
    assert outcomes[:2] == [None, None]
    assert len({id(each) for each in outcomes[2:]}) == 1


def test_a_body_over_a_megabyte() -> None:
    """A long line goes in one request, without a warning of the driver's."""
    event = outgoing("a", 1, "x" * 1_500_000)
    [[outcome]], [seen] = exchange(always(200), [event], max_event_bytes=2_000_000)
    assert outcome is None
    assert seen.body == event.line


def test_logins() -> None:
    """A token, or user and password, and whatever headers there are more."""
    batch = [outgoing("s", 1)]
    _, [seen] = exchange(always(200), batch, token="t0ken", headers={"X-Tenant": "7"})
    assert seen.headers["Authorization"] == "Bearer t0ken"
    assert seen.headers["X-Tenant"] == "7"
    _, [seen] = exchange(always(200), batch, username="user", password="ü:x")
    assert base64.b64decode(seen.headers["Authorization"][6:]).decode() == "user:ü:x"
    _, [seen] = exchange(always(200), batch, password="x")
    assert base64.b64decode(seen.headers["Authorization"][6:]) == b":x"
    _, [seen] = exchange(always(200), batch, headers={"AUTHORIZATION": "Own x"}, token="x")
    assert seen.headers.getall("Authorization") == ["Own x"]


def test_no_cookie_is_kept() -> None:
    """What a server sets it does not get back."""
    batch = [outgoing("s", 1)]
    _, [_, seen] = exchange(always(200, Set_Cookie="a=b; Path=/"), batch, batch)
    assert "Cookie" not in seen.headers


def test_signature_of_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example that libraries of Standard Webhooks test themselves with."""
    monkeypatch.setattr(http.time, "time", lambda: 1614265330.9)
    event = OutgoingEvent(b'{"test": 2432232314}', "msg_p5jXN8AQM9LWM0D4loKWxJek", "s", "t", "")
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    _, headers = HttpTransport(f"http://h/#secret={secret}")._request([event])
    assert headers["webhook-id"] == event.id
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_that_is_no_base64_is_the_key() -> None:
    """Batches are signed too, by any text."""
    batch = [outgoing("a", 1), outgoing("b", 2)]
    _, [seen] = exchange(always(200), batch, format="json", secret="päss")
    head = seen.headers
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + seen.body
    expected = base64.b64encode(http.hmac.digest("päss".encode(), signed, "sha256")).decode()
    assert head["webhook-signature"] == f"v1,{expected}"
    assert head["webhook-id"] == head["Idempotency-Key"]
    assert abs(int(head["webhook-timestamp"]) - time.time()) < 60


@pytest.mark.parametrize(
    ("statuses", "meaning"),
    [
        ((301, 304, 401, 403, 404, 405, 407, 408, 429, 500, 501, 503), TransportConnectionError),
        ((409, 425), TransportError),
        ((400, 410, 411, 413, 414, 415, 422, 431, 451), TransportRejectedError),
    ],
)
def test_statuses(statuses: tuple[int, ...], meaning: type[Exception]) -> None:
    """What is not the event's fault is tried for ever, what is the server's last word is not."""
    for status in statuses:
        outcome = fate(always(status))
        assert type(outcome) is meaning, status
        assert str(status) in str(outcome)


def test_a_conflict_of_a_batch_is_nobodys_fault() -> None:
    """409 holds back one event of `single`; of several none may be parked for it."""
    assert type(fate(always(409), format="ndjson")) is TransportConnectionError


def test_retry_after() -> None:
    """A server's wish for a pause: seconds or a date; anything else is none."""
    assert fate(always(429, Retry_After="7")).retry_after_seconds == 7
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 80 < fate(always(503, Retry_After=later)).retry_after_seconds <= 100
    past = "Sun, 06 Nov 1994 08:49:37 GMT"
    assert fate(always(503, Retry_After=past)).retry_after_seconds == 0
    assert fate(always(503, Retry_After="soon")).retry_after_seconds is None
    assert fate(always(503)).retry_after_seconds is None


def test_a_redirect_is_not_followed() -> None:
    """It says where from, and shows neither query nor login; nothing is sent to the other place."""
    answer = always(307, "to /x", Location="http://127.0.0.1:1/other?k=s3cret")
    [[error]], seen = exchange(answer, [outgoing("s", 1)], target="/hook?key=s3cret", password="pw")
    assert len(seen) == 1
    assert isinstance(error, TransportConnectionError)
    assert str(error).startswith("http://127.0.0.1:")
    assert "/hook answers 307, a redirect, which is not followed" in str(error)
    assert "s3cret" not in str(error)


def test_what_a_server_repeats_is_not_told() -> None:
    """Its words are cut, made printable, and have no secret of ours."""

    async def echo(request: web.BaseRequest, body: bytes) -> web.Response:
        head = request.headers
        text = f"\x1b[2J{head['Authorization']} {head['X-Api']}\n{request.raw_path} a b {'x' * 900}"
        return web.Response(status=400, text=text)

    login = base64.b64encode(b"user:s3cret pass").decode()
    secrets = [login, "s3cret", "t0ken", "k3y"]
    basic = {"username": "user", "password": "s3cret pass"}
    for more in (basic, {"token": "t0ken"}):
        error = fate(echo, target="/p?k=k3y%201", headers={"X-Api": "s3cret-too"}, **more)
        told = "".join(traceback.format_exception(error))
        assert not [each for each in secrets if each in told]
        assert "\x1b" not in str(error)
        assert str(error).startswith("HTTP 400 Bad Request:")
        assert "/p?*** a b xxx" in str(error)
        assert len(str(error)) <= 210


def test_an_answer_that_is_not_http() -> None:
    """It counts as no connection, and the query is not shown."""

    async def run() -> Any:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport = HttpTransport(f"http://127.0.0.1:{port}/?k=s3cret")
        [outcome] = await transport.send_batch([outgoing("s", 1)])
        await transport.close()
        server.close()
        return outcome

    error = asyncio.run(run())
    assert isinstance(error, TransportConnectionError)
    assert "no answer in HTTP" in str(error)
    assert "s3cret" not in "".join(traceback.format_exception(error))


def test_of_a_long_answer_only_the_beginning_is_read() -> None:
    """A server that never ends its answer has confirmed all the same."""

    async def endless(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 10_000)
        return response

    [[first], [second]], _ = exchange(endless, [outgoing("s", 1)], [outgoing("s", 2)])
    assert first is second is None


def test_sessions_go_side_by_side_and_each_in_order() -> None:
    """As many requests are in flight as `concurrency` says, and never two of one session."""
    at_once: dict[str, int] = {}
    most = 0
    full = asyncio.Event()

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        nonlocal most
        session = request.headers["X-Session-Id"]
        assert session not in at_once
        at_once[session] = 1
        most = max(most, len(at_once))
        if most == 3:
            full.set()
        await full.wait()
        del at_once[session]
        return web.Response()

    batch = [outgoing(f"s{n % 5}", n) for n in range(40)]
    [outcomes], seen = exchange(answer, batch, concurrency=3)
    assert outcomes == [None] * 40
    assert most == 3
    for session in range(5):
        got = [e.body for e in seen if e.headers["X-Session-Id"] == f"s{session}"]
        assert got == [e.line for e in batch[session::5]]


def test_a_failure_holds_back_its_session_only() -> None:
    """Later events of the session are not sent; those of others are, and so after a refusal."""

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        number = orjson.loads(body)["event"]["n"]
        return web.Response(status={1: 409, 3: 422}.get(number, 200))

    batch = [outgoing("a", n) for n in range(3)] + [outgoing("b", n) for n in range(3, 6)]
    [outcomes], seen = exchange(answer, batch)
    assert len(seen) == 5
    assert outcomes[0] is None
    assert type(outcomes[1]) is TransportError
    assert outcomes[1] is outcomes[2]
    assert type(outcomes[3]) is TransportRejectedError
    assert outcomes[4:] == [None, None]


def test_a_server_that_is_unwell_gets_nothing_more() -> None:
    """After 503 no request follows; those in flight fail as one, and the connection is given up."""
    together = asyncio.Event()
    seen: list[str] = []

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        session = request.headers["X-Session-Id"]
        seen.append(session)
        if session == "well":
            return web.Response()
        if len(seen) == 4:
            together.set()
        await together.wait()
        return web.Response(status=503)

    async def run() -> list[Any]:
        async with serving(answer) as (url, _):
            transport = HttpTransport(url, concurrency=2)
            sessions = ["well", *"abcdefgh"]
            outcomes = await transport.send_batch(
                [outgoing(s, n) for n in (1, 2) for s in sessions]
            )
            assert not transport.is_connected
            await transport.close()
            return outcomes

    outcomes = asyncio.run(run())
    assert len(seen) == 4
    failed = [each for each in outcomes if each is not None]
    assert len(failed) == 16
    assert len({id(each) for each in failed}) == 1
    assert isinstance(failed[0], TransportConnectionError)


@pytest.mark.parametrize("form", ["single", "json"])
def test_what_was_taken_before_the_time_is_over(form: str) -> None:
    """Of a batch for which the time does not suffice it is known what has arrived."""

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        if b'"n":3' in body:
            await asyncio.Event().wait()
        return web.Response()

    batch = [outgoing("a", n) for n in range(6)]
    [outcomes], _ = exchange(answer, batch, format=form, timeout_seconds=1, request_bytes=10)
    assert outcomes[:3] == [None] * 3
    assert {type(each) for each in outcomes[3:]} == {TransportTimeoutError}
    assert len({id(each) for each in outcomes[3:]}) == 1


def test_health_is_a_connection() -> None:
    """Nothing is posted to ask; where nobody listens it is not well."""

    async def run() -> None:
        async with serving(always(500)) as (url, seen):
            transport = HttpTransport(url)
            assert await transport.health_check() is True
            assert seen == []
        assert await transport.health_check() is False
        assert not transport.is_connected
        await transport.close()

    asyncio.run(run())


def test_tls_is_said_by_scheme_or_option() -> None:
    """Either way it is HTTPS, on its own port."""
    for transport in (HttpTransport("https://h/x"), HttpTransport("http://h/x#tls=true")):
        assert str(transport._url) == "https://h/x"
        assert transport.tls is not None
    assert str(HttpTransport("https://[::1]:8443/x")._url) == "https://[::1]:8443/x"


def test_the_name_has_no_secret() -> None:
    """It is the URL without user, password, query and options."""
    url = "https://user:pw@example.org/hook?key=s3cret#token=&concurrency=3"
    transport = HttpTransport(url.replace("token=&", ""))
    assert transport.name == "https://example.org/hook"
    assert transport.options.concurrency == 3
    assert "s3cret" not in repr(transport)
    assert "s3cret" not in repr(transport.options)
    assert HttpTransport("http://h/x#name=mine").name == "mine"


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("http://h/#formatt=json", {}, "did you mean 'format'"),
        ("http://h/#format=xml", {}, "write one of 'single', 'ndjson', 'json'"),
        ("http://a,b/", {}, "write one host"),
        ("http://h/ü", {}, "percent-encode"),
        ("http://h/?a b", {}, "percent-encode"),
        ("http://h/#headers=x", {}, "as a keyword"),
        ("http://h/", {"headers": {"a b": "x"}}, "as a keyword"),
        ("http://h/", {"headers": {"a": 1}}, "as a keyword"),
        ("http://h/", {"headers": {"a": "s3cret\r\nb: c"}}, "printable ASCII"),
        ("http://h/", {"token": "s3crét"}, "printable ASCII"),
        ("http://u:p@h/", {"token": "s3cret"}, "one Authorization"),
        ("http://h/#secret=whsec_s3cret!", {}, "no base64"),
        ("http://h/", {"secret": 5}, "secret must be a str"),
        ("http://h/#tls_ca_file=/x", {}, "add tls=true"),
        ("https://h/#tls=false", {}, "https means TLS"),
    ],
)
def test_options_that_cannot_be(url: str, options: dict[str, Any], said: str) -> None:
    """A wrong option is told where it is configured, and no secret with it."""
    with pytest.raises((TypeError, ValueError), match=said) as caught:
        HttpTransport(url, **options)
    assert "s3cret" not in str(caught.value)
