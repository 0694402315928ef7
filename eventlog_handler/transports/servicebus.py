"""Azure Service Bus: `servicebus://policy:key@namespace.servicebus.windows.net/queue`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import anyio

from eventlog_handler._config import check_boolean, check_one_or_more, setting
from eventlog_handler.exceptions import (
    TransportConnectionError,
    TransportError,
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
from eventlog_handler.transports._url import header_text
from eventlog_handler.typing import OutgoingEvent

with needs("servicebus"):
    from azure.core.credentials import AzureNamedKeyCredential
    from azure.servicebus import ServiceBusMessage, TransportType, exceptions
    from azure.servicebus.aio import ServiceBusSender

KEY_CHARACTERS = 128
"""What a session's or a message's id may have, in UTF-16."""
GOODBYE_SECONDS = 0.1
"""For closing: no answer is waited for, only a task of the driver's that sleeps for a second."""
MALFORMED = (
    b"amqp:decode-error",
    b"amqp:invalid-field",
    b"com.microsoft:argument-error",
    b"com.microsoft:argument-out-of-range",
)
"""Conditions that say something of a message."""


def _credential_or_none(name: str, value: Any) -> Any:
    if value is None or callable(getattr(value, "get_token", None)):
        return value
    raise ValueError(f"{name} must be an object with get_token, as azure-identity has them")


@dataclass(frozen=True, repr=False)
class ServiceBusOptions(RemoteOptions):
    """Options of `ServiceBusTransport`.

    Args:
        emulator: Whether it is Microsoft's emulator: plain AMQP instead of TLS, port 5672.
        partitioned: Whether the entity is partitioned: a batch then holds one session only.
        credential: An asynchronous `TokenCredential` (azure-identity) instead of policy and key;
            only as a keyword. Whoever makes it closes it.
        max_event_bytes: The standard tier takes 256 KB with all headers.
    """

    emulator: bool = setting(False, check_boolean)
    partitioned: bool = setting(False, check_boolean)
    credential: Any = setting(None, _credential_or_none)  # noqa: RUF009 - as all others are
    max_event_bytes: int = setting(250_000, check_one_or_more)


class Link(NamedTuple):
    """A sender, and the socket below it: the driver forgets it, and leaves it open, if it fails."""

    sender: ServiceBusSender
    socket: Any

    @classmethod
    def of(cls, sender: ServiceBusSender) -> Link:
        """Find the socket while the driver knows it; nothing public does."""
        handler: Any = sender._handler
        try:
            return cls(sender, handler._connection._transport.writer.transport)
        except AttributeError:
            return cls(sender, None)


