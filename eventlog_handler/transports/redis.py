"""Redis streams: `redis://user:password@host:6379/0?stream=eventlog&maxlen=1000000`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eventlog_handler._config import (
    check_count_or_none,
    check_one_or_more,
    check_text,
    setting,
)
from eventlog_handler.exceptions import TransportConnectionError, TransportTimeoutError
from eventlog_handler.transports._remote import (
    Meanings,
    Outcomes,
    RemoteOptions,
    RemoteTransport,
    needs,
)
from eventlog_handler.transports._url import Template
from eventlog_handler.typing import OutgoingEvent

with needs("redis"):
    from redis import exceptions
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff


@dataclass(frozen=True, repr=False)
class RedisOptions(RemoteOptions):
    """Options of `RedisTransport`.

    Args:
        stream: The stream's key; `{session_id}` and `{type}` may stand in it.
        maxlen: About how many entries a stream keeps (`XADD … MAXLEN ~`); None keeps all.
        max_event_bytes: Redis itself takes 512 MB.
    """

    stream: str = setting("eventlog", check_text)
    maxlen: int | None = setting(None, check_count_or_none)
    max_event_bytes: int = setting(100_000_000, check_one_or_more)


class RedisTransport(RemoteTransport):
    """Adds each event to a stream (`XADD`), a batch in one pipeline.

    An entry has the fields `line` (exactly the session file's), `id` (the same at every redelivery:
    readers deduplicate by it), `session_id`, `type` and `timestamp`. Redis has the event once it
    answers with the entry's id; how well it keeps it says its own `appendfsync`.

    The path is the database's number.
    """

    ports: ClassVar[dict[str, int]] = {"redis": 6379, "rediss": 6379}
    tls_schemes: ClassVar[tuple[str, ...]] = ("rediss",)
    options_type: ClassVar[type[RemoteOptions]] = RedisOptions
    destination: ClassVar[tuple[str, ...]] = ("stream",)
    loggers: ClassVar[tuple[str, ...]] = ("redis",)
    errors: ClassVar[Meanings] = (
        (exceptions.TimeoutError, TransportTimeoutError),
        (exceptions.ConnectionError, TransportConnectionError),
        # Whatever the server answers: no memory, read-only, another type of key, no permission. No
        # event can help it; that it is too large is known before.
        (exceptions.RedisError, TransportConnectionError),
    )
    options: RedisOptions

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._stream = Template("stream", self.options.stream)
        self._host, self._port = self.only_host()
        database = self.address.path or "0"
        if not database.isdecimal():
            raise ValueError(f"{self.name}: the path is the database's number, such as /0")
        self._database = int(database)

    async def _open(self) -> Redis:
        options = self.options
        client = Redis(
            host=self._host,
            port=self._port,
            db=self._database,
            username=options.username,
            password=options.password,
            ssl=self.tls is not None,
            ssl_ca_certs=options.tls_ca_file,
            ssl_certfile=options.tls_cert_file,
            ssl_keyfile=options.tls_key_file,
            single_connection_client=True,
            # Without an end of their own: whoever calls has one for the whole batch.
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            await client.initialize()
            await client.ping()
        except BaseException:
            await client.aclose()
            raise
        return client

    async def _deliver(self, client: Redis, batch: Sequence[OutgoingEvent]) -> Outcomes:
        pipeline = client.pipeline(transaction=False)
        for event in batch:
            pipeline.xadd(
                self._stream.fill(event).encode("utf-8", "surrogatepass"),
                {
                    "line": event.line,
                    "id": event.id,
                    "session_id": event.session_id.encode("utf-8", "surrogatepass"),
                    "type": event.type.encode("utf-8", "surrogatepass"),
                    "timestamp": event.timestamp,
                },
                maxlen=self.options.maxlen,
            )
        answers = await pipeline.execute(raise_on_error=False)
        return [answer if isinstance(answer, Exception) else None for answer in answers]

    async def _ask(self, client: Redis) -> None:
        await client.ping()

    async def _shut(self, client: Redis) -> None:
        await client.aclose()
