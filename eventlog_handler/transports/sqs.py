"""Amazon SQS: `sqs://key:secret@queue?region=eu-west-1`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from eventlog_handler._config import setting
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
from eventlog_handler.transports._url import escape_token, header_text, within
from eventlog_handler.typing import OutgoingEvent

with needs("sqs"):
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from botocore import exceptions

REQUEST_EVENTS = 10
REQUEST_BYTES = 1024 * 1024
"""SQS takes no more in one request."""
ATTRIBUTE_BYTES = 1024
"""What an event's attributes take, about; where they take more, a request is divided."""
TOKEN_CHARACTERS = 128
"""Of a group or deduplication id, at most."""
REQUESTS = 8
"""In flight at a time. Where an answer takes 20 ms: 1 sends 400 events a second, 8 2,500."""
_REGION = re.compile(r"(?:^|\.)sqs(?:-fips)?\.([a-z]+(?:-[a-z]+)+-[0-9]+)\.")
_QUEUE = re.compile(r"([0-9]{12})/([A-Za-z0-9_-]{1,80}(?:\.fifo)?)")
_NOT_TAKEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""SQS takes what XML 1.0 does."""
_REFUSED = re.compile("InvalidMessageContents|BatchRequestTooLong|must be shorter than")
"""Answers that are about a message. All others, throttling among them, may be called the sender's
fault too (`SenderFault`), and are not the event's."""


@dataclass(frozen=True, repr=False)
class SqsOptions(RemoteOptions):
    """Options of `SqsTransport`.

    Args:
        region: Else from a queue's URL, else botocore's own (environment, profile).
        endpoint_url: Another address of the service: of a VPC, of a server for tests. With
            `http://`, say `tls=false`.
        session_token: Of credentials that are for a time, beside username and password.
    """

    region: str | None = setting(None, text_or_none)
    endpoint_url: str | None = setting(None, text_or_none)
    session_token: str | None = setting(None, secret_or_none)


class _Connection(NamedTuple):
    client: Any
    queue_url: str


