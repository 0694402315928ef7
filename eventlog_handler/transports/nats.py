"""NATS JetStream: `nats://user:password@a:4222,b:4222?subject=eventlog.{session_id}`."""

from __future__ import annotations

import asyncio
import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import orjson

from eventlog_handler._config import check_boolean, check_text, setting
from eventlog_handler.exceptions import (
    TransportConnectionError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports._remote import (
    Meanings,
    Outcomes,
    RemoteOptions,
    RemoteTransport,
    needs,
    secret_or_none,
    text_or_none,
)
from eventlog_handler.transports._url import Template, escape_token, header_text, within
from eventlog_handler.typing import OutgoingEvent

with needs("nats"):
    from nats import errors
    from nats.aio.client import Client

OTHER_STREAM = 10060
"""JetStream's error code: the subject's stream is not the expected one."""
TOO_LARGE = (10054, 10097)
"""JetStream's error codes: a message, or its headers, over what the stream takes."""
TOKEN_CHARACTERS = 256
"""In a subject, at most, for the sake of the server, whose line ends at 4,096 bytes."""
SOMETHING = OutgoingEvent(b"", "", "health", "health", "")
Answer = bytes | BaseException
"""What has come for a message: the payload, or why none will come."""


@dataclass(frozen=True, repr=False)
class NatsOptions(RemoteOptions):
    """Options of `NatsTransport`.

    Args:
        subject: Where events are published; `{session_id}` and `{type}` may stand in it, each as
            one token.
        stream: The stream that has to take them; None leaves that to the subject.
        token: Logs in instead of user and password.
        credentials_file: Likewise, a `.creds` file; read anew for each connection.
        inbox_prefix: Where acknowledgements arrive, for a user that may not listen to `_INBOX.>`.
        tls_first: Whether TLS comes before the server's first line (its `handshake_first`).
    """

    subject: str = setting("eventlog.{session_id}", check_text)
    stream: str | None = setting(None, text_or_none)
    token: str | None = setting(None, secret_or_none)
    credentials_file: str | None = setting(None, text_or_none)
    inbox_prefix: str = setting("_INBOX", check_text)
    tls_first: bool = setting(False, check_boolean)


class NatsTransport(RemoteTransport):
    """Publishes events to JetStream, a batch at once; the stream acknowledges each.

    A message is exactly the session file's line, with the headers `id`, `session_id`, `type` and
    `timestamp`, percent-encoded. Its `Nats-Msg-Id` is the id too: within the stream's duplicate
    window (two minutes by default) what comes again is not stored again.

    In the subject, whatever is no letter, digit or one of `_-~` is percent-encoded, and no text at
    all is `%`. A token of 256 characters or more is cut to that, and ends with the SHA-256 of the
    whole.

    `health_check` publishes an empty message that expects a stream of an impossible name, so that
    none stores it: this needs no other permission than events do, and works where the stream
    belongs to another account or domain. Subscribers that are no consumers of the stream see it.
    """

    ports: ClassVar[dict[str, int]] = {"nats": 4222}
    options_type: ClassVar[type[RemoteOptions]] = NatsOptions
    destination: ClassVar[tuple[str, ...]] = ("subject",)
    loggers: ClassVar[tuple[str, ...]] = ("nats",)
    errors: ClassVar[Meanings] = (
        (errors.TimeoutError, TransportTimeoutError),
        # Connection, login, permissions.
        (errors.Error, TransportConnectionError),
    )
    options: NatsOptions

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._subject = Template("subject", self.options.subject)
        # What health_check asks for: where the last batch went.
        self._latest = self._subject.fill(SOMETHING)
        self._check()
        hosts = self.address._replace(path="").shown.partition("://")[2]
        self._servers = [f"nats://{each}" for each in hosts.split(",")]

    def _check(self) -> None:
        options = self.options
        legal = self._latest.isascii() and self._latest.isprintable()
        if not legal or set(" *>") & set(self._latest) or not all(self._latest.split(".")):
            raise ValueError(
                f"subject={options.subject!r} cannot be published to: write tokens of printable "
                "ASCII with dots between them, without * and >, such as eventlog.{session_id}"
            )
        if self.address.path:
            raise ValueError(f"{self.name}: write no path; the subject is an option: ?subject=…")
        if (options.username is None) != (options.password is None):
            raise ValueError(
                "user and password of a NATS server go together; a token is an option: ?token=…"
            )
        if options.tls_first and not options.tls:
            raise ValueError(f"{self.name} has tls_first and does not use TLS: add tls=true")
        if options.credentials_file is not None:
            with needs("nats"):
                importlib.import_module("nkeys")

    async def _open(self) -> _Connection:
        options = self.options
        connection = _Connection()
        try:
            await connection.open(
                servers=self._servers,
                user=options.username,
                password=options.password,
                token=options.token,
                user_credentials=self._credentials(),
                inbox_prefix=options.inbox_prefix,
                name="eventlog_handler",
                tls=self.tls,
                tls_handshake_first=options.tls_first,
                # One server that hangs must not use up the time of the others.
                connect_timeout=options.connect_timeout_seconds / len(self._servers),
                allow_reconnect=False,
                # Fewer mean for ever; each server is tried twice, without a pause.
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                # Nothing is kept while there is no connection.
                pending_size=0,
            )
        except BaseException:
            await self._say_goodbye(connection)
            raise
        return connection

    def _credentials(self) -> str | None:
        path = self.options.credentials_file
        if path is not None:
            text = Path(path).read_bytes()
            # In a file without them the driver looks for them without end.
            if b"BEGIN NATS USER JWT" not in text or b"BEGIN USER NKEY SEED" not in text:
                raise TransportConnectionError(f"credentials_file={path!r} has no JWT and seed")
        return path

    async def _deliver(self, connection: _Connection, batch: Sequence[OutgoingEvent]) -> Outcomes:
        self._latest = self._subject.fill(batch[0], _token)
        sent = [
            await connection.publish(
                self._subject.fill(event, _token), event.line, self._headers(event)
            )
            for event in batch
        ]
        await asyncio.wait(sent)
        answers = [each.result() for each in sent]
        outcomes = {answer: _outcome(answer) for answer in set(answers)}
        return [outcomes[answer] for answer in answers]

    def _headers(self, event: OutgoingEvent) -> dict[str, str]:
        headers = {name: header_text(value) for name, value in event.metadata.items()}
        headers["Nats-Msg-Id"] = headers["id"]
        if self.options.stream is not None:
            headers["Nats-Expected-Stream"] = self.options.stream
        return headers

    async def _ask(self, connection: _Connection) -> None:
        # A stream's name has no dot.
        headers = {"Nats-Expected-Stream": "no.stream"}
        answer = await (await connection.publish(self._latest, b"", headers))
        if isinstance(answer, BaseException):
            raise answer
        code, text, stream = _said(answer)
        if code != OTHER_STREAM or self.options.stream not in (None, stream):
            raise TransportConnectionError(f"{text or 'taken'}, by the stream {stream}")

    async def _shut(self, connection: _Connection) -> None:
        await connection.close()


class _Client(Client):
    """The driver's client, kept from logging in where others can listen."""

    def _connect_command(self) -> bytes:
        # The driver uses TLS only where the server's first line asks for it, and that comes in
        # plain text: anybody on the way could change it.
        encrypted = self.options["tls_handshake_first"] or self._server_info.get("tls_required")
        if "tls" in self.options and not encrypted:
            raise errors.SecureConnWantedError
        return super()._connect_command()


class _Connection:
    """A client, and who waits for which answer.

    Neither `JetStreamContext.publish`, which costs a task and a timer for each message, nor its
    `publish_async`, which waits for ever where the answer is an error.
    """

    def __init__(self) -> None:
        self.client = _Client()
        self._error: BaseException | None = None
        self._inbox = ""
        self._listening: Any = None
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[Answer]] = {}

    async def open(self, **options: Any) -> None:
        """Connect, log in, and listen for answers."""
        try:
            await self.client.connect(error_cb=self._note, **options)
        except errors.NoServersError:
            # Which says less than what was noted first.
            raise self._error or errors.NoServersError from None
        self._error = None
        # Whatever ends a connection ends this task; the driver's callbacks are not always called.
        reading = self.client._reading_task
        assert reading is not None
        reading.add_done_callback(self._over)
        self._inbox = self.client.new_inbox()
        self._listening = await self.client.subscribe(f"{self._inbox}.*", cb=self._take)
        # That this user may not listen there, the server says before it answers to the second one;
        # the first overtakes the subscription, which another task of the driver's writes.
        await self.client.flush()
        await self.client.flush()
        self._raise_error()

    async def publish(
        self, subject: str, payload: bytes, headers: Mapping[str, str]
    ) -> asyncio.Future[Answer]:
        """Send a message; return its answer to be."""
        self._raise_error()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        size = len(payload) + sum(len(name) + len(text) + 4 for name, text in headers.items()) + 12
        most = self.client.max_payload
        if size > most:
            # The server would close the connection.
            answer.set_result(
                TransportRejectedError(f"with headers {size} bytes, the server's limit is {most}")
            )
            return answer
        reply = f"{self._inbox}.{next(self._numbers)}"
        self._waiting[reply] = answer
        await self.client.publish(subject, payload, reply=reply, headers=dict(headers))
        return answer

    async def close(self) -> None:
        """Close the connection, even if the server hangs."""
        writer = getattr(self.client._transport, "_io_writer", None)
        if writer is not None:
            # What has not been taken by now would be waited for, and so would the end of TLS.
            writer.transport.abort()
        # After a handshake that failed the driver would wait for ever, and it has no tasks yet.
        if self.client.is_connected:
            await self.client.close()
        if self._listening is not None:
            # Up to 2.14 the driver leaves this task behind where the server has gone.
            self._listening._stop_processing()

    async def _take(self, message: Any) -> None:
        answer = self._waiting.pop(message.subject, None)
        if answer is not None:
            answer.set_result(message.data)

    async def _note(self, error: Exception) -> None:
        """Hear from the driver of a failed attempt, a broken connection, a missing permission."""
        self._fail(error)

    def _over(self, reading: asyncio.Task[None]) -> None:
        error = None if reading.cancelled() else reading.exception()
        self._fail(error or self.client.last_error or errors.ConnectionClosedError())

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_result(self._error)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _Said(NamedTuple):
    code: int | None
    """Of the error; 0 where the stream has the event."""
    text: str
    stream: str | None


def _said(answer: bytes) -> _Said:
    """Return what an answer says."""
    if not answer:
        return _Said(None, "no JetStream stream takes the subject now", None)
    try:
        said = orjson.loads(answer)
        error = said.get("error")
        if error is None:
            return _Said(0, "", said["stream"])
        return _Said(error.get("err_code"), error["description"], said.get("stream"))
    except (ValueError, LookupError, AttributeError, TypeError):
        return _Said(None, "what takes the subject is not JetStream", None)


def _outcome(answer: Answer) -> BaseException | None:
    if isinstance(answer, BaseException):
        return answer
    code, text, _ = _said(answer)
    if code == 0:
        return None
    kind = TransportRejectedError if code in TOO_LARGE else TransportConnectionError
    return kind(f"{text} (JetStream error {code})" if code else text)


def _token(text: str) -> str:
    return within(TOKEN_CHARACTERS, escape_token(text) or "%")
