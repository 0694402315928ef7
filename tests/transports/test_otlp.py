"""OpenTelemetry logs, against a receiver of the tests' own, and through a collector."""

from __future__ import annotations

import asyncio
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import rotel
from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs

from eventlog_handler import (
    OutgoingEvent,
    TransportConnectionError,
    TransportRejectedError,
)
from eventlog_handler.transports.otlp import OtlpTransport
from tests.transports.contract import (
    Pipeline,
    TransportContract,
    check,
    outgoing,
)
from tests.transports.servers import PASSWORD, Broker, Received, encoded, free_port, query, wait_for
from tests.transports.test_http import (
    LOGIN,
    Answer,
    HttpReceiver,
    Seen,
    always,
    serving,
)


class OtlpReceiver(HttpReceiver):
    """The receiver of `test_http.py`, which decodes what is exported before it writes it down.

    A collector acknowledges what it has in memory, so that a killed one has lost what it had
    acknowledged; here this would not tell a fault of the transport.
    """

    tls_options = {"tls": "true"}

    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return the URL of a path."""
        password = encoded(options.pop("password", PASSWORD))
        address = f"otlp://user:{password}@127.0.0.1:{port or self.port}/{destination}"
        return f"{address}#{query(**options)}"

    def example(self, destination: str) -> tuple[str, str]:
        """Return a URL at which the consumer itself is the server, twice."""
        url = f"otlp://127.0.0.1:{free_port()}"
        return url, url


class Collector(OtlpReceiver):
    """rotel, which exports to a receiver what is exported to it.

    Args:
        folder: Its data.
        receiver: Where it exports to, and what was received.
        destination: The path there.
    """

    def __init__(self, folder: Path, receiver: Broker, destination: str) -> None:
        super().__init__(folder)
        self._receiver = receiver
        self._to = f"http://127.0.0.1:{receiver.port}/{destination}"

    def command(self) -> list[str]:
        """Return the command."""
        options = {
            "pid-file": self.folder / "pid",
            "log-file": self.folder / "log",
            "otlp-http-endpoint": f"127.0.0.1:{self.port}",
            "otlp-grpc-endpoint": f"127.0.0.1:{free_port()}",
            "exporter": "otlp",
            "otlp-exporter-protocol": "http",
            "otlp-exporter-endpoint": self._to,
            "otlp-exporter-logs-endpoint": self._to,
            "otlp-exporter-custom-headers": f"Authorization={LOGIN}",
        }
        pairs = [[f"--{name}", str(value)] for name, value in options.items()]
        program = Path(rotel.__file__).parent / "rotel-agent"
        return [str(program), "start", *(word for pair in pairs for word in pair)]

    def environment(self) -> dict[str, str]:
        """Let it find the libpython that it is linked with."""
        return {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}

    def received(self, destination: str) -> list[Received]:
        """Return what has come out of it."""
        return self._receiver.received(destination)


class TestOtlp(TransportContract):
    """The contract."""

    broker_type = OtlpReceiver
    consumer = "from_otlp.py"

    def test_gzip(
        self, broker: Broker, destination: str, pipeline: Callable[..., Pipeline]
    ) -> None:
        """Requests that are packed arrive like others."""
        one = pipeline(broker.url(destination, compression="gzip"))
        one.log(200, sessions=7)
        one.arrive()
        assert check(one.written(), broker.received(destination)) == 0

    @pytest.mark.parametrize("compression", ["none", "gzip"])
    def test_through_a_collector(
        self,
        broker: Broker,
        destination: str,
        pipeline: Callable[..., Pipeline],
        tmp_path: Path,
        compression: str,
    ) -> None:
        """A collector that others have written takes it all, and passes on what it was given."""
        collector = Collector(tmp_path / "rotel", broker, destination)
        try:
            collector.start()
            one = pipeline(f"otlp://127.0.0.1:{collector.port}#compression={compression}")
            one.log(300, sessions=7)
            one.arrive()
            wait_for("the collector", lambda: len(broker.received(destination)) == 300)
        finally:
            collector.kill()
        assert check(one.written(), broker.received(destination)) == 0


# One request, to a server in this process that answers as it is told.


def accepted(rejected: int = 0, said: str = "") -> bytes:
    """Return an answer."""
    answer = ExportLogsServiceResponse()
    if rejected or said:
        answer.partial_success.rejected_log_records = rejected
        answer.partial_success.error_message = said
    return answer.SerializeToString()


def exchange(
    answer: Answer, batch: list[OutgoingEvent], **options: Any
) -> tuple[list[Any], list[Seen]]:
    """Send a batch; return how it went, and what the server has seen."""

    async def run() -> tuple[list[Any], list[Seen]]:
        async with serving(answer) as (url, seen):
            transport = OtlpTransport(url.replace("http", "otlp"), **options)
            try:
                return await transport.send_batch(batch), seen
            finally:
                await transport.close()

    return asyncio.run(run())


def exported(batch: list[OutgoingEvent], **options: Any) -> tuple[Seen, ResourceLogs]:
    """Send a batch that is taken; return the request and what is in it."""
    outcomes, [seen] = exchange(always(200), batch, **options)
    assert outcomes == [None] * len(batch)
    [logs] = ExportLogsServiceRequest.FromString(seen.body).resource_logs
    return seen, logs


def record_of(event: OutgoingEvent) -> LogRecord:
    """Send one event; return its record."""
    [scope] = exported([event])[1].scope_logs
    [record] = scope.log_records
    return record


def with_fields(**fields: Any) -> OutgoingEvent:
    """Return an event that has these fields."""
    event = outgoing("s", 1)
    return event._replace(line=orjson.dumps({**orjson.loads(event.line), "event": fields}))


def attributes(record: LogRecord) -> dict[str, str]:
    """Return a record's attributes."""
    return {each.key: each.value.string_value for each in record.attributes}


