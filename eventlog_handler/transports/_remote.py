"""What all transports to a server share: options, the connection, time limits, translated errors.

A broker's own file says how to open, send, ask and shut, and what its driver's errors mean. No
driver retries by itself: how often and for how long is decided in one place, the delivery.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import urllib.parse
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import anyio

from eventlog_handler._config import (
    check_boolean,
    check_one_or_more,
    check_some_seconds,
    check_text,
    refuse_unknown,
    setting,
)
from eventlog_handler._encode import encode
from eventlog_handler.exceptions import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports._url import parse_options, parse_url
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import OutgoingEvent

T = TypeVar("T")
Outcomes = Sequence["BaseException | None"]
"""One for each event of a batch: None where the far side has said that it has it."""
Meanings = Sequence["tuple[type[BaseException], type[TransportError]]"]
LOST = (TransportConnectionError, TransportTimeoutError)
"""After these a connection is not used again."""
SHUT_SECONDS = 1.0
"""For saying goodbye on a connection that is of no more use."""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the import of a driver: if it is not installed, say what to type.

    Args:
        extra: The extra in setup.cfg that has it.

    Raises:
        ImportError: With the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{error}: this transport needs its driver; pip install 'eventlog-handler[{extra}]'",
            name=error.name,
        ) from error


def text_or_none(name: str, value: Any) -> str | None:
    """Check an option that may be left out."""
    return None if value is None else check_text(name, value)


def secret_or_none(name: str, value: Any) -> str | None:
    """Check an option whose value is shown nowhere, not even where it is wrong."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError(f"{name} must be a str that is not empty (digits in YAML want quotes)")


@dataclass(frozen=True, repr=False)
class RemoteOptions:
    """Options of every transport to a server: in its URL's query, or as keywords, which win.

    Args:
        name: What offsets and figures go under; else the URL without user, password and query, with
            the destination.
        username: Else from the URL (`user:password@`, percent-encoded).
        password: Likewise. It is in no message, name or repr.
        connect_timeout_seconds: For connecting, handshakes and logging in together.
        timeout_seconds: For one batch, until it is confirmed.
        max_event_bytes: A longer line is parked and not sent.
        tls: Whether the connection is encrypted and the server's certificate checked.
        tls_ca_file: Certificates (PEM) to trust instead of the system's.
        tls_cert_file: Our own certificate (PEM), where the server asks for one.
        tls_key_file: Its key.
    """

    name: str | None = setting(None, text_or_none)
    username: str | None = setting(None, text_or_none)
    password: str | None = setting(None, secret_or_none)
    connect_timeout_seconds: float = setting(5.0, check_some_seconds)
    timeout_seconds: float = setting(10.0, check_some_seconds)
    max_event_bytes: int = setting(1_000_000, check_one_or_more)
    tls: bool = setting(False, check_boolean)
    tls_ca_file: str | None = setting(None, text_or_none)
    tls_cert_file: str | None = setting(None, text_or_none)
    tls_key_file: str | None = setting(None, text_or_none)


