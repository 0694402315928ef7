"""Logging that interrupts logging: signals, finalizers, conversions, exceptions out of nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.harness import (
    Child,
    Tally,
    count,
    interrupt_often,
    nest_calls,
    recover,
    tell,
)

SLOTS = 6
IN_ORDER = (0, 1, 2)
"""A signal may interrupt the handler of the one before it: the later number is first then."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [False, True], ids=["ends", "is killed"])
def test_logging_that_interrupts_logging(tmp_path: Path, kill: bool) -> None:
    """Logging by a 0.5 ms timer, finalizers and conversions loses nothing and never deadlocks."""
    base, notes, seconds = tmp_path / "base", tmp_path / "notes", count(3, 60)
    with Child(interrupt_often, base=base, notes=notes, seconds=seconds, kill=kill) as child:
        told = child.answer(seconds + 120.0)
        child.end()
    recover(base)
    tally = Tally(base, IN_ORDER)
    tally.expect_notes("r", notes, SLOTS)
    name = f"re-entrancy, {seconds} s, {'killed at the end' if kill else 'normal end'}"
    kinds = ("main", "interrupted", "plain", "signal", "conversion", "finalizer")
    found = {kind: len(tally.found.get(("r", slot), ())) for slot, kind in enumerate(kinds)}
    thrown = {"interrupts": told["interrupts"], "exceptions": told["caught"]}
    dropped = told.get("dropped", {})
    tell(name, **thrown, **found, **tally.figures, dropped=dropped)
    assert tally.faults == {}
    assert dropped == {}
    assert all(found.values())
    assert all(thrown.values())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("deep", [1, 2, 4])
def test_a_call_within_a_call(tmp_path: Path, deep: int) -> None:
    """A call that interrupts one that interrupts another waits for nothing, and is not lost."""
    base, notes = tmp_path / "base", tmp_path / "notes"
    options = {"block_timeout_seconds": 0.1}
    with Child(nest_calls, base=base, notes=notes, deep=deep, options=options) as child:
        told = child.answer(200.0)
        child.end()
    tally = Tally(base)
    tally.expect_notes("nested", notes, deep + 1)
    tell(f"nested calls, {deep} deep", **tally.figures, dropped=told["dropped"])
    assert (tally.faults, told["dropped"]) == ({}, {})
    assert tally.acknowledged == 20 * (deep + 1)
