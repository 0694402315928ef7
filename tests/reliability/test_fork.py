"""Fork beside logging threads: no hang, nothing lost on either side, nothing written twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import (
    Child,
    Tally,
    count,
    fork_often,
    recover,
    serve_preforked,
    tell,
)

THREADS = 3
EACH = 20
ROOM = 1 << 20
PATIENCE_SECONDS = 10.0


def _fork(folder: Path, forks: int, **more: Any) -> tuple[Tally, dict[str, Any]]:
    base, notes = folder / "base", folder / "notes"
    spec: dict[str, Any] = {
        "forks": forks,
        "each": EACH,
        "room": ROOM,
        "patience": PATIENCE_SECONDS,
    }
    with Child(fork_often, base=base, notes=notes, threads=THREADS, **{**spec, **more}) as child:
        told = child.answer(600.0 + forks)
        child.end()
    recover(base)
    tally = Tally(base)
    for who, slots in (("parent", range(THREADS)), ("child", range(THREADS, THREADS + forks))):
        for slot in slots:
            tally.expect(who, slot, _noted(notes, slot))
    return tally, told


def _noted(path: Path, slot: int) -> set[int]:
    with open(path, "rb") as file:
        file.seek(slot * ROOM)
        part = file.read(ROOM).rstrip(b"\0")
    return {number for number, noted in enumerate(part) if noted}


@pytest.mark.timeout(3600)
def test_fork_with_logging_threads(tmp_path: Path) -> None:
    """Children forked beside logging threads end at once; what they and the parent log is there."""
    forks = count(100, 500)
    tally, told = _fork(tmp_path, forks)
    longest = round(told["longest"], 2)
    tell("fork", forks=forks, hung=told["hung"], longest_seconds=longest, **tally.figures)
    assert (told["hung"], tally.faults, told["dropped"]) == (0, {}, {})
    assert tally.acknowledged > forks * EACH


@pytest.mark.timeout(600)
def test_the_check_catches_a_missing_reset_after_fork(tmp_path: Path) -> None:
    """Without the reset in the child, the check above finds hung children or lost events."""
    options = {"shutdown_timeout_seconds": 1.0}
    more: dict[str, Any] = {"no_at_fork_reset": True, "options": options, "patience": 3.0}
    tally, told = _fork(tmp_path, 3, **more)
    tell("fork without reset (broken on purpose)", hung=told["hung"], **tally.figures)
    assert told["hung"] or tally.faults


@pytest.mark.timeout(600)
def test_a_server_that_forks_its_workers(tmp_path: Path) -> None:
    """With the application loaded before the fork, no worker loses an event, however it ends."""
    workers = count(16, 200)
    base, notes = tmp_path / "base", tmp_path / "notes"
    spec: dict[str, Any] = {"workers": workers, "each": 200, "room": 4096}
    with Child(serve_preforked, base=base, notes=notes, patience=PATIENCE_SECONDS, **spec) as child:
        told = child.answer(600.0)
        child.end()
    recover(base)
    tally = Tally(base)
    tally.expect("master", 0, set(range(1, 200 + workers + 1)))
    for slot in range(1, workers + 1):
        tally.expect("worker", slot, set(range(1, 201)))
    tell("pre-fork server", workers=workers, hung=told["hung"], **tally.figures)
    assert (told["hung"], tally.faults, told["dropped"]) == (0, {}, {})