def test_a_batch_is_one_request() -> None:
    """All records stand in one scope of one resource, in order, at the path of the protocol."""
    batch = [outgoing(f"s{n % 2}", n) for n in range(5)]
    seen, logs = exported(batch)
    assert seen.target == "/v1/logs"
    assert seen.headers["Content-Type"] == "application/x-protobuf"
    [scope] = logs.scope_logs
    assert scope.scope.name == "eventlog_handler"
    assert [each.body.string_value.encode() for each in scope.log_records] == [
        each.line for each in batch
    ]


def test_a_record() -> None:
    """It has time, type, id and session of the event, whose line is the body."""
    before = time.time_ns()
    event = outgoing("chat-1", 1, "→")._replace(type="tool call")
    record = record_of(event)
    assert record.body.string_value.encode() == event.line
    assert record.time_unix_nano == 1_795_329_116_123_456_000
    assert before <= record.observed_time_unix_nano <= time.time_ns()
    assert record.event_name == "tool call"
    assert attributes(record) == {
        "log.record.uid": event.id,
        "session.id": "chat-1",
        "eventlog.type": "tool call",
    }
    assert record.severity_number == 0
    assert record.severity_text == ""
    assert record.trace_id == record.span_id == b""


def test_lone_surrogates_are_escaped() -> None:
    """Protobuf takes valid UTF-8 only."""
    event = outgoing("s", 1)._replace(session_id="a\ud800→", type="\udc80")
    record = record_of(event)
    assert attributes(record)["session.id"] == "a\\ud800→"
    assert record.event_name == "\\udc80"


@pytest.mark.parametrize(
    ("level", "number", "text"),
    [
        ("DEBUG", 5, "DEBUG"),
        ("info", 9, "info"),
        ("WARNING", 13, "WARNING"),
        ("warn", 13, "warn"),
        ("error", 17, "error"),
        ("CRITICAL", 21, "CRITICAL"),
        ("fatal", 21, "fatal"),
        ("AUDIT", 0, "AUDIT"),
        (30, 0, ""),
    ],
)
def test_severities(level: Any, number: int, text: str) -> None:
    """The names of logging and structlog are known; others are told as they are."""
    record = record_of(with_fields(level=level))
    assert (record.severity_number, record.severity_text) == (number, text)


TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("fields", "trace", "span"),
    [
        ({"trace_id": TRACE, "span_id": SPAN}, TRACE, SPAN),
        ({"otelTraceID": TRACE.upper(), "otelSpanID": SPAN}, TRACE, SPAN),
        ({"trace_id": "mine", "otelTraceID": TRACE, "span_id": 5}, TRACE, ""),
        ({"otelTraceID": "0", "otelSpanID": "0"}, "", ""),
        ({"trace_id": "0" * 32, "span_id": SPAN}, "", ""),
        ({"trace_id": TRACE + "00", "span_id": SPAN}, "", ""),
    ],
)
def test_traces(fields: dict[str, Any], trace: str, span: str) -> None:
    """Ids that are ids in hexadecimal are told; no span without its trace."""
    record = record_of(with_fields(**fields))
    assert (record.trace_id.hex(), record.span_id.hex()) == (trace, span)


