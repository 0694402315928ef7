"""A real full disk, filled and freed: nothing torn, nothing lost, no call that raises."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.harness import (
    Child,
    Tally,
    count,
    fill_and_free,
    missing,
    mounted,
    recover,
    tell,
)

RINGS = {"ring_bytes": 1024 * 1024}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB of its own."""
    if os.geteuid() != 0:
        missing("mounting a tmpfs needs root")
    try:
        with mounted("tmpfs", tmp_path / "disk", "-t", "tmpfs", "-o", "size=48m") as folder:
            yield folder
    except PermissionError as error:
        missing(f"mounting a tmpfs is not allowed: {error}")


@pytest.mark.timeout(900)
def test_a_disk_that_fills_and_is_freed(tmp_path: Path, disk: Path) -> None:
    """Filled and freed over and over, a disk holds every acknowledged event, each line whole."""
    base, notes, cycles = disk / "base", tmp_path / "notes", count(20, 100)
    with Child(fill_and_free, base=base, notes=notes, cycles=cycles, options=RINGS) as child:
        told = child.answer(600.0)
        child.end()
    tally = Tally(base)
    tally.expect_notes("full", notes, 1)
    seconds = round(told["longest"], 4)
    tell("full disk", cycles=cycles, failed_writes=told["local_errors"], **tally.figures,
         longest_call_seconds=seconds)  # fmt: skip
    assert (tally.faults, told["dropped"]) == ({}, {})
    assert tally.acknowledged == 80 * cycles


@pytest.mark.timeout(900)
def test_a_process_killed_on_a_full_disk(tmp_path: Path, disk: Path) -> None:
    """Killed while its disk is full, a process loses nothing once there is room."""
    cycles = count(5, 25)
    total: dict[str, int] = {}
    faults = []
    for cycle in range(cycles):
        base, notes = disk / f"base-{cycle}", tmp_path / f"notes-{cycle}"
        with Child(
            fill_and_free, base=base, notes=notes, cycles=1, kill=True, options=RINGS
        ) as child:
            assert child.end() == -9
        recover(base, **RINGS)
        (disk / "filler").unlink()
        recover(base, **RINGS)
        tally = Tally(base)
        tally.expect_notes("full", notes, 1)
        for key, value in tally.figures.items():
            total[key] = total.get(key, 0) + value
        if tally.faults:
            faults.append((cycle, tally.faults))
    tell("killed on a full disk", cycles=cycles, **total)
    assert not faults, faults
    assert total["acknowledged"] == 80 * cycles