class ServiceBusTransport(RemoteTransport):
    """Sends to a queue or topic, as many events in one transfer as it may hold.

    A message has the line as its body, the event's id as `message_id` (for the entity's duplicate
    detection, and for readers), the session as `session_id`, and the application properties `id`,
    `session_id`, `type` and `timestamp`. Service Bus has the whole transfer, or nothing of it, once
    it says so (the outcome `accepted`).

    `session_id` and `message_id` take less than 128 characters as they are. Of a longer one they
    have the beginning and a SHA-256, 128 characters in all: no two are the same. The property has
    it whole, but for surrogates by themselves, which are spelled out there.

    User and password of the URL are the policy's name and key, the path is the queue or topic.
    """

    ports: ClassVar[dict[str, int]] = {"servicebus": 0}
    options_type: ClassVar[type[RemoteOptions]] = ServiceBusOptions
    loggers: ClassVar[tuple[str, ...]] = ("azure",)
    errors: ClassVar[Meanings] = (
        (exceptions.MessageSizeExceededError, TransportRejectedError),
        (exceptions.OperationTimeoutError, TransportTimeoutError),
        # Login, permission, an entity that is unknown, disabled or full, throttling, a lost
        # connection, and all that the driver has no name for.
        (exceptions.ServiceBusError, TransportConnectionError),
    )
    options: ServiceBusOptions

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        host, self._port = self.only_host()
        self._host = f"[{host}]" if ":" in host else host
        self._entity = self.address.path.strip("/")
        username, password = self.options.username, self.options.password
        if not self._entity:
            raise ValueError(f"{self.name}: the path is the queue or topic: write …/queue")
        self._credential = self.options.credential
        if self._credential is None:
            if username is None or password is None:
                raise ValueError(
                    f"{self.name}: write the policy's name and key into the URL, percent-encoded: "
                    "servicebus://name:key@…, or give credential=… as a keyword"
                )
            self._credential = AzureNamedKeyCredential(username, password)

    def _checked(self, options: dict[str, Any]) -> Any:
        checked = super()._checked(options)
        # The service speaks nothing but TLS, the emulator none.
        return replace(checked, tls=not checked.emulator)

    async def _open(self) -> Link:
        endpoint = f"{self._host}:{self._port}" if self._port else self._host
        plain = self.options.emulator
        sender = ServiceBusSender(
            endpoint if plain else self._host,
            self._credential,
            # On the wire a topic is the same.
            queue_name=self._entity,
            retry_total=0,
            transport_type=TransportType.Amqp,
            use_tls=not plain,
            ssl_context=self.tls,
            custom_endpoint_address=f"sb://{endpoint}" if self._port and not plain else None,
        )
        # In a task: what is cancelled forgets its socket, which has to be found before.
        opening = asyncio.ensure_future(_attach(sender))
        try:
            await asyncio.shield(opening)
        except BaseException:
            link = Link.of(sender)
            opening.cancel()
            await self._shut(link)
            raise
        return Link.of(sender)

    async def _deliver(self, client: Link, batch: Sequence[OutgoingEvent]) -> Outcomes:
        outcomes: list[BaseException | None] = []
        while len(outcomes) < len(batch):
            transfer, full = await client.sender.create_message_batch(), None
            session_id = batch[len(outcomes)].session_id
            for event in batch[len(outcomes) :]:
                if self.options.partitioned and event.session_id != session_id:
                    break
                try:
                    transfer.add_message(_message(event))
                except exceptions.MessageSizeExceededError as error:
                    full = error
                    break
            if not len(transfer):
                outcomes.append(full)
                continue
            try:
                await client.sender.send_messages(transfer)
            except exceptions.ServiceBusError as error:
                failure = _failure(error, alone=len(batch) == 1)
                return outcomes + [failure] * (len(batch) - len(outcomes))
            outcomes += [None] * len(transfer)
        return outcomes

    async def _ask(self, client: Link) -> None:
        await self._shut(await self._open())

    async def _shut(self, client: Link) -> None:
        try:
            with anyio.move_on_after(GOODBYE_SECONDS, shield=True):
                await client.sender.close()
        finally:
            if client.socket is not None:
                client.socket.abort()


async def _attach(sender: ServiceBusSender) -> None:
    """Connect, log in, and see that the entity keeps the link."""
    await sender.__aenter__()
    handler: Any = sender._handler
    # The driver takes a refusal for an answer: why comes in the next frame. These methods are not
    # public; without them an unknown entity is told by the first event.
    try:
        await handler.do_work_async()
        await handler.client_ready_async()
    except AttributeError:
        pass
    except Exception as error:
        raise ConnectionError(str(error)) from error


def _message(event: OutgoingEvent) -> ServiceBusMessage:
    return ServiceBusMessage(
        event.line,
        message_id=_key(event.id),
        session_id=_key(event.session_id),
        content_type="application/json",
        application_properties={
            name: value.encode("utf-8", "backslashreplace").decode()
            for name, value in event.metadata.items()
        },
    )


def _key(text: str) -> str | None:
    """Return an id as Service Bus takes it: not empty, UTF-8, of 128 characters at most."""
    with contextlib.suppress(UnicodeEncodeError):
        if len(text.encode("utf-16-le")) // 2 < KEY_CHARACTERS:
            return text or None
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{header_text(text)[:63]:_<63}~{digest}"


def _failure(error: exceptions.ServiceBusError, alone: bool) -> Exception:
    """Return what a refused transfer means; of several events none is to blame for it."""
    condition = getattr(error.inner_exception, "condition", None)
    if alone and condition in MALFORMED:
        # Neither final nor for ever: tried again, then parked if all else is well.
        return TransportError(str(error))
    if isinstance(error, exceptions.MessageSizeExceededError) and not alone:
        return TransportConnectionError(f"a transfer of several events is refused: {error}")
    if isinstance(error, exceptions.ServiceBusServerBusyError):
        wait = re.search(r"wait (\d+) seconds", str(error))
        seconds = float(wait[1]) if wait else None
        return TransportConnectionError(str(error), retry_after_seconds=seconds)
    return error
