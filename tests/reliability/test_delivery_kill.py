"""SIGKILL during delivery: the next process sends what is missing, under the same ids."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import orjson
import pytest

from tests.reliability.harness import (
    HANG_SECONDS,
    Child,
    Notes,
    count,
    deliver_the_rest,
    deliver_until_killed,
    scratch,
    seeded,
    tell,
)

KILLS = count(20, 500)
THREADS = 3
SIDES = ("single", "batch")


class Arrived:
    """What arrived at a far side, against what stands in the session files.

    Args:
        base: The base directory.
        path: The far side's file.
    """

    def __init__(self, base: Path, path: Path) -> None:
        self.lines: dict[str, bytes] = {}
        self.numbers: dict[int, set[int]] = {}
        self.twice = self.changed = self.disordered = 0
        last: dict[tuple[str, int], int] = {}
        for line in path.read_bytes().splitlines():
            found = orjson.loads(line)
            if found["id"] in self.lines:
                self.twice += 1
                self.changed += self.lines[found["id"]] != line
                continue
            self.lines[found["id"]] = line
            event = found["event"]
            key = event["session_id"], event["slot"]
            self.disordered += event["n"] <= last.get(key, 0)
            last[key] = event["n"]
            self.numbers.setdefault(event["slot"], set()).add(event["n"])
        files = [file for file in base.rglob("*.jsonl") if ".eventlog" not in file.parts]
        written = [line for file in files for line in file.read_bytes().splitlines()]
        self.missing = sum(orjson.loads(line)["id"] not in self.lines for line in written)


def wait_until_all_is_sent(base: Path) -> None:
    """Wait until no file has more than the database says is acknowledged."""
    deadline = time.monotonic() + HANG_SECONDS
    uri = f"file:{base}/.eventlog/delivery.sqlite3?mode=ro"
    rows: list[tuple[str, int]] | None = None
    while time.monotonic() < deadline:
        # The first process may have been killed before it made the table.
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(uri, uri=True)) as database,
        ):
            rows = database.execute("SELECT path, position FROM acked").fetchall()
        if rows is not None and all(
            (base / path).stat().st_size == position for path, position in rows
        ):
            return
        # On a busy machine it may have been killed before it logged anything.
        if rows is None and not any(base.glob("*/*.jsonl")):
            return
        time.sleep(0.02)
    left = [(row, (base / row[0]).stat().st_size) for row in rows or ()]
    raise AssertionError(f"it is never all sent: {left}")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loses", [0.0, 0.02])
def test_kill_during_delivery(tmp_path: Path, loses: float) -> None:
    """Nothing that was acknowledged is missing downstream; what comes twice has the same id."""
    random = seeded("delivery", loses)
    total = dict.fromkeys(
        ("acknowledged", "events", "missing", "twice", "changed", "disordered"), 0
    )
    kills = KILLS // 2
    for kill in range(kills):
        with scratch(tmp_path, f"{kill}") as folder:
            base, notes = folder / "base", folder / "notes"
            common = {"base": base, "far": folder, "loses": loses, "who": "killed"}
            with Child(
                deliver_until_killed, notes=notes, threads=THREADS, rate=6000, **common
            ) as child:
                child.answer()
                time.sleep(0.2 + random.uniform(0.0, 0.5))
                child.kill()
            with Child(deliver_the_rest, **common) as child:
                child.answer()
                # Recovered events are written first; then all of it is sent.
                wait_until_rings_are_gone(base)
                wait_until_all_is_sent(base)
                child.send("")
                child.end()
            noted = Notes(notes, THREADS)
            for side in SIDES:
                arrived = Arrived(base, folder / f"{side}.lines")
                total["events"] += len(arrived.lines)
                total["missing"] += arrived.missing
                for slot in range(THREADS):
                    numbers = noted.numbers(slot)
                    total["acknowledged"] += len(numbers)
                    total["missing"] += len(numbers - arrived.numbers.get(slot, set()))
                total["twice"] += arrived.twice
                total["changed"] += arrived.changed
                total["disordered"] += arrived.disordered
    tell(f"SIGKILL during delivery, answers lost {loses:.0%}", kills=kills, **total)
    assert (total["missing"], total["changed"], total["disordered"]) == (0, 0, 0)
    assert total["acknowledged"]


def wait_until_rings_are_gone(base: Path) -> None:
    """Wait until only the rings of the process that lives are left."""
    deadline = time.monotonic() + HANG_SECONDS
    while len(list(base.glob(".eventlog/*.ring"))) > 2:
        assert time.monotonic() < deadline, "a dead process's ring is left"
        time.sleep(0.02)


@pytest.mark.timeout(3600)
def test_what_a_dead_process_left_is_sent_by_one_other(tmp_path: Path) -> None:
    """Of four processes that start together each takes its share: all arrives, once, in order."""
    base, notes = tmp_path / "base", tmp_path / "notes"
    common = {"base": base, "far": tmp_path, "who": "killed"}
    with Child(
        deliver_until_killed, notes=notes, threads=THREADS, count=3000, down=True, **common
    ) as child:
        child.answer()
        child.answer()
        child.kill()
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(deliver_the_rest, **common)) for _ in range(4)]
        for child in children:
            child.answer()
        wait_until_all_is_sent(base)
        for child in children:
            child.send("")
            child.end()
    for side in SIDES:
        arrived = Arrived(base, tmp_path / f"{side}.lines")
        tell(f"adoption by four, {side}", events=len(arrived.lines), twice=arrived.twice)
        assert len(arrived.lines) == THREADS * 2999
        assert (arrived.missing, arrived.twice, arrived.disordered) == (0, 0, 0)
