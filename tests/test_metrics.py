"""Figures as Prometheus and OpenTelemetry get them, from real gateways."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Gauge, InMemoryMetricReader, Sum
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from eventlog_handler import EventLogHandler, EventLogProcessor, EventSessionLogger, _breaker
from eventlog_handler.metrics import (
    BREAKER_STATES,
    METRICS,
    Metric,
    PrometheusCollector,
    Source,
    observe,
)
from eventlog_handler.testing import FailingTransport, RecordingTransport
from eventlog_handler.typing import Stats, TransportStats

Make = Callable[..., EventLogHandler]
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]
S1 = {"session_id": "s1"}

NOT_EXPORTED = {"last_error"}
ONE = TransportStats(1, 2, 3, 4, 5, 6, 7.5, "live", "closed", True, "token=abc refused")
ALL = Stats(1, 2, 3, 4, {"closed": 5}, 6, "disk", 0.5, 0.75, 0.25, "at-least-once", {"one": ONE})


class Fixed:
    """A source whose figures a test decides."""

    def __init__(self, stats: Stats) -> None:
        self.now = stats

    def stats(self) -> Stats:
        """Return them."""
        return self.now


@pytest.fixture
def reader() -> InMemoryMetricReader:
    """Collects when a test asks for it."""
    return InMemoryMetricReader()


@pytest.fixture
def meter(reader: InMemoryMetricReader) -> Iterator[Meter]:
    """A meter of the real SDK."""
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider.get_meter("tests")
    provider.shutdown()


def scraper(*sources: Source) -> Callable[[], str]:
    """Return a function that scrapes some sources as Prometheus would."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(PrometheusCollector(*sources))
    return lambda: generate_latest(registry).decode()


def text_of(stats: Stats) -> str:
    """Return a scrape of these figures."""
    source = Fixed(stats)
    return scraper(source)()


def figures_in(text: str) -> Figures:
    """Return the samples of a scrape by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(source: Source, name: str, **labels: str) -> float | None:
    """Return one sample of a source's only gateway, or None where there is none."""
    gateway = getattr(source, "gateway", source)
    labels["base"] = str(getattr(gateway, "log_base_dir", ""))
    return figures_in(scraper(source)()).get((name, frozenset(labels.items())))


def breaker(source: Source, transport: str) -> dict[str, float | None]:
    """Return the states of a transport's breaker."""
    name = "eventlog_transport_breaker"
    return {s: scraped(source, name, transport=transport, state=s) for s in BREAKER_STATES}


def bases_in(text: str) -> set[str]:
    """Return the values of the label `base` in a scrape."""
    return {dict(labels)["base"] for _, labels in figures_in(text)}


def collected(reader: InMemoryMetricReader) -> list[Any]:
    """Return the metrics that OpenTelemetry has collected now."""
    data = reader.get_metrics_data()
    scopes = [] if data is None else [s for r in data.resource_metrics for s in r.scope_metrics]
    return [metric for scope in scopes for metric in scope.metrics]


def changed(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, dict):
        return {}
    if isinstance(value, str):
        return {"live": "behind", "closed": "open"}.get(value, f"other {value}")
    return not value if isinstance(value, bool) else value + 1


def test_the_names_are_those_that_dashboards_are_built_on() -> None:
    """Every metric has its conventional name, type and labels."""
    families = text_string_to_metric_families(text_of(ALL))
    found = [(f.type, s.name, *s.labels) for f in families for s in f.samples]
    assert list(dict.fromkeys(found)) == [
        ("counter", "eventlog_received_total", "base"),
        ("counter", "eventlog_written_total", "base"),
        ("counter", "eventlog_file_written_bytes_total", "base"),
        ("counter", "eventlog_local_errors_total", "base"),
        ("counter", "eventlog_dropped_total", "base", "reason"),
        ("gauge", "eventlog_handoff_depth", "base"),
        ("gauge", "eventlog_overhead_mean_seconds", "base"),
        ("gauge", "eventlog_overhead_max_seconds", "base"),
        ("gauge", "eventlog_direct_mean_seconds", "base"),
        ("gauge", "eventlog_info", "base", "delivery", "durability"),
        ("counter", "eventlog_transport_sent_total", "base", "transport"),
        ("counter", "eventlog_transport_failed_total", "base", "transport"),
        ("counter", "eventlog_transport_retried_total", "base", "transport"),
        ("counter", "eventlog_transport_rejected_total", "base", "transport"),
        ("counter", "eventlog_transport_dropped_total", "base", "transport"),
        ("gauge", "eventlog_transport_lag_events", "base", "transport"),
        ("gauge", "eventlog_transport_lag_seconds", "base", "transport"),
        ("gauge", "eventlog_transport_connected", "base", "transport"),
        ("gauge", "eventlog_transport_behind", "base", "transport"),
        ("gauge", "eventlog_transport_breaker", "base", "state", "transport"),
    ]


