"""A gateway's figures for Prometheus and for OpenTelemetry, both out of one table: `METRICS`.

Neither library is imported before its own class or function is used.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from eventlog_handler.typing import Stats, TransportStats

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

BREAKER_STATES = ("closed", "open", "half-open")

Sample = tuple[tuple[str, ...], float]
"""The labels' values, in the order of their names, and the figure."""


class Source(Protocol):
    """What has figures: an `EventSessionLogger`, `EventLogHandler` or `EventLogProcessor`."""

    def stats(self) -> Stats:
        """Return the figures since the gateway began."""


class Metric(NamedTuple):
    """One row of the table."""

    name: str
    """As OpenTelemetry knows it."""
    kind: Literal["counter", "gauge"]
    unit: str
    """As UCUM writes it: `s`, `By`, or what is counted, in braces."""
    labels: tuple[str, ...]
    """Names of the labels beside `base`."""
    description: str
    read: Callable[[Stats], Iterable[Sample]]

    @property
    def prometheus_name(self) -> str:
        """The name as Prometheus writes it: underscores, the unit, and `_total` if it counts."""
        unit = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        total = "_total" if self.kind == "counter" else ""
        return self.name.replace(".", "_") + unit + total


def _own(read: Callable[[Stats], float]) -> Callable[[Stats], list[Sample]]:
    return lambda stats: [((), read(stats))]


def _each(read: Callable[[TransportStats], float]) -> Callable[[Stats], list[Sample]]:
    return lambda stats: [((name,), read(one)) for name, one in stats.transports.items()]


def _breaker(stats: Stats) -> Iterable[Sample]:
    for name, one in stats.transports.items():
        for state in BREAKER_STATES:
            yield (name, state), int(one.breaker == state)


# `last_error` is in no row: it may quote what an endpoint answered.
# fmt: off
METRICS = (
    Metric("eventlog.received", "counter", "{event}", (),
           "Events handed over: written, waiting or dropped.", _own(lambda s: s.received)),
    Metric("eventlog.written", "counter", "{event}", (),
           "Events written to session files.", _own(lambda s: s.written)),
    Metric("eventlog.file.written", "counter", "By", (),
           "Bytes written to session files.", _own(lambda s: s.bytes)),
    Metric("eventlog.local_errors", "counter", "{error}", (),
           "Failures of writing and encoding, retries included.", _own(lambda s: s.local_errors)),
    Metric("eventlog.dropped", "counter", "{event}", ("reason",),
           "Events that got no line.", lambda s: [((r,), n) for r, n in s.dropped.items()]),
    Metric("eventlog.handoff_depth", "gauge", "{event}", (),
           "Events handed off and not yet in their files.", _own(lambda s: s.handoff_depth)),
    Metric("eventlog.overhead.mean", "gauge", "s", (),
           "Mean time of encoding and writing in a gateway call, since the beginning.",
           _own(lambda s: s.overhead_mean_seconds)),
    Metric("eventlog.overhead.max", "gauge", "s", (),
           "Longest time of encoding and writing in a gateway call, since the beginning.",
           _own(lambda s: s.overhead_max_seconds)),
    Metric("eventlog.direct.mean", "gauge", "s", (),
           "Mean time of the write alone: what logging directly would cost too.",
           _own(lambda s: s.direct_mean_seconds)),
    Metric("eventlog.info", "gauge", "{gateway}", ("durability", "delivery"),
           "What is promised at the moment; always 1.",
           lambda s: [((s.durability, s.delivery), 1)]),
    Metric("eventlog.transport.sent", "counter", "{event}", ("transport",),
           "Events acknowledged.", _each(lambda t: t.sent)),
    Metric("eventlog.transport.failed", "counter", "{attempt}", ("transport",),
           "Attempts that did not end in an acknowledgement.", _each(lambda t: t.failed)),
    Metric("eventlog.transport.retried", "counter", "{attempt}", ("transport",),
           "Attempts for events that had failed before.", _each(lambda t: t.retried)),
    Metric("eventlog.transport.rejected", "counter", "{event}", ("transport",),
           "Events refused for good, and parked.", _each(lambda t: t.rejected)),
    Metric("eventlog.transport.dropped", "counter", "{event}", ("transport",),
           "Events lost for the transport.", _each(lambda t: t.dropped)),
    Metric("eventlog.transport.lag_events", "gauge", "{event}", ("transport",),
           "Events accepted and not yet sent, rejected or dropped.",
           _each(lambda t: t.lag_events)),
    Metric("eventlog.transport.lag", "gauge", "s", ("transport",),
           "How long the oldest event that is not sent yet has waited, about.",
           _each(lambda t: t.lag_seconds)),
    Metric("eventlog.transport.connected", "gauge", "{transport}", ("transport",),
           "1 if connected, else 0.", _each(lambda t: int(t.connected))),
    Metric("eventlog.transport.behind", "gauge", "{transport}", ("transport",),
           "1 if the breaker is not closed or more than a batch waits, else 0.",
           _each(lambda t: int(t.state == "behind"))),
    Metric("eventlog.transport.breaker", "gauge", "{transport}", ("transport", "state"),
           "1 for the state that the breaker is in, 0 for the others.", _breaker),
)
"""Every metric there is; both backends go by it."""
# fmt: on


