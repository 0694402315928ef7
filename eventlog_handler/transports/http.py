"""HTTP: `https://user:password@host/path?what=the&server=gets#format=single&concurrency=8`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import re
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

import anyio

from eventlog_handler._config import check_one_of, check_one_or_more, setting
from eventlog_handler.exceptions import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports._remote import (
    LOST,
    Meanings,
    Outcomes,
    RemoteOptions,
    RemoteTransport,
    needs,
    secret_or_none,
)
from eventlog_handler.transports._url import header_text, parse_options, within
from eventlog_handler.typing import OutgoingEvent

with needs("http"):
    from aiohttp import (
        ClientError,
        ClientResponse,
        ClientResponseError,
        ClientSession,
        ClientTimeout,
        DummyCookieJar,
        TCPConnector,
    )
    from yarl import URL

ANSWER_BYTES = 65_536
"""No more of an answer is read."""
SAID_CHARACTERS = 200
"""No more of it is told."""
LONGEST_HEADER = 1000
"""Characters of a value: servers take 4,000 to 8,000 for a line, or for all of them."""
LARGE_BYTES = 1_048_576
"""Above it aiohttp warns of a body that is no file."""
BEFORE_THE_END = 0.9
"""Part of a batch's time after which requests are given up, while it can still be told which."""
NOT_THE_EVENTS = (401, 403, 404, 405, 407, 408, 429)
"""Statuses below 500 that say nothing of the event: login, address, pace."""
NOT_NOW = (409, 425)
"""Statuses that hold one event back."""
BODIES = {
    "ndjson": ("application/x-ndjson", b"", b"\n", b""),
    "json": ("application/json", b"[", b",", b"]"),
}


class PartlyRejectedError(TransportRejectedError):
    """Some events of a request are refused and the others taken; which ones is not said."""


def _headers(name: str, value: Any) -> dict[str, str]:
    """Check additional headers, whose values are shown nowhere."""
    pairs = dict(value) if isinstance(value, Mapping) else {"": value}
    if all(isinstance(each, str) for pair in pairs.items() for each in pair) and all(
        re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", each, re.ASCII) for each in pairs
    ):
        return pairs
    raise ValueError(f"{name} must be a mapping of headers' names to str, as a keyword")


@dataclass(frozen=True, repr=False)
class RequestOptions(RemoteOptions):
    """Options of every transport over HTTP; in its URL they stand behind `#`.

    Args:
        token: Sent as `Authorization: Bearer …`.
        headers: More headers of every request, a mapping; not in URLs, and shown nowhere.
        request_bytes: The largest body of a request with several events.
    """

    token: str | None = setting(None, secret_or_none)
    headers: Mapping[str, str] | None = setting(None, _headers)
    request_bytes: int = setting(1_000_000, check_one_or_more)


@dataclass(frozen=True, repr=False)
class HttpOptions(RequestOptions):
    """Options of `HttpTransport`.

    Args:
        format: `single`: a request for each event, whose body is exactly its line. `ndjson` and
            `json`: one for a batch, lines with line feeds between them or in a JSON array.
        concurrency: Requests in flight for `single`; never two of one session.
        secret: Signs requests as the Standard Webhooks specification says
            (github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md): base64
            behind `whsec_`, else the key itself.
    """

    format: str = setting("single", check_one_of("single", *BODIES))
    concurrency: int = setting(8, check_one_or_more)
    secret: str | None = setting(None, secret_or_none)


