"""OpenTelemetry logs over HTTP: `otlp://host:4318/v1/logs#tls=true&service=shop`."""

from __future__ import annotations

import gzip
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

from eventlog_handler._config import check_one_of, setting
from eventlog_handler._snapshot import json_object
from eventlog_handler.exceptions import TransportConnectionError, TransportRejectedError
from eventlog_handler.transports._remote import RemoteOptions, needs, text_or_none
from eventlog_handler.typing import OutgoingEvent

with needs("otlp"):
    from aiohttp import ClientResponse
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
        ExportLogsServiceRequest,
        ExportLogsServiceResponse,
    )
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber

    from eventlog_handler.transports.http import (
        HttpTransport,
        PartlyRejectedError,
        RequestOptions,
    )

KIND = "application/x-protobuf"
UNSPECIFIED = SeverityNumber.SEVERITY_NUMBER_UNSPECIFIED
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
SEVERITIES = {
    "TRACE": SeverityNumber.SEVERITY_NUMBER_TRACE,
    "DEBUG": SeverityNumber.SEVERITY_NUMBER_DEBUG,
    "INFO": SeverityNumber.SEVERITY_NUMBER_INFO,
    "WARN": SeverityNumber.SEVERITY_NUMBER_WARN,
    "WARNING": SeverityNumber.SEVERITY_NUMBER_WARN,
    "ERROR": SeverityNumber.SEVERITY_NUMBER_ERROR,
    "CRITICAL": SeverityNumber.SEVERITY_NUMBER_FATAL,
    "FATAL": SeverityNumber.SEVERITY_NUMBER_FATAL,
}
"""Of logging's levels, as the log data model maps them (opentelemetry.io/docs/specs/otel/logs)."""


@dataclass(frozen=True, repr=False)
class OtlpOptions(RequestOptions):
    """Options of `OtlpTransport`.

    Args:
        service: The resource's `service.name`; else the variable OTEL_SERVICE_NAME.
        compression: `none` or `gzip`, of requests.
    """

    service: str | None = setting(None, text_or_none)
    compression: str = setting("none", check_one_of("none", "gzip"))


class OtlpTransport(HttpTransport):
    """Exports each event as a log record, a batch in one request.

    A record's body is exactly the session file's line. Its attributes are `log.record.uid`, the
    event's id (by the semantic conventions, what has the same one is a duplicate), `session.id`,
    and `eventlog.type`; lone surrogates, which protobuf does not take, are escaped as in Python.
    `event_name` is the type too. Severity, trace and span come from the event's fields `level`,
    `trace_id` or `otelTraceID`, and `span_id` or `otelSpanID`.

    The collector has the event once it answers 2xx; how well it keeps it is the collector's own.
    Where it refuses some records of a request (`partial_success`), it does not say which: all are
    sent again, one by one, so that those that it has taken come twice.

    The path is `/v1/logs` unless there is one. What is general to HTTP, `HttpTransport` says.
    """

    ports: ClassVar[dict[str, int]] = {"otlp": 4318}
    tls_schemes: ClassVar[tuple[str, ...]] = ()
    options_type: ClassVar[type[RemoteOptions]] = OtlpOptions
    default_path: ClassVar[str] = "/v1/logs"
    extra_bytes: ClassVar[int] = 500

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        service = self.options.service or os.environ.get("OTEL_SERVICE_NAME") or "unknown_service"
        self._service = _text(service)

    def _request(self, batch: Sequence[OutgoingEvent]) -> tuple[bytes, dict[str, str]]:
        request = ExportLogsServiceRequest()
        logs = request.resource_logs.add()
        _add(logs.resource.attributes, "service.name", self._service)
        scope = logs.scope_logs.add()
        scope.scope.name = "eventlog_handler"
        now = time.time_ns()
        for event in batch:
            _fill(scope.log_records.add(), event, now)
        body = request.SerializeToString()
        if self.options.compression == "none":
            return body, {"Content-Type": KIND}
        return gzip.compress(body, 1), {"Content-Type": KIND, "Content-Encoding": "gzip"}

    def _check(self, batch: Sequence[OutgoingEvent], answer: ClientResponse, said: bytes) -> None:
        super()._check(batch, answer, said)
        try:
            partial = ExportLogsServiceResponse.FromString(said).partial_success
        except DecodeError:
            raise TransportConnectionError(
                f"{self.address.shown} answers {answer.status}, but not in OTLP: "
                f"{self._told(said.decode(errors='replace'))}"
            ) from None
        if partial.rejected_log_records > 0:
            meaning = TransportRejectedError if len(batch) == 1 else PartlyRejectedError
            told = self._told(partial.error_message)
            raise meaning(f"{partial.rejected_log_records} of {len(batch)} refused: {told}")


def _fill(record: LogRecord, event: OutgoingEvent, now: int) -> None:
    """Put an event into a log record, field by field: the constructors take three times as long.

    Args:
        record: Empty.
        event: Any; what is not in its line, or makes no sense, is left out.
        now: Nanoseconds since 1970.
    """
    content = (json_object(event.line) or {}).get("event")
    fields = content if isinstance(content, dict) else {}
    record.time_unix_nano = _nanoseconds(event.timestamp)
    record.observed_time_unix_nano = now
    record.event_name = kind = _text(event.type)
    record.body.string_value = event.line.decode()
    _add(record.attributes, "log.record.uid", event.id)
    _add(record.attributes, "session.id", _text(event.session_id))
    _add(record.attributes, "eventlog.type", kind)
    level = fields.get("level")
    if isinstance(level, str):
        record.severity_text = level
        record.severity_number = SEVERITIES.get(level.upper(), UNSPECIFIED)
    record.trace_id = _hex(fields, 16, "trace_id", "otelTraceID")
    if record.trace_id:
        record.span_id = _hex(fields, 8, "span_id", "otelSpanID")


def _add(attributes: Any, key: str, value: str) -> None:
    attribute = attributes.add()
    attribute.key = key
    attribute.value.string_value = value


def _text(text: str) -> str:
    """Return a text that protobuf takes: valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _hex(fields: Mapping[str, Any], size: int, *names: str) -> bytes:
    """Return the first of these fields that is an id; one of zeros is none."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and re.fullmatch(f"[0-9a-fA-F]{{{2 * size}}}", value):
            found = bytes.fromhex(value)
            if any(found):
                return found
    return b""


def _nanoseconds(timestamp: str) -> int:
    """Return a time since 1970, to the microsecond; 0 where there is none."""
    try:
        since = datetime.fromisoformat(timestamp) - EPOCH
    except (ValueError, TypeError):
        return 0
    return max(0, since // timedelta(microseconds=1) * 1000)