class _Gateways:
    """The gateways behind some sources, each once, by the value of their label `base`.

    That is the base directory at the beginning; where another gateway has the same, a number is
    added, as series of the same labels cannot be told apart.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        gateways: list[Source] = [getattr(source, "gateway", source) for source in sources]
        used: Counter[str] = Counter()
        self._gateways: dict[str, weakref.ref[Source]] = {}
        for gateway in {id(gateway): gateway for gateway in gateways}.values():
            base = str(getattr(gateway, "log_base_dir", ""))
            used[base] += 1
            label = base if used[base] == 1 else f"{base}#{used[base]}"
            self._gateways[label] = weakref.ref(gateway)

    def figures(self) -> dict[str, Stats]:
        """Return the figures of those that are still there."""
        found = {}
        for base, reference in self._gateways.items():
            gateway = reference()
            if gateway is not None:
                found[base] = gateway.stats()
        return found


def _samples(metric: Metric, figures: dict[str, Stats]) -> Iterator[Sample]:
    for base, stats in figures.items():
        for values, value in metric.read(stats):
            yield (base, *values), value


class PrometheusCollector:
    """Reports gateways at each scrape: `REGISTRY.register(PrometheusCollector(handler))`.

    A scrape reads `stats()`. A gateway is not kept alive, and is left out once it is gone. A
    registry takes one such collector, so give it all sources.

    Args:
        *sources: Gateways, handlers or processors; those that share a gateway are reported once.

    Raises:
        ImportError: prometheus-client is missing, with the command that installs it.
    """

    def __init__(self, *sources: Source) -> None:
        try:
            from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        except ImportError as error:
            raise ImportError(
                "PrometheusCollector needs prometheus-client: "
                "pip install 'eventlog-handler[prometheus]'"
            ) from error
        self._counter, self._gauge = CounterMetricFamily, GaugeMetricFamily
        self._gateways = _Gateways(sources)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the metric families, all out of one reading; times in seconds, sizes in bytes."""
        figures = self._gateways.figures()
        for metric in METRICS:
            make = self._counter if metric.kind == "counter" else self._gauge
            labels = ("base", *metric.labels)
            family = make(metric.prometheus_name, metric.description, labels=labels)
            for values, value in _samples(metric, figures):
                family.add_metric(values, value)
            yield family


def observe(meter: Meter, *sources: Source) -> None:
    """Create OpenTelemetry's observable instruments, which read `stats()` at each collection.

    Call it once for a meter. A gateway is not kept alive, and is left out once it is gone.

    Args:
        meter: Where the instruments are created; times are in `s`, sizes in `By`.
        *sources: Gateways, handlers or processors; those that share a gateway are reported once.

    Raises:
        ImportError: opentelemetry-api is missing, with the command that installs it.
    """
    try:
        from opentelemetry.metrics import Observation
    except ImportError as error:
        raise ImportError(
            "observe needs opentelemetry-api: pip install 'eventlog-handler[otel]'"
        ) from error
    gateways = _Gateways(sources)

    def callback_of(metric: Metric) -> Callable[[CallbackOptions], Iterator[Observation]]:
        names = ("base", *metric.labels)

        def callback(_: CallbackOptions) -> Iterator[Observation]:
            for values, value in _samples(metric, gateways.figures()):
                yield Observation(value, dict(zip(names, values, strict=True)))

        return callback

    for metric in METRICS:
        counts = metric.kind == "counter"
        create = meter.create_observable_counter if counts else meter.create_observable_gauge
        create(metric.name, [callback_of(metric)], metric.unit, metric.description)
