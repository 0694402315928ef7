"""What every transport to a server has to do, shown against its real server.

A broker's test file says how its server is run, and subclasses `TransportContract`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import ssl
import subprocess
import sys
import threading
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest
import trustme

from eventlog_handler import EventLogHandler, TransportRejectedError
from eventlog_handler.testing import RecordingTransport
from eventlog_handler.transports import named_transports
from eventlog_handler.typing import OutgoingEvent, TransportStats
from tests.reliability.harness import missing
from tests.transports.proxy import Proxy
from tests.transports.servers import PASSWORD, Broker, Received, wait_for

FLUSH_SECONDS = 60.0
QUICK = {
    "retry_delay_seconds": 0.05,
    "retry_max_delay_seconds": 0.2,
    "breaker_failures": 3,
    "breaker_reset_seconds": 0.2,
}
HOSTILE = (
    "../../etc/passwd",
    "a\nb\r\nX: y",
    "ünï→\U0001f600 %41",
    "x" * 500,
    "{session_id}.*.>",
    " ",
)
"""Session ids as they come from outside."""
CONSUMERS = Path(__file__).resolve().parents[2] / "examples" / "consumers"
CONFIG = """
version: 1
handlers:
  events:
    class: eventlog_handler.EventLogHandler
    log_base_dir: logs/sessions
    downstream_transport: {url}
    shutdown_timeout_seconds: 30
root:
  level: INFO
  handlers: [events]
"""
APP = """
import logging, logging.config, yaml
logging.config.dictConfig(yaml.safe_load(open("logging.yaml")))
for n in range(20):
    for session_id in ("chat-42", "chat-7"):
        logging.getLogger("app").info("step %d", n, extra={"session_id": session_id})
"""
FORK = """
import logging, logging.config, os, yaml
logging.config.dictConfig(yaml.safe_load(open("logging.yaml")))
[handler] = logging.getLogger().handlers
def log(session_id):
    for n in range(20):
        logging.getLogger("app").info("step %d", n, extra={"session_id": session_id})
    assert handler.flush(until="transport", timeout=50)
log("before")
child = os.fork()
log("parent" if child else "child")
if child:
    assert os.waitpid(child, 0)[1] == 0
    log("after")
"""
_numbers = itertools.count(1)


class Pipeline:
    """A handler on a logger, a transport by URL, and another one that works all the time.

    Args:
        base: Of the session files.
        url: Of the transport.
        options: For the handler.
    """

    def __init__(self, base: Path, url: str, **options: Any) -> None:
        [(self.name, transport)] = named_transports(url).items()
        self.transport: Any = transport
        self.other = RecordingTransport()
        self.errors: list[Exception] = []
        self.handler = EventLogHandler(
            log_base_dir=base,
            downstream_transport=[transport, self.other],
            error_handler=lambda error, context: self.errors.append(error),
            **{**QUICK, **options},
        )
        self.base = base
        self._logger = logging.Logger("app")
        self._logger.addHandler(self.handler)
        self._count = 0

    def log(self, count: int, sessions: int = 1, **extra: Any) -> None:
        """Log events of several sessions in turn; each has a number of its own."""
        for _ in range(count):
            session_id = f"chat-{self._count % sessions}"
            fields = {"session_id": session_id, "n": self._count, **extra}
            self._logger.info("event %d →\t\x01\x7f", self._count, extra=fields)
            self._count += 1

    @property
    def stats(self) -> TransportStats:
        """The transport's figures."""
        return self.handler.stats().transports[self.name]

    def arrive(self) -> None:
        """Wait until the transport has acknowledged everything."""
        receipt = self.handler.flush(until="transport", timeout=FLUSH_SECONDS)
        assert receipt, (receipt, self.stats)

    def others_are_unaffected(self) -> None:
        """Check that all files are written and the other transport has everything, now."""
        assert self.handler.flush(until="file", timeout=FLUSH_SECONDS)
        wait_for("the other transport", lambda: len(self.other.sent) == self._count)
        assert sum(map(len, self.written().values())) == self._count

    def written(self) -> dict[str, list[bytes]]:
        """Return the lines of the session files by session."""
        return written_in(self.base)


def written_in(base: Path) -> dict[str, list[bytes]]:
    """Return the lines of the session files below a base, by session."""
    lines: dict[str, list[bytes]] = defaultdict(list)
    for path in sorted(base.glob("*/*.jsonl")):
        for line in path.read_bytes().splitlines():
            lines[orjson.loads(line)["event"]["session_id"]].append(line)
    return lines


