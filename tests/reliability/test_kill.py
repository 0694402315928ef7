"""SIGKILL at a random time: nothing acknowledged is lost, nothing is written twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import (
    Child,
    Tally,
    count,
    leave_a_full_ring,
    log_until_killed,
    recover,
    recover_here,
    scratch,
    seeded,
    tell,
)

MODES: dict[str, dict[str, Any]] = {
    "full rate": {},
    "1,000/s": {"rate": 1000},
    "beside a computing thread": {"compute": True},
}
IN_EACH = count(6, 112)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("mode", MODES)
def test_kill_at_a_random_time(tmp_path: Path, mode: str, threads: int) -> None:
    """Killed while it logs, a process loses nothing acknowledged; all lines are valid, in order."""
    random = seeded("kill", mode, threads)
    total: dict[str, int] = {}
    faults = []
    for kill in range(IN_EACH):
        with scratch(tmp_path, f"{kill}") as folder:
            tally = _kill(folder, threads, MODES[mode], random.uniform(0.0, 0.5))
        for key, value in tally.figures.items():
            total[key] = total.get(key, 0) + value
        if tally.faults:
            faults.append((kill, tally.faults))
    tell(f"SIGKILL, {mode}, threads {threads}", kills=IN_EACH, **total)
    assert not faults, faults
    assert total["acknowledged"]


def _kill(folder: Path, threads: int, mode: dict[str, Any], seconds: float) -> Tally:
    base, notes = folder / "base", folder / "notes"
    common = {"base": base, "notes": notes, "threads": threads}
    with Child(log_until_killed, who="killed", **common, **mode) as child:
        child.answer()
        time.sleep(0.05 + seconds)
        child.kill()
    told = recover(base)
    tally = Tally(base)
    tally.expect_notes("killed", notes, threads)
    assert (told["flushed"], told["dropped"], told["local_errors"]) == (True, {}, 0)
    assert not list(base.glob(".eventlog/*.ring"))
    return tally


@pytest.mark.timeout(3600)
def test_kill_during_recovery(tmp_path: Path) -> None:
    """Killed while it recovers, again and again, a process loses and doubles nothing."""
    random = seeded("recovery")
    total: dict[str, int] = {}
    kills = 0
    faults = []
    for each in range(count(4, 40)):
        with scratch(tmp_path, f"{each}") as folder:
            base, notes = folder / "base", folder / "notes"
            with Child(
                leave_a_full_ring, base=base, notes=notes, who="dead", count=20_000
            ) as child:
                assert child.end() == -9
            for _ in range(6):
                with Child(recover_here, base=base) as child:
                    child.answer()
                    time.sleep(random.uniform(0.0, 0.25))
                    kills += child.process.poll() is None
                    child.kill()
            recover(base)
            tally = Tally(base)
            tally.expect_notes("dead", notes, 1)
        for key, value in tally.figures.items():
            total[key] = total.get(key, 0) + value
        if tally.faults:
            faults.append((each, tally.faults))
    tell("SIGKILL during recovery", kills=kills, **total)
    assert not faults, faults
    assert total["acknowledged"] == total["lines"]