@pytest.mark.parametrize("line", [b"text", b"[1]", b'{"event": "text"}', b"{"])
def test_a_line_that_is_no_event(line: bytes) -> None:
    """What `send` gets from others arrives as it is."""
    record = record_of(OutgoingEvent(line, "", "", "", ""))
    assert record.body.string_value.encode() == line
    assert record.time_unix_nano == 0


@pytest.mark.parametrize(
    ("timestamp", "nanoseconds"),
    [
        ("1970-01-01T01:00:00.000001+01:00", 1000),
        ("1969-12-31T00:00:00+00:00", 0),
        ("2026-11-22T06:31:56", 0),
        ("soon", 0),
    ],
)
def test_times(timestamp: str, nanoseconds: int) -> None:
    """Exact to the microsecond; what is no time, or none in a zone, is 0: not known."""
    assert record_of(outgoing("s", 1)._replace(timestamp=timestamp)).time_unix_nano == nanoseconds


def test_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """`service.name` is the option, else the environment's, else as the conventions say."""
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    names = []
    for environment, options in ((None, {}), ("shop", {}), ("shop", {"service": "till"})):
        if environment:
            monkeypatch.setenv("OTEL_SERVICE_NAME", environment)
        _, logs = exported([outgoing("s", 1)], **options)
        names += [(each.key, each.value.string_value) for each in logs.resource.attributes]
    assert [value for _, value in names] == ["unknown_service", "shop", "till"]
    assert {key for key, _ in names} == {"service.name"}


def test_compression() -> None:
    """With gzip a request says so, and is smaller."""
    batch = [outgoing("s", n) for n in range(50)]
    seen, _ = exported(batch, compression="gzip")
    plain, _ = exported(batch)
    assert seen.headers["Content-Encoding"] == "gzip"
    assert "Content-Encoding" not in plain.headers
    assert int(seen.headers["Content-Length"]) < len(plain.body) / 4


def test_some_records_are_refused() -> None:
    """Which ones is not said, so all are sent one by one, and the refused one is told."""
    sizes = []

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        [logs] = ExportLogsServiceRequest.FromString(body).resource_logs
        records = logs.scope_logs[0].log_records
        sizes.append(len(records))
        refused = sum('"n":2' in each.body.string_value for each in records)
        return web.Response(body=accepted(refused, "too old" if refused else ""))

    outcomes, _ = exchange(answer, [outgoing("s", n) for n in range(4)])
    assert sizes == [4, 1, 1, 1, 1]
    assert [type(each) for each in outcomes] == [
        type(None),
        type(None),
        TransportRejectedError,
        type(None),
    ]
    assert str(outcomes[2]) == "1 of 1 refused: too old"


def test_a_warning_is_no_refusal() -> None:
    """`partial_success` without rejected records confirms."""

    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        return web.Response(body=accepted(0, "deprecated"))

    assert exchange(answer, [outgoing("s", 1)])[0] == [None]


def test_an_answer_of_something_else() -> None:
    """A web page that answers 200 to everything has not taken the event."""
    [error], _ = exchange(always(200, "<!DOCTYPE html>"), [outgoing("s", 1)])
    assert isinstance(error, TransportConnectionError)
    assert "answers 200, but not in OTLP: <!DOCTYPE html>" in str(error)


def test_refused_by_status() -> None:
    """A status that is final parks the event, one of an overload does not."""
    assert type(exchange(always(400), [outgoing("s", 1)])[0][0]) is TransportRejectedError
    assert type(exchange(always(429), [outgoing("s", 1)])[0][0]) is TransportConnectionError


def test_addresses() -> None:
    """Port and path are the protocol's where there are none; TLS is an option."""
    told = {
        "otlp://h": "http://h:4318/v1/logs",
        "otlp://h/": "http://h:4318/v1/logs",
        "otlp://h:80/otlp/v1/logs?key=x": "http://h/otlp/v1/logs?key=x",
        "otlp://h#tls=true": "https://h:4318/v1/logs",
    }
    assert {url: str(OtlpTransport(url)._url) for url in told} == told
    assert str(OtlpTransport("otlp://h", tls=True)._url) == "https://h:4318/v1/logs"
    assert OtlpTransport("otlp://u:p@h?key=x").name == "otlp://h:4318"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("otlp://h#compression=zstd", "write one of 'none', 'gzip'"),
        ("otlp://h#format=json", "'format' is not an option"),
        ("otlp://h#service=", "service"),
    ],
)
def test_options_that_cannot_be(url: str, said: str) -> None:
    """A wrong option is told where it is configured."""
    with pytest.raises((TypeError, ValueError), match=said):
        OtlpTransport(url)