def check(written: dict[str, list[bytes]], received: list[Received]) -> int:
    """Check that all is there, byte for byte and in order; return how many came again."""
    first: dict[str, bytes] = {}
    by_session: dict[str, list[bytes]] = defaultdict(list)
    for each in received:
        if each.id in first:
            assert each.line == first[each.id]
            continue
        first[each.id] = each.line
        by_session[each.session_id].append(each.line)
        assert orjson.loads(each.line)["id"] == each.id
    assert by_session == written
    return len(received) - len(first)


def outgoing(session_id: str, number: int, body: str = "") -> OutgoingEvent:
    """Return an event that is not logged but made."""
    event = {"session_id": session_id, "n": number, "body": body}
    unique, time = f"id-{next(_numbers)}", "2026-11-22T06:31:56.123456+00:00"
    line = orjson.dumps({"timestamp": time, "id": unique, "event": event})
    return OutgoingEvent(line, unique, session_id, "step", time)


def transport_of(url: str, **options: Any) -> Any:
    """Return the transport of a URL."""
    [transport] = named_transports(url).values()
    return transport


@contextlib.contextmanager
def leftovers_collected() -> Iterator[None]:
    """Have what a driver leaves collected without a word.

    Where a server asks for the end of a connection, some drivers do not wait for the end of its TLS
    when they close, and a loop that ends then leaves the socket to the garbage collector.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


class TransportContract:
    """Subclass it as `Test…`, with the broker."""

    broker_type: ClassVar[type[Broker]]
    proxy_type: ClassVar[type[Proxy]] = Proxy
    consumer: ClassVar[str]
    """Its file in `examples/consumers`."""
    name_of_session: ClassVar[Callable[[str], str]] = staticmethod(str)
    """How a session's id is told at the far side."""
    oversize: ClassVar[dict[str, Any]] = {"max_event_bytes": 2000}
    """Options under which a line of 3,000 bytes is too long."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
        """The server, for all tests of a class; one that kills it starts it again."""
        if cls.broker_type.missing:
            missing(cls.broker_type.missing)
        broker = cls.broker_type(tmp_path_factory.mktemp("server"))
        try:
            broker.start()
            yield broker
        finally:
            broker.kill()

    @pytest.fixture
    def broker(self, server: Broker) -> Iterator[Broker]:
        """The server, running."""
        yield server
        if server.process is None:
            server.start()
        server.resume()

    @pytest.fixture
    def destination(self, broker: Broker) -> str:
        """A destination of this test's own."""
        name = f"events-{next(_numbers)}"
        broker.make(name)
        return name

    @pytest.fixture
    def pipeline(self, base: Path) -> Iterator[Callable[..., Pipeline]]:
        """Make pipelines that are closed when the test ends."""
        made: list[Pipeline] = []

        def make(url: str, **options: Any) -> Pipeline:
            made.append(Pipeline(base, url, **options))
            return made[-1]

        yield make
        for each in made:
            each.handler.close()

    def test_a_batch_arrives_byte_for_byte_in_order(self, broker: Broker, destination: str) -> None:
        """What `send_batch` has acknowledged lies at the far side: line, id, session, order."""
        sessions = ["a", "b", *HOSTILE]
        batch = [outgoing(s, n, "ä\u2028\x00\ud800"[:3] * n) for n in range(5) for s in sessions]

        async def send() -> None:
            transport = transport_of(broker.url(destination))
            assert not transport.is_connected
            assert await transport.send_batch(batch) == [None] * len(batch)
            assert transport.is_connected
            await transport.close()
            assert not transport.is_connected

        asyncio.run(send())
        tell = self.name_of_session
        for session_id in sessions:
            expected = [(e.line, e.id) for e in batch if e.session_id == session_id]
            got = [
                (r.line, r.id)
                for r in broker.received(destination)
                if r.session_id == tell(session_id)
            ]
            assert got == expected

    def test_single_events_and_a_check_of_health(self, broker: Broker, destination: str) -> None:
        """`send` takes a line and its metadata; `health_check` is true, on any loop."""
        event = outgoing("chat-1", 1)

        async def send() -> Any:
            transport = transport_of(broker.url(destination))
            assert await transport.health_check() is True
            assert await transport.send(event.line, event.metadata) is True
            # As an application does that asks from its own loop.
            assert await asyncio.to_thread(asyncio.run, transport.health_check()) is True
            await transport.close()
            return transport

        transport = asyncio.run(send())
        # A loop that is over took its connection along.
        again = outgoing("chat-1", 2)

        async def on_another_loop() -> None:
            assert await transport.send(again.line, again.metadata) is True
            await transport.close()

        asyncio.run(on_another_loop())
        expected = [Received(e.line, e.id, "chat-1") for e in (event, again)]
        assert broker.received(destination) == expected

    def test_a_thousand_sessions(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """Events of a thousand sessions arrive through the handler, each session's in order."""
        one = pipeline(broker.url(destination))
        one.log(3000, sessions=1000)
        one.arrive()
        one.others_are_unaffected()
        assert check(one.written(), broker.received(destination)) == 0
        assert one.stats.sent == 3000
        assert one.errors == []

    def test_what_is_too_large_is_parked(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """An event over the limit is parked with its reason and holds nobody back."""
        one = pipeline(broker.url(destination, **self.oversize))
        one.log(3)
        one.log(1, text="x" * 3000)
        one.log(3)
        one.arrive()
        [parked] = [w for lines in one.written().values() for w in lines if len(w) > 3000]
        written = {s: [w for w in lines if w != parked] for s, lines in one.written().items()}
        check(written, broker.received(destination))
        assert one.stats.rejected == 1
        [path] = (one.base / ".eventlog" / "rejected").iterdir()
        assert parked in path.read_bytes()
        assert any(isinstance(error, TransportRejectedError) for error in one.errors)

    def test_a_destination_that_is_not_there_is_waited_for(
        self, broker: Broker, pipeline: Callable[..., Pipeline]
    ) -> None:
        """An unknown destination is told and costs nothing: once it is made, all arrives."""
        name = f"late-{next(_numbers)}"
        broker.spoil(name)
        one = pipeline(broker.url(name))
        one.log(20, sessions=2)
        wait_for("a failure", lambda: one.stats.failed > 2)
        one.others_are_unaffected()
        broker.make(name)
        one.arrive()
        check(one.written(), broker.received(name))
        assert one.stats.rejected == 0

    def test_a_wrong_password_costs_nothing_and_is_not_told(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """With a wrong password nothing is parked, and neither it nor the right one is shown."""
        if not broker.passwords:
            pytest.skip("this server knows no passwords")
        wrong = "wr0ng/p@ss"
        one = pipeline(broker.url(destination, password=wrong))
        one.log(20, sessions=2)
        wait_for("a failure", lambda: one.stats.failed > 2)
        one.others_are_unaffected()
        shown = f"{one.transport!r} {one.name} {one.stats}"
        shown += "".join("".join(traceback.format_exception(error)) for error in one.errors)
        for secret in (wrong, PASSWORD):
            assert secret not in shown
        right = transport_of(broker.url(destination, name=one.name))
        one.handler.gateway.update_downstream_transport([right, one.other])
        one.arrive()
        check(one.written(), broker.received(destination))
        assert one.stats.rejected == 0

    def test_a_server_that_is_down_at_the_start(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """What is logged while the server is not there arrives once it is."""
        broker.kill()
        one = pipeline(broker.url(destination))
        one.log(200, sessions=5)
        wait_for("a failure", lambda: one.stats.failed > 0)
        one.others_are_unaffected()
        assert not one.stats.connected
        broker.start()
        one.arrive()
        check(one.written(), broker.received(destination))

    def test_a_server_killed_in_mid_batch(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """`kill -9` and a new start: at least once, in order, nothing lost."""
        one = pipeline(broker.url(destination, timeout_seconds=2))
        stop = threading.Event()

        def log() -> None:
            while not stop.is_set():
                one.log(20, sessions=7)
                stop.wait(0.001)

        thread = threading.Thread(target=log)
        thread.start()
        try:
            wait_for("the first batches", lambda: one.stats.sent > 100)
            broker.kill()
            wait_for("a failure", lambda: one.stats.failed > 0)
            broker.start()
        finally:
            stop.set()
            thread.join()
        one.arrive()
        one.others_are_unaffected()
        check(one.written(), broker.received(destination))
        assert one.stats.rejected == 0

    def test_a_server_that_hangs(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """Stopped for five seconds (SIGSTOP) and continued: at least once, nothing lost."""
        one = pipeline(broker.url(destination, timeout_seconds=1, connect_timeout_seconds=1))
        one.log(50, sessions=3)
        one.arrive()
        broker.pause()
        one.log(500, sessions=3)
        one.others_are_unaffected()
        stopped = threading.Event()
        stopped.wait(5)
        assert one.stats.failed > 0
        broker.resume()
        one.arrive()
        check(one.written(), broker.received(destination))
        assert one.stats.rejected == 0

    def test_a_lost_answer(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """An event whose acknowledgement is lost comes again, under the same id."""
        with self.proxy_type(broker.port) as proxy:
            one = pipeline(broker.url(destination, proxy.port, timeout_seconds=3))
            one.log(10)
            one.arrive()
            proxy.lose_answers()
            one.log(1)
            wait_for("the event", lambda: len(broker.received(destination)) == 11)
            # Nobody comes back before answers are passed on again.
            proxy.refuse()
            proxy.reset()
            proxy.pass_on()
            one.log(10)
            one.arrive()
            again = check(one.written(), broker.received(destination))
            assert again == (0 if broker.dedupes else 1)
            assert one.stats.failed > 0

    def test_a_connection_that_breaks_in_the_middle_of_a_batch(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """Half a batch, then a reset: nothing is lost, nothing is torn."""
        with self.proxy_type(broker.port) as proxy:
            one = pipeline(broker.url(destination, proxy.port, timeout_seconds=3))
            one.log(10)
            one.arrive()
            proxy.cut_after(20_000)
            one.log(300, sessions=3)
            wait_for("a failure", lambda: one.stats.failed > 0)
            proxy.pass_on()
            one.arrive()
            check(one.written(), broker.received(destination))
            assert one.stats.rejected == 0

    def test_tls_with_an_authority_of_ones_own(
        self, broker: Broker, destination: str, tmp_path: Path
    ) -> None:
        """With TLS the certificate is checked: ours is taken, another one is not."""
        if broker.tls_options is None:
            pytest.skip("the driver does not stay with the address of the URL")
        authority, other = trustme.CA(), trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        trusted, untrusted = tmp_path / "ca.pem", tmp_path / "other.pem"
        authority.cert_pem.write_to_path(str(trusted))
        other.cert_pem.write_to_path(str(untrusted))
        event = outgoing("chat-1", 1)

        async def send(port: int, ca: Path) -> bool:
            options = {**(broker.tls_options or {}), "tls_ca_file": str(ca)}
            transport = transport_of(broker.url(destination, port, **options))
            try:
                done: bool = await transport.send(event.line, event.metadata)
            finally:
                await transport.close()
            return done

        with leftovers_collected(), self.proxy_type(broker.port, context) as proxy:
            assert asyncio.run(send(proxy.port, trusted)) is True
            with pytest.raises(Exception, match="certificate verify failed"):
                asyncio.run(send(proxy.port, untrusted))
        assert broker.received(destination) == [Received(event.line, event.id, "chat-1")]

    def test_a_forked_child_has_its_own_connection(
        self, broker: Broker, destination: str, tmp_path: Path
    ) -> None:
        """Parent and child send at the same time, and the child's end is not the parent's."""
        config = CONFIG.format(url=json.dumps(broker.url(destination)))
        (tmp_path / "logging.yaml").write_text(config)
        # From 3.12 on Python warns of any fork beside a thread.
        app = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
        subprocess.run(app, cwd=tmp_path, check=True, timeout=FLUSH_SECONDS)
        written = written_in(tmp_path / "logs" / "sessions")
        assert {name: len(lines) for name, lines in written.items()} == dict.fromkeys(
            ("before", "parent", "child", "after"), 20
        )
        assert check(written, broker.received(destination)) == 0

    def test_end_to_end(self, broker: Broker, destination: str, tmp_path: Path) -> None:
        """A `dictConfig` with the URL, `logger.info`, and the example's consumer prints it all."""
        url, source = broker.example(destination)
        consumer = [sys.executable, str(CONSUMERS / self.consumer), source, "chat-42"]
        config = tmp_path / "logging.yaml"
        config.write_text(CONFIG.format(url=json.dumps(url)))
        with subprocess.Popen(consumer, stdout=subprocess.PIPE, cwd=tmp_path) as reading:
            assert reading.stdout is not None
            try:
                app = [sys.executable, "-W", "error", "-c", APP]
                subprocess.run(app, cwd=tmp_path, check=True, timeout=FLUSH_SECONDS)
                printed = [json.loads(reading.stdout.readline()) for _ in range(20)]
            finally:
                reading.kill()
        assert [event["message"] for event in printed] == [f"step {n}" for n in range(20)]
        assert {event["session_id"] for event in printed} == {"chat-42"}
