"""Many sessions with few descriptors, and several processes in one base directory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.reliability.harness import (
    Child,
    Tally,
    count,
    log_until_killed,
    open_many_sessions,
    recover,
    scratch,
    seeded,
    tell,
)

PROCESSES = 4


@pytest.mark.timeout(1800)
def test_many_sessions_with_few_descriptors(tmp_path: Path) -> None:
    """100,000 sessions (20,000 in every run) with 256 descriptors each get their event."""
    base, sessions = tmp_path / "base", count(20_000, 100_000)
    with Child(open_many_sessions, base=base, sessions=sessions) as child:
        told = child.answer(900.0)
        child.end()
    tally = Tally(base)
    tally.expect("many", 0, set(range(1, sessions + 1)))
    shutil.rmtree(base)
    figures = {"descriptors": told["descriptors"], "seconds": round(told["seconds"], 1)}
    tell("many sessions", sessions=sessions, **figures, **tally.figures, dropped=told["dropped"])
    assert (told["flushed"], tally.faults, told["dropped"]) == (True, {}, {})
    assert told["descriptors"] < 256


@pytest.mark.timeout(1800)
def test_several_processes_in_one_directory(tmp_path: Path) -> None:
    """Of four processes in one base directory one is killed: none of them loses an event."""
    random = seeded("processes")
    rounds = count(5, 50)
    total: dict[str, int] = {}
    faults = []
    for each in range(rounds):
        with scratch(tmp_path, str(each)) as folder:
            tally = _round(folder, random.randrange(PROCESSES), random.uniform(0.05, 0.4))
        for key, value in tally.figures.items():
            total[key] = total.get(key, 0) + value
        if tally.faults:
            faults.append((each, tally.faults))
    tell("four processes, one killed", rounds=rounds, **total)
    assert not faults, faults


def _round(folder: Path, victim: int, seconds: float) -> Tally:
    base = folder / "base"
    children = [
        Child(
            log_until_killed,
            base=base,
            notes=folder / f"notes-{each}",
            who=f"p{each}",
            threads=2,
            rate=4000,
            count=2000,
            gate=True,
        )
        for each in range(PROCESSES)
    ]
    try:
        for child in children:
            child.answer()
        for child in children:
            child.send("go")
        time.sleep(seconds)
        children[victim].kill()
        # Beside those that still log.
        recover(base)
        ends = [child.end() for each, child in enumerate(children) if each != victim]
    finally:
        for child in children:
            child.__exit__()
    recover(base)
    # A living process appends what it recovers to its own file, which may be the older one.
    tally = Tally(base, across=False)
    for each in range(PROCESSES):
        tally.expect_notes(f"p{each}", folder / f"notes-{each}", 2)
    assert ends == [0] * (PROCESSES - 1)
    return tally