def test_every_metric_says_what_it_is() -> None:
    """A metric's description stands above its samples."""
    lines = text_of(ALL).splitlines()
    help_lines = [f"# HELP {m.prometheus_name} {m.description}" for m in METRICS]
    assert [line for line in lines if line.startswith("# HELP")] == help_lines


@pytest.mark.parametrize("field", [f for f in Stats._fields if f != "transports"])
def test_every_figure_of_a_gateway_is_exported(field: str) -> None:
    """A field of `Stats` that no row of the table reads would change nothing in a scrape."""
    other = ALL._replace(**{field: changed(getattr(ALL, field))})
    assert text_of(other) != text_of(ALL)


@pytest.mark.parametrize("field", [f for f in TransportStats._fields if f not in NOT_EXPORTED])
def test_every_figure_of_a_transport_is_exported(field: str) -> None:
    """A field of `TransportStats` that no row reads would change nothing in a scrape."""
    one = ONE._replace(**{field: changed(getattr(ONE, field))})
    assert text_of(ALL._replace(transports={"one": one})) != text_of(ALL)


@pytest.mark.parametrize("field", sorted(NOT_EXPORTED))
def test_what_may_hold_a_secret_is_not_exported(field: str) -> None:
    """The last error, which may quote an endpoint's answer, is in no scrape."""
    nothing: dict[str, Any] = {field: None}
    one = ONE._replace(**nothing)
    assert text_of(ALL._replace(transports={"one": one})) == text_of(ALL)


def test_the_states_of_the_breaker_are_all_there() -> None:
    """The states that are told are those that a breaker can have."""
    assert set(BREAKER_STATES) == {_breaker.CLOSED, _breaker.OPEN, _breaker.HALF_OPEN}


def test_written_events_are_counted(make_handler: Make, logger: logging.Logger) -> None:
    """Events and bytes are those of the session file."""
    handler = make_handler()
    logger.addHandler(handler)
    logger.info("one", extra=S1)
    logger.info("two", extra=S1)
    handler.flush()
    size = handler.gateway.get_log_file_path("s1").stat().st_size
    assert scraped(handler, "eventlog_received_total") == 2
    assert scraped(handler, "eventlog_written_total") == 2
    assert scraped(handler, "eventlog_file_written_bytes_total") == size
    assert scraped(handler, "eventlog_handoff_depth") == 0


def test_lost_events_are_counted_by_reason(make_handler: Make, logger: logging.Logger) -> None:
    """An event that gets no line is counted under the reason why."""
    handler = make_handler(missing_session="ignore")
    logger.addHandler(handler)
    logger.info("nobody's")
    handler.close()
    logger.info("late", extra=S1)
    assert scraped(handler, "eventlog_dropped_total", reason="no_session") == 1
    assert scraped(handler, "eventlog_dropped_total", reason="closed") == 1


def test_a_local_error_is_no_transports_failure(make_handler: Make, logger: logging.Logger) -> None:
    """What fails before the file raises the local error rate alone."""
    handler = make_handler(
        log_format="custom",
        formatter=lambda line: 1 // 0,
        downstream_transport=RecordingTransport(),
    )
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.flush()
    assert scraped(handler, "eventlog_local_errors_total") == 1
    assert scraped(handler, "eventlog_transport_failed_total", transport="recording") == 0


def test_a_transports_failure_is_no_local_error(make_handler: Make, logger: logging.Logger) -> None:
    """What fails downstream raises the transport's error rate alone."""
    transport = FailingTransport(failures=1, healthy=True)
    handler = make_handler(downstream_transport=transport, retry_delay_seconds=0.0)
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.flush(until="transport")
    assert scraped(handler, "eventlog_local_errors_total") == 0
    assert scraped(handler, "eventlog_transport_failed_total", transport="failing") == 1
    assert scraped(handler, "eventlog_transport_retried_total", transport="failing") == 1
    assert scraped(handler, "eventlog_transport_sent_total", transport="failing") == 1