class RemoteTransport(TransportInterface):
    """Base of the transports to a server.

    One batch is in flight at a time. The connection is opened by the first one, on the loop that
    runs then, and is given up after any failure that is not one event's own: whatever state the
    driver is in, the next attempt begins anew.

    Args:
        url: See `parse_url`; what its path means, the subclass says.
        **options: Those of `options_type`; they beat the URL's.

    Raises:
        TypeError: An option that does not exist; names the nearest one.
        ValueError: A URL or an option that cannot be.
    """

    ports: ClassVar[Mapping[str, int]]
    """The schemes of its URLs, and the port where a URL has none; 0 leaves that to the driver."""
    tls_schemes: ClassVar[tuple[str, ...]] = ()
    """Those of them that mean `tls=true`."""
    options_type: ClassVar[type[RemoteOptions]] = RemoteOptions
    destination: ClassVar[tuple[str, ...]] = ()
    """Options that say where to: they are part of the name."""
    loggers: ClassVar[tuple[str, ...]] = ()
    errors: ClassVar[Meanings] = ()
    """What the driver's errors mean; the first that fits counts. What is not here is one event's
    own failure, but for OSError and time-outs."""

    def __init__(self, url: str, **options: Any) -> None:
        self.address = parse_url(url, self.ports)
        self.options = self._checked(options)
        parts = ((each, getattr(self.options, each)) for each in self.destination)
        to = "&".join(f"{option}={value}" for option, value in parts if value is not None)
        self.name = self.options.name or self.address.shown + (f"?{to}" if to else "")
        self.tls = self._tls()
        self.unwell: Exception | None = None
        """Why `health_check` was last False."""
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._left_behind: list[Any] = []
        self._goodbyes: set[asyncio.Task[None]] = set()

    # What a broker's file has to say.

    @abstractmethod
    async def _open(self) -> Any:
        """Connect, log in, and return the client."""

    @abstractmethod
    async def _deliver(self, client: Any, batch: Sequence[OutgoingEvent]) -> Outcomes:
        """Send the batch; return for each event None once it is confirmed, else why not."""

    @abstractmethod
    async def _ask(self, client: Any) -> None:
        """Return if the destination would take an event now, else raise."""

    @abstractmethod
    async def _shut(self, client: Any) -> None:
        """Close the connection."""

    # The contract of transports.

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Send one event, see `TransportInterface`; what is no text is encoded as JSON first."""
        about = metadata or {}
        if isinstance(event, str):
            event = event.encode()
        elif not isinstance(event, bytes):
            event = encode(event)
        texts = (str(about.get(name, "")) for name in ("id", "session_id", "type", "timestamp"))
        [outcome] = await self.send_batch([OutgoingEvent(event, *texts)])
        if outcome is not None:
            raise outcome
        return True

    async def send_batch(self, batch: list[OutgoingEvent]) -> list[Exception | None]:
        """Send events in one go; return None, or why not, for each."""
        outcomes = [self._refused(event) for event in batch]
        fitting = [event for event, outcome in zip(batch, outcomes, strict=True) if outcome is None]
        if not fitting:
            return outcomes
        answers = iter(
            await self._guarded(lambda c: self._deliver(c, fitting), self.options.timeout_seconds)
        )
        # One error that befell several events stays one, so that it counts once.
        known: dict[int, Exception] = {}
        for index, outcome in enumerate(outcomes):
            answer = next(answers) if outcome is None else None
            if answer is not None:
                outcomes[index] = known.setdefault(id(answer), self._translated(answer))
        if any(isinstance(error, LOST) for error in known.values()):
            self._drop()
        return outcomes

    async def health_check(self) -> bool:
        """Return whether the destination would take an event now."""
        try:
            await self._guarded(self._ask, self.options.connect_timeout_seconds)
        except Exception as error:
            self.unwell = error
            return False
        return True

    async def close(self) -> None:
        """Close the connection; another `send` would open a new one."""
        self._drop()
        loop = asyncio.get_running_loop()
        goodbyes = [task for task in self._goodbyes if task.get_loop() is loop]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=SHUT_SECONDS)

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open."""
        return self._client is not None

    def __repr__(self) -> str:
        """Return class and name, which hold no secret."""
        return f"<{type(self).__name__} {self.name}>"

    # For brokers' files.

    async def _in_pieces(
        self,
        batch: Sequence[OutgoingEvent],
        most_events: int,
        most_bytes: int,
        send: Callable[[Sequence[OutgoingEvent]], Awaitable[Outcomes]],
        extra_bytes: int = 0,
    ) -> Outcomes:
        """Send a batch in requests as large as a broker takes; after a failed one none follows.

        Args:
            batch: All of it.
            most_events: In one request.
            most_bytes: In one request; a single event may have more.
            send: Sends one request.
            extra_bytes: What an event takes beside its line.
        """
        outcomes: list[BaseException | None] = []
        while len(outcomes) < len(batch):
            begin = end = len(outcomes)
            size = 0
            while end < len(batch) and end - begin < most_events:
                size += len(batch[end].line) + extra_bytes
                if end > begin and size > most_bytes:
                    break
                end += 1
            try:
                outcomes += await send(batch[begin:end])
            except Exception as error:
                failure = self._translated(error)
                if len(batch) > 1 and not isinstance(failure, LOST):
                    # Whose fault it is, is not known: no event's, until they go one by one.
                    failure = TransportConnectionError(str(failure))
                    failure.__cause__ = error
                outcomes += [failure] * (len(batch) - begin)
        return outcomes

    # Options.

    def _checked(self, options: dict[str, Any]) -> Any:
        address = self.address
        checks = {each.name: each.metadata["check"] for each in fields(self.options_type)}
        given: dict[str, Any] = {"username": address.username, "password": address.password}
        given |= {"tls": address.scheme in self.tls_schemes, **self._in_url(), **options}
        refuse_unknown(given, checks)
        return self.options_type(**{name: checks[name](name, v) for name, v in given.items()})

    def only_host(self) -> tuple[str, int]:
        """Return host and port, of a broker that is reached at one address."""
        if len(self.address.hosts) > 1:
            raise ValueError(f"{self.name}: write one host, this transport takes no more")
        return self.address.hosts[0]

    def _in_url(self) -> dict[str, str]:
        """Return the options that stand in the URL."""
        return parse_options(self.address.query)

    def _tls(self) -> ssl.SSLContext | None:
        options = self.options
        files = (options.tls_ca_file, options.tls_cert_file, options.tls_key_file)
        if not options.tls:
            if any(files):
                raise ValueError(f"{self.name} has tls_… files and does not use TLS: add tls=true")
            return None
        try:
            context = ssl.create_default_context(cafile=options.tls_ca_file)
            if options.tls_cert_file is not None:
                context.load_cert_chain(options.tls_cert_file, options.tls_key_file)
        except OSError as error:
            raise ValueError(f"{self.name}: TLS with the files {files}: {error}") from None
        return context

    def _refused(self, event: OutgoingEvent) -> Exception | None:
        size, most = len(event.line), self.options.max_event_bytes
        if size <= most:
            return None
        return TransportRejectedError(f"the line has {size} bytes, max_event_bytes is {most}")

    # The connection.

    async def _guarded(self, work: Callable[[Any], Awaitable[T]], seconds: float) -> T:
        """Do something with the client, in time; whatever goes wrong, it is one of our errors."""
        elsewhere = self._in_use_elsewhere()
        try:
            if elsewhere:
                return await self._once(work, seconds)
            return await _in_time(seconds, work, await self._connected())
        except BaseException as error:
            if not elsewhere:
                self._drop()
            if isinstance(error, Exception):
                raise self._translated(error) from error
            raise

    def _in_use_elsewhere(self) -> bool:
        """Whether the connection belongs to another loop that runs in this process."""
        loop = self._loop
        ours = loop is asyncio.get_running_loop() or self._pid != os.getpid()
        return self._client is not None and loop is not None and not ours and loop.is_running()

    async def _once(self, work: Callable[[Any], Awaitable[T]], seconds: float) -> T:
        client = await _in_time(self.options.connect_timeout_seconds, self._open)
        try:
            return await _in_time(seconds, work, client)
        finally:
            await self._say_goodbye(client)

    async def _connected(self) -> Any:
        """Return the client; open a new one where there is none of this loop and process."""
        loop = asyncio.get_running_loop()
        if self._client is not None and (self._loop is not loop or self._pid != os.getpid()):
            self._drop()
        if self._client is None:
            self._loop, self._pid = loop, os.getpid()
            self._client = await _in_time(self.options.connect_timeout_seconds, self._open)
        return self._client

    def _drop(self) -> None:
        """Give up the connection; the goodbye is not waited for."""
        client, self._client = self._client, None
        if client is None:
            return
        if self._loop is not asyncio.get_running_loop() or self._pid != os.getpid():
            # Its loop is over, or it is the connection of the process that we were forked from,
            # which a goodbye would end. Kept: some drivers say it in `__del__`.
            self._left_behind.append(client)
            return
        task = asyncio.ensure_future(self._say_goodbye(client))
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)

    async def _say_goodbye(self, client: Any) -> None:
        with contextlib.suppress(Exception), anyio.move_on_after(SHUT_SECONDS, shield=True):
            await self._shut(client)

    # Errors.

    def _translated(self, error: BaseException) -> Exception:
        """Return what an error means for the delivery, without what is secret."""
        if isinstance(error, TransportError):
            return error
        meaning = next((ours for kind, ours in self.errors if isinstance(error, kind)), None)
        if meaning is None:
            if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
                meaning = TransportTimeoutError
            elif isinstance(error, OSError) or not isinstance(error, Exception):
                meaning = TransportConnectionError
            else:
                meaning = TransportError
        translated = meaning(self._without_secrets(f"{type(error).__name__}: {error}"))
        translated.__cause__ = error
        return translated

    def _without_secrets(self, text: str) -> str:
        for each in fields(self.options_type):
            secret = getattr(self.options, each.name)
            if secret and each.metadata["check"] is secret_or_none:
                for form in (secret, urllib.parse.quote(secret, safe="")):
                    text = text.replace(form, "***")
        return text


async def _in_time(seconds: float, call: Callable[..., Awaitable[T]], *args: Any) -> T:
    with anyio.move_on_after(seconds) as scope:
        try:
            return await call(*args)
        except asyncio.CancelledError:
            # Some drivers raise one of their own instead of the one that went in; before 3.11
            # anyio would not know it for its own.
            if not scope.cancel_called:
                raise
    raise TransportTimeoutError(f"no answer within {seconds} seconds")
