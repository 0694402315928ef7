"""Kafka: `kafka://user:password@a:9092,b:9092/topic?tls=true`."""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import anyio

from eventlog_handler._config import check_one_of, setting
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
from eventlog_handler.typing import OutgoingEvent

with needs("kafka"):
    from aiokafka import AIOKafkaClient, TopicPartition, errors
    from aiokafka.conn import create_conn
    from aiokafka.partitioner import DefaultPartitioner
    from aiokafka.protocol.metadata import MetadataRequest
    from aiokafka.protocol.produce import ProduceRequest
    from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

CODECS = {"none": DefaultRecordBatch.CODEC_NONE, "gzip": DefaultRecordBatch.CODEC_GZIP}
TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
ALL_IN_SYNC = -1
"""As Java's `acks=all`."""
REQUEST_SHARE = 0.9
"""Of a batch's time, for a request."""
# The same as the Java client's: whoever else produces to the topic agrees where a session is.
partition_of = DefaultPartitioner()


@dataclass(frozen=True, repr=False)
class KafkaOptions(RemoteOptions):
    """Options of `KafkaTransport`.

    Args:
        sasl_mechanism: How to log in, where there is a username: PLAIN, SCRAM-SHA-256 or
            SCRAM-SHA-512.
        compression: Of the records: none or gzip.
    """

    sasl_mechanism: str = setting("PLAIN", check_one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"))
    compression: str = setting("none", check_one_of(*CODECS))


class KafkaTransport(RemoteTransport):
    """Produces each event to a topic, keyed by its session: one session, one partition.

    A record's value is exactly the session file's line; its headers are `id` (the same at every
    redelivery: readers deduplicate by it), `session_id`, `type` and `timestamp`. Kafka has the
    event once all replicas in sync do (`acks=all`). The record's own time is that of sending, so
    that what waited long is not beyond the topic's retention when it arrives.

    The path is the topic. What comes to a partition together is limited there as a whole
    (`max.message.bytes`), so `max_event_bytes` is the limit of that too.

    The driver's client is used, and not its producer: that one retries by itself until all is
    taken, does not say why it has to, and cannot be closed before.
    """

    ports: ClassVar[dict[str, int]] = {"kafka": 9092}
    options_type: ClassVar[type[RemoteOptions]] = KafkaOptions
    loggers: ClassVar[tuple[str, ...]] = ("aiokafka",)
    errors: ClassVar[Meanings] = (
        *((kind, TransportRejectedError) for kind in TOO_LARGE),
        (errors.KafkaTimeoutError, TransportTimeoutError),
        (errors.RequestTimedOutError, TransportTimeoutError),
        # Login, permission, unknown topic, no leader, too few replicas, a full disk: no event can
        # help it.
        (errors.KafkaError, TransportConnectionError),
    )
    options: KafkaOptions

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._topic = self.address.path
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", self._topic):
            raise ValueError(
                f"{self.name}: the path is the topic, up to 249 letters, digits, dots, dashes and "
                "underscores; write kafka://host:9092/topic"
            )
        if (self.options.username is None) != (self.options.password is None):
            raise ValueError(f"{self.name}: write both username and password, or neither")

    async def _open(self) -> AIOKafkaClient:
        options = self.options
        client = AIOKafkaClient(
            bootstrap_servers=await self._reachable(),
            # Longer than anything we wait for: the driver has no time limits of its own.
            request_timeout_ms=int(
                (options.timeout_seconds + options.connect_timeout_seconds) * 1000
            ),
            **self._security(),
        )
        try:
            await client.bootstrap()
            await self._ask(client)
        except BaseException:
            await self._say_goodbye(client)
            raise
        return client

    async def _reachable(self) -> str:
        """Return the first host that serves us.

        The driver tries them too. But it does not tell why none did, and where it is cut off
        while it waits for an answer it leaves the connection open.
        """
        failures = []
        seconds = self.options.connect_timeout_seconds / len(self.address.hosts)
        for host, port in self.address.hosts:
            try:
                with anyio.fail_after(seconds):
                    connection = await create_conn(host, port, **self._security())
                    try:
                        await connection.send(MetadataRequest([]))
                    finally:
                        connection.close()
            except Exception as error:
                failures.append(error)
            else:
                # In brackets, which the driver takes around any host.
                return f"[{host}]:{port}"
        raise failures[0]

    def _security(self) -> dict[str, Any]:
        options = self.options
        sasl = "" if options.username is None else "SASL_"
        return {
            "security_protocol": sasl + ("SSL" if options.tls else "PLAINTEXT"),
            "ssl_context": self.tls,
            "sasl_mechanism": options.sasl_mechanism,
            "sasl_plain_username": options.username,
            "sasl_plain_password": options.password,
        }

    async def _deliver(self, client: AIOKafkaClient, batch: Sequence[OutgoingEvent]) -> Outcomes:
        outcomes: list[BaseException | None] = []
        failure: BaseException | None = None
        # What is left after a failure is not sent: it would overtake.
        while len(outcomes) < len(batch) and failure is None:
            outcomes += await self._produce(client, batch[len(outcomes) :])
            failure = next((e for e in outcomes if e and not isinstance(e, TOO_LARGE)), None)
        outcomes += [failure] * (len(batch) - len(outcomes))
        # One that befell several partitions counts once.
        same: dict[str, BaseException] = {}
        return [each and same.setdefault(repr(each), each) for each in outcomes]

    async def _produce(self, client: AIOKafkaClient, batch: Sequence[OutgoingEvent]) -> Outcomes:
        """Send as many events as their partitions take together; return what became of these."""
        partitions = sorted(client.cluster.partitions_for_topic(self._topic) or ())
        if not partitions:
            raise errors.UnknownTopicOrPartitionError(self._topic)
        codec, limit = CODECS[self.options.compression], self.options.max_event_bytes
        places, together = _put_together(batch, partitions, codec, limit)
        requests: defaultdict[int | None, list[tuple[int, bytes]]] = defaultdict(list)
        for place, builder in together.items():
            leader = client.cluster.leader_for_partition(TopicPartition(self._topic, place))
            requests[leader].append((place, builder.build()))
        left_out = errors.KafkaProtocolError("the answer leaves out a partition")
        answers: dict[int, BaseException | None] = dict.fromkeys(places, left_out)
        for each in await asyncio.gather(*(self._request(client, *r) for r in requests.items())):
            answers |= each
        counts = Counter(places)
        return [_meant(answers[place], counts[place]) for place in places]

    async def _request(
        self, client: AIOKafkaClient, leader: int | None, records: list[tuple[int, bytes]]
    ) -> dict[int, BaseException | None]:
        """Produce to the partitions of one broker; return what it says of each."""
        places = [place for place, _ in records]
        if leader is None or leader < 0:
            return dict.fromkeys(places, errors.LeaderNotAvailableError(self._topic))
        # Before the whole batch is given up: what other brokers have confirmed meanwhile stays so.
        seconds = self.options.timeout_seconds * REQUEST_SHARE
        request = ProduceRequest(
            transactional_id=None,
            required_acks=ALL_IN_SYNC,
            timeout=int(seconds * 1000),
            topics=[(self._topic, records)],
        )
        error: Exception
        error = TransportTimeoutError(f"broker {leader} gave no answer within {seconds:g} seconds")
        try:
            with anyio.move_on_after(seconds):
                response = await client.send(leader, request)
                return {
                    place: None if not code else errors.for_code(code)(*filter(None, more[4:]))
                    for _, partitions in response.topics
                    for place, code, *more in partitions
                }
        except Exception as failure:
            error = failure
        return dict.fromkeys(places, error)

    async def _ask(self, client: AIOKafkaClient) -> None:
        client.add_topic(self._topic)
        if not await client.force_metadata_update():
            raise errors.KafkaConnectionError("no broker answers")
        if self._topic in client.cluster.unauthorized_topics:
            raise errors.TopicAuthorizationFailedError(self._topic)
        if not client.cluster.available_partitions_for_topic(self._topic):
            raise errors.UnknownTopicOrPartitionError(f"there is no topic {self._topic!r}")

    async def _shut(self, client: AIOKafkaClient) -> None:
        for connection in client._conns.values():
            if connection.connected():
                # What it still has to send would keep it open.
                connection._writer.transport.abort()
        await client.close()


def _put_together(
    batch: Sequence[OutgoingEvent], partitions: Sequence[int], codec: int, limit: int
) -> tuple[list[int], dict[int, Any]]:
    """Return the partitions of the first events of a batch, and records for each partition.

    Args:
        batch: The events.
        partitions: Of the topic.
        codec: Compresses what goes to a partition.
        limit: Bytes for a partition; a single event may have more. The first that does not fit is
            the end.
    """
    places: list[int] = []
    counts: Counter[int] = Counter()
    together: dict[int, Any] = {}
    known: dict[str, int] = {}
    for event in batch:
        raw = [
            (name, text.encode("utf-8", "surrogatepass")) for name, text in event.metadata.items()
        ]
        key = event.session_id.encode("utf-8", "surrogatepass")
        if event.session_id not in known:
            known[event.session_id] = partition_of(key, partitions, partitions)
        place = known[event.session_id]
        if place not in together:
            together[place] = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, limit)
        # Without a time of its own: that of sending.
        if together[place].append(counts[place], None, key, event.line, raw) is None:
            break
        places.append(place)
        counts[place] += 1
    return places, together


def _meant(error: BaseException | None, count: int) -> BaseException | None:
    """Return what an answer for some records that came together means for each of them."""
    if isinstance(error, TOO_LARGE) and count > 1:
        return TransportConnectionError(
            "the topic's max.message.bytes is below max_event_bytes: records that came together "
            f"are too large, they go one by one now ({error})"
        )
    return error