def test_a_transport_that_is_well_shows_it(make_handler: Make) -> None:
    """A connected transport whose breaker is closed is not behind."""
    handler = make_handler(downstream_transport=RecordingTransport())
    assert scraped(handler, "eventlog_transport_connected", transport="recording") == 1
    assert scraped(handler, "eventlog_transport_behind", transport="recording") == 0
    assert breaker(handler, "recording") == {"closed": 1, "open": 0, "half-open": 0}


def test_an_outage_shows(make_handler: Make, logger: logging.Logger) -> None:
    """While the far side is down the breaker is open, and events wait."""
    failed = threading.Event()
    handler = make_handler(
        downstream_transport=FailingTransport.down(),
        error_handler=lambda error, context: failed.set(),
        max_retry_attempts=0,
        breaker_failures=1,
        shutdown_timeout_seconds=0.1,
    )
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    assert failed.wait(10)
    handler.close()
    assert breaker(handler, "down") == {"closed": 0, "open": 1, "half-open": 0}
    assert scraped(handler, "eventlog_transport_behind", transport="down") == 1
    assert scraped(handler, "eventlog_transport_lag_events", transport="down") == 1
    assert (scraped(handler, "eventlog_transport_lag_seconds", transport="down") or 0) > 0
    assert scraped(handler, "eventlog_transport_connected", transport="down") == 0


@pytest.mark.anyio
async def test_overhead_can_be_set_against_direct_logging(base: Path) -> None:
    """What a call costs, at most and on average, is not less than the write that is in it."""
    async with EventSessionLogger(base) as gateway:
        await gateway({"type": "t", **S1})
        direct = scraped(gateway, "eventlog_direct_mean_seconds")
        mean = scraped(gateway, "eventlog_overhead_mean_seconds")
        longest = scraped(gateway, "eventlog_overhead_max_seconds")
    assert direct is not None
    assert mean is not None
    assert 0 < direct <= mean
    assert mean == longest


def test_what_is_promised_stands_in_labels(make_handler: Make) -> None:
    """Durability and delivery are labels of a gauge that is always 1."""
    handler = make_handler(durability="memory")
    stats = handler.stats()
    labels = {"durability": "memory", "delivery": stats.delivery}
    assert scraped(handler, "eventlog_info", **labels) == 1


def test_sources_are_told_apart_by_their_base(make_handler: Make, tmp_path: Path) -> None:
    """Each gateway's figures carry its base directory."""
    one, two = tmp_path / "one", tmp_path / "two"
    scrape = scraper(make_handler(log_base_dir=one), make_handler(log_base_dir=two))
    assert bases_in(scrape()) == {str(one), str(two)}


def test_gateways_of_one_base_are_told_apart_by_a_number(make_handler: Make, base: Path) -> None:
    """No two series have the same labels, even where two gateways have the same base."""
    first, second = make_handler(), make_handler()
    assert bases_in(scraper(first, second)()) == {str(base), f"{base}#2"}


def test_a_shared_gateway_is_reported_once(make_handler: Make, base: Path) -> None:
    """A handler, a processor and the gateway behind both are one."""
    gateway = EventSessionLogger(base)
    handler = make_handler(gateway=gateway)
    processor = EventLogProcessor(gateway=gateway)
    text = scraper(handler, processor, gateway)()
    processor.close()
    assert bases_in(text) == {str(base)}
    assert text.count("eventlog_received_total{") == 1


def test_a_gateway_outlives_the_source_that_named_it(make_handler: Make, base: Path) -> None:
    """Where one of two handlers is gone, the gateway that they share is still reported."""
    gateway = EventSessionLogger(base)
    make_handler(gateway=gateway)
    scrape = scraper(EventLogHandler(gateway=gateway), gateway)
    gc.collect()
    assert bases_in(scrape()) == {str(base)}


def test_a_closed_gateway_is_reported_while_it_is_there(
    make_handler: Make, logger: logging.Logger
) -> None:
    """The last scrape has the final figures."""
    handler = make_handler()
    logger.addHandler(handler)
    scrape = scraper(handler)
    logger.info("last", extra=S1)
    handler.close()
    assert " 1.0" in next(line for line in scrape().splitlines() if "_written_total{" in line)