class SqsTransport(RemoteTransport):
    """Sends each event as a message (`SendMessageBatch`), ten in a request.

    A message's body is exactly the session file's line; the attributes `id` (the same at every
    redelivery), `session_id`, `type` and `timestamp` are printable ASCII, all else percent-encoded,
    and left out where empty. SQS has the event once the answer names it as successful.

    Where a queue's name ends in `.fifo`, the group is the session: percent-encoded, and where that
    has 128 characters or more, cut to that, with the SHA-256 of the whole. SQS drops what comes
    again within five minutes, by the event's id, encoded likewise.

    The URL's host is the queue's name; or host and path are those of the queue's own URL. User and
    password are access key id and secret; without them botocore finds its own. It takes the
    permissions `sqs:GetQueueUrl` and `sqs:SendMessage`.
    """

    ports: ClassVar[dict[str, int]] = {"sqs": 0}
    tls_schemes: ClassVar[tuple[str, ...]] = ("sqs",)
    options_type: ClassVar[type[RemoteOptions]] = SqsOptions
    destination: ClassVar[tuple[str, ...]] = ("region",)
    loggers: ClassVar[tuple[str, ...]] = ("aiobotocore", "botocore", "aiohttp")
    errors: ClassVar[Meanings] = (
        (exceptions.ReadTimeoutError, TransportTimeoutError),
        (exceptions.ConnectTimeoutError, TransportTimeoutError),
        (exceptions.BotoCoreError, TransportConnectionError),
        # Whatever SQS answers to a request: no such queue, no permission, throttled.
        (exceptions.ClientError, TransportConnectionError),
    )
    options: SqsOptions

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        host, port = self.only_host()
        self._endpoint = self.options.endpoint_url
        scheme = "https" if self.options.tls else "http"
        if self.address.path:
            found = _QUEUE.fullmatch(self.address.path)
            if not found:
                raise ValueError(f"{self.name}: the path of a queue's URL is account/queue")
            self._queue = {"QueueOwnerAWSAccountId": found[1], "QueueName": found[2]}
            self._endpoint = self._endpoint or f"{scheme}://{host}" + (f":{port}" if port else "")
        elif port:
            raise ValueError(f"{self.name}: a queue's name has no port; that is for endpoint_url")
        else:
            self._queue = {"QueueName": host}
        if self._endpoint and not self._endpoint.startswith(f"{scheme}://"):
            raise ValueError(f"{self.name}: endpoint_url is https://…, or http://… with tls=false")
        login = (self.options.username, self.options.password)
        if None in login and any((*login, self.options.session_token)):
            raise ValueError(f"{self.name}: give access key id and secret together, or neither")
        self._fifo = self._queue["QueueName"].endswith(".fifo")

    def _in_url(self) -> dict[str, str]:
        [(host, _), *_] = self.address.hosts
        found = _REGION.search(host) if self.address.path else None
        return {**({"region": found[1]} if found else {}), **super()._in_url()}

    def _refused(self, event: OutgoingEvent) -> Exception | None:
        found = _NOT_TAKEN.search(event.line.decode("utf-8", "surrogateescape"))
        if event.line and not found:
            return super()._refused(event)
        what = f"has {found[0]!a}" if found else "is empty"
        return TransportRejectedError(f"the line {what}, which SQS does not take")

    async def _open(self) -> _Connection:
        options = self.options
        certificate = (options.tls_cert_file, options.tls_key_file)
        client = await (
            AioSession()
            .create_client(
                "sqs",
                region_name=options.region,
                endpoint_url=self._endpoint,
                use_ssl=options.tls,
                # Without TLS no certificates are read either, which takes a thread of its own.
                verify=options.tls_ca_file if options.tls else False,
                aws_access_key_id=options.username,
                aws_secret_access_key=options.password,
                aws_session_token=options.session_token,
                config=AioConfig(
                    connect_timeout=options.connect_timeout_seconds,
                    read_timeout=options.timeout_seconds,
                    max_pool_connections=REQUESTS,
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    client_cert=certificate if all(certificate) else certificate[0],
                ),
            )
            .__aenter__()
        )
        try:
            return _Connection(client, await self._queue_url(client))
        except BaseException:
            await client.close()
            raise

    async def _queue_url(self, client: Any) -> str:
        answer = await client.get_queue_url(**self._queue)
        return str(answer["QueueUrl"])

    async def _deliver(self, client: _Connection, batch: Sequence[OutgoingEvent]) -> Outcomes:
        """Send several requests at a time, of which no two have events of one session."""
        failures: list[BaseException] = []

        async def request(events: Sequence[OutgoingEvent]) -> Outcomes:
            if failures:
                raise failures[0]
            try:
                outcomes = await self._request(client, events)
            except Exception as error:
                failures.append(error)
                raise
            failures.extend(e for e in outcomes if isinstance(e, TransportConnectionError))
            return outcomes

        lanes: list[list[OutgoingEvent]] = [
            [] for _ in range(min(REQUESTS, -(-len(batch) // REQUEST_EVENTS)))
        ]
        lane_of: dict[str, int] = {}
        for event in batch:
            if event.session_id not in lane_of:
                lane_of[event.session_id] = min(range(len(lanes)), key=lambda n: len(lanes[n]))
            lanes[lane_of[event.session_id]].append(event)
        answers = await asyncio.gather(
            *(
                self._in_pieces(lane, REQUEST_EVENTS, REQUEST_BYTES, request, ATTRIBUTE_BYTES)
                for lane in lanes
            )
        )
        by_lane = [iter(each) for each in answers]
        return [next(by_lane[lane_of[event.session_id]]) for event in batch]

    async def _request(self, to: _Connection, events: Sequence[OutgoingEvent]) -> Outcomes:
        entries = [self._entry(str(number), event) for number, event in enumerate(events)]
        try:
            answer = await to.client.send_message_batch(QueueUrl=to.queue_url, Entries=entries)
        except exceptions.ClientError as error:
            if not _REFUSED.search(str(error)):
                raise
            if len(events) == 1:
                return [TransportRejectedError(str(error))]
            # One of them is refused, and with it the request: each by itself.
            return await self._in_pieces(
                events, 1, REQUEST_BYTES, lambda one: self._request(to, one)
            )
        outcomes: dict[str, Exception | None] = {
            e["Id"]: None for e in answer.get("Successful", ())
        }
        failures: dict[str, Exception] = {}
        for each in answer.get("Failed", ()):
            text = f"{each.get('Code')}: {each.get('Message')}"
            kind = TransportRejectedError if _REFUSED.search(text) else TransportConnectionError
            outcomes[each["Id"]] = failures.setdefault(text, kind(text))
        unknown = TransportConnectionError("SQS did not say whether it has the message")
        return [outcomes.get(entry["Id"], unknown) for entry in entries]

    def _entry(self, number: str, event: OutgoingEvent) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "Id": number,
            "MessageBody": event.line.decode(),
            "MessageAttributes": {
                name: {"DataType": "String", "StringValue": text}
                for name, value in event.metadata.items()
                if (text := header_text(value))
            },
        }
        if self._fifo:
            entry["MessageGroupId"] = _token(event.session_id)
            entry["MessageDeduplicationId"] = _token(event.id)
        return entry

    async def _ask(self, client: _Connection) -> None:
        await self._queue_url(client.client)

    async def _shut(self, client: _Connection) -> None:
        await client.client.close()


def _token(text: str) -> str:
    """Return a text as a group or deduplication id."""
    return within(TOKEN_CHARACTERS, escape_token(text))
