"""An outage of half a million events, as `benchmarks/outage.py` makes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.harness import count, tell

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "outage.py"
EVENTS = count(500_000, 5_000_000)


@pytest.mark.timeout(3600)
def test_an_outage_costs_disk_and_no_memory(tmp_path: Path) -> None:
    """Memory stays flat, callers notice nothing, and all is delivered after, in order."""
    out = tmp_path / "figures.json"
    arguments = [sys.executable, str(SCRIPT), "--events", str(EVENTS), "--json", str(out)]
    subprocess.run(arguments, check=True, timeout=3000)
    figures = json.loads(out.read_text())
    del figures["samples"], figures["marks"]
    tell("outage", **figures)
    assert figures["complete"]
    assert figures["largest_lag"] >= EVENTS
    assert (figures["missing"], figures["out_of_order"], figures["dropped"]) == (0, 0, {})
    assert figures["memory_growth_mib"] < 16
    # Two runs of the same calls in one process: a bound against a caller that waits, no measure.
    healthy, outage = figures["p99_us"]
    assert outage < 10 * healthy