def test_a_gateway_that_is_gone_is_left_out(make_handler: Make, tmp_path: Path) -> None:
    """Being scraped keeps no gateway alive, and the others are reported as ever."""
    gone = EventSessionLogger(tmp_path / "gone")
    scrape = scraper(gone, make_handler(log_base_dir=tmp_path / "there"))
    assert str(tmp_path / "gone") in bases_in(scrape())
    del gone
    gc.collect()
    assert bases_in(scrape()) == {str(tmp_path / "there")}


def test_opentelemetry_goes_by_the_same_table(reader: InMemoryMetricReader, meter: Meter) -> None:
    """Each row is an instrument with its name, unit, description and kind."""
    source = Fixed(ALL)
    observe(meter, source)
    kinds = {"counter": Sum, "gauge": Gauge}
    found = [(m.name, m.unit, m.description, type(m.data)) for m in collected(reader)]
    assert found == [(m.name, m.unit, m.description, kinds[m.kind]) for m in METRICS]


def test_opentelemetry_counters_add_up_for_ever(reader: InMemoryMetricReader, meter: Meter) -> None:
    """A counter is monotonic."""
    source = Fixed(ALL)
    observe(meter, source)
    sums = [metric.data for metric in collected(reader) if isinstance(metric.data, Sum)]
    assert sums
    assert all(data.is_monotonic for data in sums)


def test_both_backends_tell_the_same(
    make_handler: Make, logger: logging.Logger, reader: InMemoryMetricReader, meter: Meter
) -> None:
    """For a handler at rest every sample of the one is a data point of the other."""
    handler = make_handler(downstream_transport=RecordingTransport())
    logger.addHandler(handler)
    logger.info("hello", extra=S1)
    handler.close()
    logger.info("late", extra=S1)
    observe(meter, handler)
    names = {metric.name: metric.prometheus_name for metric in METRICS}
    points = {
        (names[metric.name], frozenset(point.attributes.items())): point.value
        for metric in collected(reader)
        for point in metric.data.data_points
    }
    assert points == figures_in(scraper(handler)())


def test_opentelemetry_sees_what_is_new(
    make_handler: Make, logger: logging.Logger, reader: InMemoryMetricReader, meter: Meter
) -> None:
    """Figures are read at each collection."""
    handler = make_handler()
    logger.addHandler(handler)
    observe(meter, handler)
    seen = []
    for _ in range(2):
        logger.info("hello", extra=S1)
        handler.flush()
        written = next(m for m in collected(reader) if m.name == "eventlog.written")
        seen += [point.value for point in written.data.data_points]
    assert seen == [1, 2]


def test_opentelemetry_keeps_no_gateway_alive(
    base: Path, reader: InMemoryMetricReader, meter: Meter
) -> None:
    """What is gone has no data points any more."""
    gateway = EventSessionLogger(base)
    observe(meter, gateway)
    assert collected(reader) != []
    del gateway
    gc.collect()
    assert [point for metric in collected(reader) for point in metric.data.data_points] == []


def test_a_missing_prometheus_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its library the collector says what to type."""
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match=r"pip install 'eventlog-handler\[prometheus\]'"):
        PrometheusCollector()


def test_a_missing_opentelemetry_is_named(monkeypatch: pytest.MonkeyPatch, meter: Meter) -> None:
    """Without its library `observe` says what to type."""
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'eventlog-handler\[otel\]'"):
        observe(meter)


def loaded(code: str) -> set[str]:
    """Return which modules a fresh interpreter has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_package_does_without_metrics() -> None:
    """Who does not ask for metrics loads none of it."""
    assert "eventlog_handler.metrics" not in loaded("import eventlog_handler")


def test_each_backend_does_without_the_other() -> None:
    """The module loads neither library, and the collector only its own."""
    libraries = {"prometheus_client", "opentelemetry"}
    module = "import eventlog_handler.metrics as m"
    assert loaded(module) & libraries == set()
    assert loaded(f"{module}; m.PrometheusCollector()") & libraries == {"prometheus_client"}


def test_a_row_is_named_by_kind_and_unit() -> None:
    """Prometheus's name is OpenTelemetry's, with the unit, and with `_total` if it counts."""
    row = Metric("a.b", "counter", "By", (), "", lambda stats: [])
    assert row.prometheus_name == "a_b_bytes_total"
    assert row._replace(kind="gauge", unit="s").prometheus_name == "a_b_seconds"
    assert row._replace(unit="{event}").prometheus_name == "a_b_total"
