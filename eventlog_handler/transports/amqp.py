"""RabbitMQ (AMQP 0-9-1): `amqp://user:password@host:5672/vhost?exchange=…&routing_key=eventlog`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from eventlog_handler._config import check_boolean, check_one_or_more, check_text, setting
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
)
from eventlog_handler.transports._url import Template, escape_token, header_text, within
from eventlog_handler.typing import OutgoingEvent

with needs("amqp"):
    import aio_pika
    from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelPreconditionFailed

T = TypeVar("T")
NAME = re.compile(r"[a-zA-Z0-9_.:@#,/+ -]{0,255}")
"""The exchanges and queues that the driver takes."""
LONGEST_NAME = 255
"""Bytes of a routing key and of a message's id; the protocol has one byte for their length."""
LONGEST_WORD = 100
"""Characters that a field takes in a routing key."""
LONGEST_HEADER = 1000
"""Characters of a value: all headers have to fit in one frame, which has 128 KiB."""


def _exchange(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and NAME.fullmatch(value)):
        return value or None
    raise ValueError(f"{name}={value!r}: the driver takes letters, digits and _.:@#,/+- only")


@dataclass(frozen=True, repr=False)
class AmqpOptions(RemoteOptions):
    """Options of `AmqpTransport`.

    Args:
        exchange: Must exist; None is the default one, where the routing key is a queue's name.
        routing_key: `{session_id}` and `{type}` may stand in it.
        persistent: Whether the server keeps messages over its own restart, in durable queues.
        max_event_bytes: RabbitMQ 4 takes 16 MiB, unless configured otherwise.
    """

    exchange: str | None = setting(None, _exchange)
    routing_key: str = setting("eventlog", check_text)
    persistent: bool = setting(True, check_boolean)
    max_event_bytes: int = setting(16_000_000, check_one_or_more)


class Client:
    """A connection, its channel, and what is being published."""

    def __init__(
        self,
        connection: aio_pika.abc.AbstractConnection,
        channel: aio_pika.abc.AbstractChannel,
        exchange: aio_pika.abc.AbstractExchange,
    ) -> None:
        self.connection = connection
        self.channel = channel
        self.exchange = exchange
        self.publishing: list[asyncio.Task[None]] = []
        self.lost: BaseException | None = None
        channel.close_callbacks.add(self._closed)

    def _closed(self, _: Any, error: BaseException | None) -> None:
        # The driver's releases for Python 3.10 leave some of them waiting.
        self.lost = error
        for task in self.publishing:
            task.cancel()


class AmqpTransport(RemoteTransport):
    """Publishes each event as a message, a batch at once on one channel.

    The body is exactly the session file's line. The message's id is the event's (the same at every
    redelivery: readers deduplicate by it), and the headers `id`, `session_id`, `type` and
    `timestamp` are percent-encoded but for printable ASCII. A field in the routing key is one word:
    all but letters, digits and `_-~` is encoded. What is too long (100 characters for such a field,
    255 for the message's id, 1,000 for a header) ends in `~` and the SHA-256 of the whole, and has
    exactly that many.

    RabbitMQ has the event once it confirms it (publisher confirms): a persistent one in a durable
    queue is on disk then. A message that no queue gets comes back and counts as a failure.

    The path is the virtual host; without one it is `/`.
    """

    ports: ClassVar[dict[str, int]] = {"amqp": 5672, "amqps": 5671}
    tls_schemes: ClassVar[tuple[str, ...]] = ("amqps",)
    options_type: ClassVar[type[RemoteOptions]] = AmqpOptions
    destination: ClassVar[tuple[str, ...]] = ("exchange", "routing_key")
    loggers: ClassVar[tuple[str, ...]] = ("aio_pika", "aiormq")
    errors: ClassVar[Meanings] = (
        (asyncio.TimeoutError, TransportTimeoutError),
        # Of what is published only this says something of the event: it is too large.
        (ChannelPreconditionFailed, TransportRejectedError),
        # Nobody wants it (PublishError), a queue is full (DeliveryError), no such exchange, no
        # permission, the channel or the connection is gone: no event can help it.
        *((kind, TransportConnectionError) for kind in CONNECTION_EXCEPTIONS),
    )
    options: AmqpOptions

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._host, self._port = self.only_host()
        self._key = Template("routing_key", self.options.routing_key)
        nothing = OutgoingEvent(b"", "", "", "", "")
        longest = self._key.fill(nothing, lambda _: "x" * LONGEST_WORD)
        if len(longest.encode()) > LONGEST_NAME:
            raise ValueError(
                f"routing_key={self.options.routing_key!r} is too long: AMQP takes 255 bytes, and "
                f"each field may have {LONGEST_WORD}"
            )
        fixed = self._key.fill(nothing, lambda _: "")
        # The one that is always meant, if there is one that can be asked for.
        one = fixed == longest and not self.options.exchange and NAME.fullmatch(fixed)
        self._queue = fixed if one else None

    async def _open(self) -> Client:
        options = self.options
        vhost = self.address.path or "/"
        try:
            connection = await aio_pika.connect(
                host=self._host,
                port=self._port,
                login=options.username or "guest",
                password=options.password or "guest",
                virtualhost=vhost,
                ssl=self.tls is not None,
                ssl_context=self.tls,
            )
        except CONNECTION_EXCEPTIONS as error:
            # The driver does not tell why the server says no to the last step.
            if "OpenOk" not in str(error):
                raise
            raise TransportConnectionError(
                f"{error}: is there a virtual host {vhost!r}, and may the user enter it?"
            ) from error
        try:
            channel = connection.channel(publisher_confirms=True, on_return_raises=True)
            await channel.initialize()
            exchange = await channel.get_exchange(options.exchange or "", ensure=False)
        except BaseException:
            await connection.close()
            raise
        return Client(connection, channel, exchange)

    async def _deliver(self, client: Client, batch: Sequence[OutgoingEvent]) -> Outcomes:
        publishing = (self._publish(client.exchange, event) for event in batch)
        client.publishing = [asyncio.ensure_future(each) for each in publishing]
        outcomes = await asyncio.gather(*client.publishing, return_exceptions=True)
        # One for all, so that it counts once.
        failure = client.lost or next((each for each in outcomes if each is not None), None)
        if isinstance(failure, ChannelPreconditionFailed) and len(batch) > 1:
            # Which of them is too large is not said; they come again one by one.
            failure = TransportConnectionError(f"{type(failure).__name__}: {failure}")
        return [None if each is None else failure for each in outcomes]

    async def _publish(self, exchange: aio_pika.abc.AbstractExchange, event: OutgoingEvent) -> None:
        """Return once the server has confirmed it."""
        modes = aio_pika.DeliveryMode
        message = aio_pika.Message(
            event.line,
            message_id=within(LONGEST_NAME, header_text(event.id)),
            content_type="application/json",
            delivery_mode=modes.PERSISTENT if self.options.persistent else modes.NOT_PERSISTENT,
            headers={
                name: within(LONGEST_HEADER, header_text(value))
                for name, value in event.metadata.items()
            },
        )
        await exchange.publish(message, self._key.fill(event, _word), mandatory=True)

    async def _ask(self, client: Client) -> None:
        if self.options.exchange is not None:
            await client.channel.get_exchange(self.options.exchange)
        elif self._queue is not None:
            await client.channel.get_queue(self._queue)
        else:
            # Any question that is answered.
            await client.channel.set_qos()

    async def _shut(self, client: Client) -> None:
        await client.connection.close()


def _word(text: str) -> str:
    """Return a text as one word of a routing key."""
    return within(LONGEST_WORD, escape_token(text))