class HttpTransport(RemoteTransport):
    """Posts events to a URL, whose path and query go to the server as they are.

    `Idempotency-Key` is the event's id; of a batch it is the SHA-256 of its ids, so that the same
    batch has the same key. Single events have `X-Event-Id`, `X-Session-Id`, `X-Event-Type` and
    `X-Event-Timestamp` too, percent-encoded but for printable ASCII. What has 1,000 characters or
    more then is cut to 1,000, the end of which is `~` and the SHA-256 of the whole.

    A status of 2xx confirms. What a request with several events is refused for may be one event's
    fault, so it is sent again in halves. Redirects are not followed.
    """

    ports: ClassVar[dict[str, int]] = {"http": 0, "https": 0}
    tls_schemes: ClassVar[tuple[str, ...]] = ("https",)
    options_type: ClassVar[type[RemoteOptions]] = HttpOptions
    loggers: ClassVar[tuple[str, ...]] = ("aiohttp.client",)
    errors: ClassVar[Meanings] = (
        (asyncio.TimeoutError, TransportTimeoutError),
        (ClientError, TransportConnectionError),
    )
    default_path: ClassVar[str] = "/"
    extra_bytes: ClassVar[int] = 1
    """Of a request, for each event beside its line."""
    options: Any

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        if self.address.scheme == "https" and not self.tls:
            raise ValueError(f"{self.name}: https means TLS; write http instead of tls=false")
        host, port = self.only_host()
        self._host, self._port = host, port or (443 if self.tls else 80)
        authority = f"[{host}]" if ":" in host else host
        scheme = "https" if self.tls else "http"
        path, query = self._target(url)
        self._url = URL(f"{scheme}://{authority}:{self._port}{path}{query}", encoded=True)
        self._single = getattr(self.options, "format", None) == "single"
        self._headers = self._headers_of_all()
        self._key = self._signing_key()

    def _in_url(self) -> dict[str, str]:
        return parse_options(self.address.fragment)

    def _target(self, url: str) -> tuple[str, str]:
        """Return path and query, exactly as they are written."""
        rest = url.partition("://")[2].partition("#")[0]
        rest, mark, query = rest.partition("?")
        _, slash, path = rest.partition("/")
        if not re.fullmatch("[!-~]*", path + query):
            raise ValueError(f"{self.name}: percent-encode what is no ASCII in path and query")
        return (slash + path if path else self.default_path), mark + query

    def _headers_of_all(self) -> dict[str, str]:
        options = self.options
        # An answer's body is only read to be told: a compressed one can be a bomb.
        headers = {"user-agent": "eventlog-handler", "accept-encoding": "identity"}
        if options.token is not None:
            if options.username or options.password:
                raise ValueError(f"{self.name} has a token and a user: there is one Authorization")
            headers["authorization"] = f"Bearer {options.token}"
        elif options.username or options.password:
            login = f"{options.username or ''}:{options.password or ''}".encode()
            headers["authorization"] = f"Basic {base64.b64encode(login).decode()}"
        headers |= {name.lower(): value for name, value in (options.headers or {}).items()}
        if not all(re.fullmatch("[ -~]*", value) for value in headers.values()):
            raise ValueError(f"{self.name}: token and headers take printable ASCII only")
        return headers

    def _signing_key(self) -> bytes | None:
        secret = getattr(self.options, "secret", None)
        if secret is None or not secret.startswith("whsec_"):
            return None if secret is None else secret.encode()
        try:
            return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:
            raise ValueError(f"{self.name}: what follows whsec_ in secret is no base64") from None

    async def _open(self) -> ClientSession:
        # Before there is a session: there may be no server.
        await self._reach()
        return ClientSession(
            # As many connections as there are requests, which are counted elsewhere.
            connector=TCPConnector(limit=0, ssl=self.tls or True),
            headers=self._headers,
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
            trust_env=False,
        )

    async def _reach(self) -> None:
        """Open a connection and close it.

        HTTP has no way to ask whether an event would be taken that servers know: to HEAD or OPTIONS
        one that takes events well may answer anything, or nothing.
        """
        _, writer = await asyncio.open_connection(
            self._host, self._port, ssl=self.tls, happy_eyeballs_delay=0.25
        )
        writer.transport.abort()

    async def _deliver(self, client: ClientSession, batch: Sequence[OutgoingEvent]) -> Outcomes:
        deadline = anyio.current_time() + BEFORE_THE_END * float(self.options.timeout_seconds)
        if self._single:
            return await self._singly(client, batch, deadline)
        return await self._together(client, batch, deadline, len(batch))

    async def _singly(
        self, client: ClientSession, batch: Sequence[OutgoingEvent], deadline: float
    ) -> Outcomes:
        """Send each event in a request of its own, those of a session one after the other."""
        outcomes: list[BaseException | None] = [None] * len(batch)
        sessions: dict[str, list[int]] = {}
        for index, event in enumerate(batch):
            sessions.setdefault(event.session_id, []).append(index)
        waiting = iter(sessions.values())
        lost: Exception | None = None

        async def work() -> None:
            nonlocal lost
            for indices in waiting:
                # What fails one event of a session holds back its later ones.
                error: Exception | None = None
                for index in indices:
                    outcomes[index] = error = error or lost
                    if error is not None:
                        continue
                    try:
                        await self._post(client, [batch[index]], deadline)
                    except TransportRejectedError as refusal:
                        outcomes[index] = refusal
                    except Exception as failure:
                        error = self._translated(failure)
                        if isinstance(error, LOST):
                            # One for all, so that it counts once.
                            lost = error = lost or error
                        outcomes[index] = error

        async with anyio.create_task_group() as workers:
            for _ in range(min(self.options.concurrency, len(sessions))):
                workers.start_soon(work)
        return outcomes

    async def _together(
        self,
        client: ClientSession,
        batch: Sequence[OutgoingEvent],
        deadline: float,
        most_events: int,
    ) -> Outcomes:
        """Send events in as few requests as they fit in; in smaller ones what is refused."""

        async def send(piece: Sequence[OutgoingEvent]) -> Outcomes:
            try:
                await self._post(client, piece, deadline)
            except TransportRejectedError as error:
                if len(piece) == 1:
                    return [error]
                most = 1 if isinstance(error, PartlyRejectedError) else (len(piece) + 1) // 2
                return await self._together(client, piece, deadline, most)
            return [None] * len(piece)

        most_bytes = self.options.request_bytes
        return await self._in_pieces(batch, most_events, most_bytes, send, self.extra_bytes)

    async def _post(
        self, client: ClientSession, batch: Sequence[OutgoingEvent], deadline: float
    ) -> None:
        """Send a request; return once the server has taken all events in it."""
        body, headers = self._request(batch)
        data = body if len(body) < LARGE_BYTES else io.BytesIO(body)
        with anyio.CancelScope(deadline=deadline):
            try:
                async with client.post(
                    self._url, data=data, headers=headers, allow_redirects=False
                ) as answer:
                    said = await _beginning(answer)
            except ClientResponseError as error:
                # Its own text has the URL, with the query.
                raise TransportConnectionError(f"no answer in HTTP: {error.message}") from None
            self._check(batch, answer, said)
            return
        raise TransportTimeoutError("no answer before the batch's time was over")

    def _request(self, batch: Sequence[OutgoingEvent]) -> tuple[bytes, dict[str, str]]:
        """Return a request's body and headers."""
        if self._single:
            [event] = batch
            key, kind, body = _short(event.id), "application/json", event.line
            headers = {
                "X-Event-Id": key,
                "X-Session-Id": _short(event.session_id),
                "X-Event-Type": _short(event.type),
                "X-Event-Timestamp": _short(event.timestamp),
            }
        else:
            kind, begin, between, end = BODIES[self.options.format]
            key = hashlib.sha256("\n".join(e.id for e in batch).encode()).hexdigest()
            body, headers = begin + between.join(e.line for e in batch) + end, {}
        headers |= {"Content-Type": kind, "Idempotency-Key": key}
        if self._key is not None:
            now = str(int(time.time()))
            signed = hmac.new(self._key, f"{key}.{now}.".encode() + body, "sha256").digest()
            headers["webhook-id"], headers["webhook-timestamp"] = key, now
            headers["webhook-signature"] = f"v1,{base64.b64encode(signed).decode()}"
        return body, headers

    def _check(self, batch: Sequence[OutgoingEvent], answer: ClientResponse, said: bytes) -> None:
        """Raise unless an answer confirms."""
        status = answer.status
        if 200 <= status < 300:
            return
        meaning: type[TransportError] = TransportConnectionError
        if 300 <= status < 400:
            raise meaning(
                f"{self.address.shown} answers {status}, a redirect, which is not followed: "
                "configure the address that it leads to"
            )
        if status in NOT_NOW and self._single:
            # Of several events it is not known whose fault it is; none may be parked for it.
            meaning = TransportError
        elif 400 <= status < 500 and status not in (*NOT_THE_EVENTS, *NOT_NOW):
            meaning = TransportRejectedError
        told = self._told(f"{answer.reason}: {said.decode(errors='replace')}")
        seconds = _retry_after(answer.headers.get("Retry-After", ""), time.time())
        raise meaning(f"HTTP {status} {told}", retry_after_seconds=seconds)

    def _told(self, text: str) -> str:
        """Return what may be told of a server's words."""
        printable = "".join(each if each.isprintable() else " " for each in text)
        return self._without_secrets(printable)[:SAID_CHARACTERS].strip()

    def _without_secrets(self, text: str) -> str:
        """Hide what a server may repeat of the request, too."""
        query = self._url.raw_query_string
        login = self._headers.get("authorization", "").partition(" ")[2]
        more = (self.options.headers or {}).values()
        for secret in (query, urllib.parse.unquote(query), login, *more):
            if secret:
                text = text.replace(secret, "***")
        return super()._without_secrets(text)

    async def _ask(self, client: ClientSession) -> None:
        await self._reach()

    async def _shut(self, client: ClientSession) -> None:
        await client.close()


async def _beginning(answer: ClientResponse) -> bytes:
    """Return the first bytes of an answer; of a longer one the connection is not used again."""
    read = b""
    while len(read) < ANSWER_BYTES and (chunk := await answer.content.read(ANSWER_BYTES)):
        read += chunk
    return read


def _short(text: str) -> str:
    return within(LONGEST_HEADER, header_text(text))


def _retry_after(value: str, now: float) -> float | None:
    """Return for how many seconds a server asks to be left alone (RFC 9110, 10.2.3)."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return None
