"""An outage from a caller's seat: what it costs while it lasts, and how it ends.

    python benchmarks/outage.py [--events 500000] [--plot docs/outage.png] [--json FILE]

One process logs at a steady pace to 200 sessions, through a handler with one transport. First the
transport is well, then it refuses all connections for as many events as are asked for, then it is
well again. Memory (resident, by /proc) and lag are sampled; calls are timed one by one. The plot
needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Sequence
from typing import Any

import orjson

from eventlog_handler import EventLogHandler, OutgoingEvent, TransportConnectionError

SESSIONS = 200
WARM_UP = 100_000
"""Events before: they touch the whole of the mapped journal, which counts as resident then."""
PACE = 12_000
"""Calls a second, in bursts of 50."""
TEXT = "a" * 120
MiB = 1024 * 1024


class FarSide:
    """Takes batches, and keeps nothing but what it needs to see what is missing."""

    name = "far-side"
    is_connected = True

    def __init__(self) -> None:
        self.down = False
        self.taken = self.twice = self.disordered = 0
        self._last: dict[str, int] = {}

    async def send_batch(self, batch: Sequence[OutgoingEvent]) -> bool:
        """Refuse, or count."""
        if self.down:
            raise TransportConnectionError("connection refused")
        for event in batch:
            number, last = orjson.loads(event.line)["event"]["n"], self._last.get(event.session_id)
            expected = int(event.session_id) if last is None else last + SESSIONS
            if number == expected:
                self.taken += 1
                self._last[event.session_id] = number
            elif number < expected:
                self.twice += 1
            else:
                self.disordered += 1
        return True

    async def send(self, event: bytes, metadata: Any = None) -> bool:
        """Take one event."""
        return await self.send_batch([OutgoingEvent(event, **metadata)])

    async def close(self) -> None:
        """Nothing to close."""

    async def health_check(self) -> bool:
        """Whether it would take something."""
        return not self.down


def resident_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Sampler:
    """Notes time, lag and memory, every 50 ms.

    Args:
        handler: Whose lag.
    """

    def __init__(self, handler: EventLogHandler) -> None:
        self.samples: list[tuple[float, int, int]] = []
        self._handler = handler
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.note()

    def note(self) -> None:
        """Take a sample now."""
        lag = self._handler.stats().transports["far-side"].lag_events
        self.samples.append((time.monotonic() - self._started, lag, resident_bytes()))

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started


def log(logger: logging.Logger, first: int, took: array[int]) -> None:
    """Log at the pace; note what each call took, in nanoseconds.

    Args:
        logger: Where.
        first: The number of the first event.
        took: Filled; made before, so that measuring costs no memory while it lasts.
    """
    started, clock = time.monotonic(), time.perf_counter_ns
    for at in range(len(took)):
        number = first + at
        session = str(number % SESSIONS)
        before = clock()
        logger.info(TEXT, extra={"session_id": session, "event_type": "delta", "n": number})
        took[at] = clock() - before
        if number % 50 == 49:
            ahead = at / PACE - (time.monotonic() - started)
            if ahead > 0:
                time.sleep(ahead)
    return took


def percentile(took: array[int], share: float) -> float:
    """Return a percentile, in microseconds."""
    return sorted(took)[int(len(took) * share)] / 1000


def run(base: str, events: int) -> dict[str, Any]:
    """Live through an outage; return figures and samples."""
    far_side = FarSide()
    handler = EventLogHandler(
        log_base_dir=base,
        downstream_transport=far_side,
        breaker_reset_seconds=1.0,
        retry_delay_seconds=0.1,
    )
    logger = logging.getLogger("outage")
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, [handler]
    before, during = array("q", bytes(8 * WARM_UP)), array("q", bytes(8 * events))
    log(logger, 0, before)
    handler.flush(until="transport", timeout=120)
    sampler = Sampler(handler)
    log(logger, WARM_UP, before)
    sampler.note()
    memory = resident_bytes()
    began = sampler.seconds
    far_side.down = True
    log(logger, 2 * WARM_UP, during)
    handler.flush(timeout=120)
    sampler.note()
    largest_lag = max(lag for _, lag, _ in sampler.samples)
    far_side.down = False
    ended = sampler.seconds
    complete = bool(handler.flush(until="transport", timeout=600))
    sampler.note()
    caught_up = sampler.seconds
    sampler.stop()
    stats = handler.stats()
    handler.close()
    return {
        "events": events,
        "written": stats.written,
        "taken": far_side.taken,
        "missing": 2 * WARM_UP + events - far_side.taken,
        "twice": far_side.twice,
        "out_of_order": far_side.disordered,
        "complete": complete,
        "dropped": dict(stats.dropped),
        "largest_lag": largest_lag,
        "memory_growth_mib": round(
            (max(rss for at, _, rss in sampler.samples if at >= began) - memory) / MiB, 2
        ),
        "p50_us": [round(percentile(took, 0.5), 1) for took in (before, during)],
        "p99_us": [round(percentile(took, 0.99), 1) for took in (before, during)],
        "outage_seconds": round(ended - began, 1),
        "catch_up_seconds": round(caught_up - ended, 1),
        "marks": [began, ended],
        "samples": sampler.samples,
    }


def plot(figures: dict[str, Any], path: str) -> None:
    """Draw lag and memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, lag, memory = zip(*figures["samples"], strict=True)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), dpi=110)
    above.plot(seconds, [n / 1000 for n in lag], color="tab:blue")
    above.set_ylabel("lag, 1,000 events")
    below.plot(seconds, [rss / MiB for rss in memory], color="tab:red")
    below.set_ylabel("resident memory, MiB")
    below.set_ylim(0, max(memory) / MiB * 1.3)
    below.set_xlabel("seconds")
    for axes in (above, below):
        axes.axvspan(*figures["marks"], color="0.92", label="far side is down")
        axes.grid(alpha=0.3)
    above.legend(loc="upper left")
    figure.suptitle(f"An outage of {figures['events']:,} events")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=500_000)
    parser.add_argument("--plot")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        figures = run(base, arguments.events)
    if arguments.plot:
        plot(figures, arguments.plot)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file)
    del figures["samples"], figures["marks"]
    print(f"CPython {sys.version.split()[0]}, {os.cpu_count()} cores")
    for name, value in figures.items():
        print(f"{name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    main()
