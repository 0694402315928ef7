"""A kill, or an error, at every system call of one short run: what was acknowledged is there.

`strace` counts a call per thread, and kills whichever reaches it first. So each sweep is done
twice: attached before the handler is made, and attached when its thread has just started.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import (
    OUTCOME_BYTES,
    Child,
    Notes,
    Tally,
    cut_writes_short,
    leave_a_full_ring,
    missing,
    tell,
    zygote,
)

CHANGING = (
    "write writev pwrite64 ftruncate openat mkdir mkdirat rename unlink unlinkat flock fallocate"
    " fsync fdatasync msync sync"
)
ASKING = "mmap munmap lseek pread64 read close newfstatat fstat stat lstat getdents64"
CALLS = (CHANGING + " " + ASKING).split()
"""Those that change nothing too: between two of them the ring is stored to."""
COUNT = 6
ERRORS = {
    "ENOSPC": "write writev pwrite64 openat mkdir mkdirat rename fallocate fsync fdatasync",
    "EIO": "write writev pwrite64 openat mkdir mkdirat rename fallocate fsync fdatasync msync"
    " ftruncate unlink pread64 read getdents64",
    "EMFILE": "openat",
    "EINTR": "write writev pwrite64 openat fallocate flock fsync fdatasync",
}
FAULTS = [(error, call) for error, calls in ERRORS.items() for call in calls.split()]
SYNCS = ("fsync", "fdatasync", "msync")


@pytest.fixture(scope="module")
def strace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    """A tracer, and the process whose forked children it traces."""
    if shutil.which("strace") is None:
        missing("strace is not installed")
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    if done.returncode:
        missing(f"strace may not trace: {done.stderr.strip()}")
    folder = tmp_path_factory.mktemp("strace")
    with Child(zygote, warm=folder / "warm", base="") as child:
        child.answer()
        yield Tracer(child, folder)


class Tracer:
    """Runs short runs, one after the other, with faults in them.

    Args:
        child: The process that forks.
        folder: A place for each run.
    """

    def __init__(self, child: Child, folder: Path) -> None:
        self.child = child
        self.folder = folder
        self.runs = 0
        self.gate = folder / "gate"
        os.mkfifo(self.gate)

    def run(self, base: Path, thread: str, injection: str | None, **spec: Any) -> Run:
        """Trace one run.

        Args:
            base: Its base directory.
            thread: At which gate the tracer is attached.
            injection: What `strace -e inject=` gets.
            **spec: More for the run.
        """
        self.runs += 1
        run = Run(self.folder / f"run-{self.runs}", base)
        files = {"notes": str(run.notes), "outcome": str(run.outcome), "gate": str(self.gate)}
        told = {"who": "run", "count": COUNT, "base": str(base), "thread": thread, **files, **spec}
        self.child.send(json.dumps(told))
        pid = self.child.answer()["pid"]
        with open(self.gate, "wb", buffering=0) as gate:
            command = [
                "strace",
                "-f",
                "-qq",
                "-o",
                run.trace,
                "-e",
                f"trace={','.join((CHANGING + ' ' + ASKING).split())}",
            ]
            command += ["-e", "signal=none"]
            command += ["-e", f"inject={injection}"] if injection else []
            tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.DEVNULL)
            # The read of the gate is begun again when the tracer comes, and may be what kills.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, BrokenPipeError):
                while not _traced(pid):
                    time.sleep(0.001)
                gate.write(b"x")
            try:
                run.killed = os.WIFSIGNALED(self.child.answer()["status"])
            finally:
                tracer.wait(10)
        return run


def _traced(pid: int) -> bool:
    """Return whether a tracer is attached to all threads that there are."""
    states = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return bool(states) and all("TracerPid:\t0\n" not in state for state in states)


class Run:
    """What one run leaves.

    Args:
        folder: For its files; made here.
        base: The base directory.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        folder.mkdir()
        self.base = base
        self.notes, self.outcome, self.trace = folder / "notes", folder / "told", folder / "trace"
        self.killed = False

    def calls(self) -> dict[str, int]:
        """Return how many of each call the thread that made the most of them made."""
        made: collections.Counter[tuple[str, str]] = collections.Counter()
        for line in self.trace.read_text(errors="replace").splitlines():
            found = re.match(r"(\d+)\s+(\w+)\(", line)
            if found:
                made[found[1], found[2]] += 1
        most: dict[str, int] = {}
        for (_, call), number in made.items():
            most[call] = max(most.get(call, 0), number)
        return most

    def acknowledged(self) -> set[int]:
        """Return the numbers whose call returned."""
        return Notes(self.notes, 1, 4096).numbers(0) if self.notes.exists() else set()

    def told(self) -> dict[str, Any]:
        """Return what the run told at its end; nothing where it did not come so far."""
        text = Notes(self.outcome, 1, OUTCOME_BYTES).text()
        told: dict[str, Any] = json.loads(text) if text else {}
        return told


def _sweep(
    strace: Tracer, thread: str, prepare: Callable[[], tuple[Path, set[int]]], **spec: Any
) -> tuple[dict[str, int], list[Any]]:
    """Kill at each call; return the figures in all, and what was found wrong."""
    base, _ = prepare()
    calls = strace.run(base, thread, None, **spec).calls()
    total: collections.Counter[str] = collections.Counter()
    faults: list[Any] = []
    for call, most in calls.items():
        if call not in CALLS:
            continue
        for nth in range(1, most + 1):
            base, there = prepare()
            run = strace.run(base, thread, f"{call}:signal=KILL:when={nth}", **spec)
            final = strace.run(base, "listener", None, who="next", count=1)
            tally = Tally(base)
            tally.expect("run", 0, run.acknowledged())
            tally.expect("dead", 0, there)
            tally.expect("next", 0, final.acknowledged())
            total.update({"runs": 1, "kills": int(run.killed), **tally.figures})
            if tally.faults:
                faults.append((thread, call, nth, tally.faults))
            shutil.rmtree(base)
    return dict(total), faults


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("durability", ["process", "disk"])
@pytest.mark.parametrize("thread", ["main", "listener"])
def test_kill_at_every_system_call(
    tmp_path: Path, strace: Tracer, thread: str, durability: str
) -> None:
    """Killed at any system call of a run, a process loses nothing that was acknowledged."""
    rounds = iter(range(1_000_000))

    def prepare() -> tuple[Path, set[int]]:
        return tmp_path / str(next(rounds)), set()

    spec = {"options": {"durability": durability}}
    total, faults = _sweep(strace, thread, prepare, **spec)
    tell(f"SIGKILL at every system call, {thread}, {durability}", **total)
    assert not faults, "\n".join(map(str, faults))
    assert total["kills"] > 20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("thread", ["main", "listener"])
def test_kill_at_every_system_call_of_a_recovery(
    tmp_path: Path, strace: Tracer, thread: str
) -> None:
    """Killed at any system call of its recovery, a process loses nothing, writes nothing twice."""
    template = _dead(tmp_path)
    rounds = iter(range(1_000_000))

    def prepare() -> tuple[Path, set[int]]:
        base = tmp_path / f"base-{next(rounds)}"
        shutil.copytree(template, base)
        return base, set(range(1, 21))

    total, faults = _sweep(strace, thread, prepare, count=1)
    tell(f"SIGKILL at every system call of a recovery, {thread}", **total)
    assert not faults, "\n".join(map(str, faults))
    assert total["kills"] > 20


def _dead(folder: Path) -> Path:
    """Leave what a dead process leaves: a ring, and a torn line in one of its files."""
    base = folder / "template"
    with Child(leave_a_full_ring, base=base, notes=folder / "n", who="dead", count=20) as child:
        assert child.end() == -9
    process = next(base.glob(".eventlog/*.ring")).name.partition("-")[0]
    torn = next(base.rglob("*.jsonl"), None)
    directory = base / "s1" if torn is None else torn.parent
    directory.mkdir(exist_ok=True)
    line = f'{{"timestamp":"2026-11-22T06:31:56.123456+00:00","id":"{process}-0","seq":1,"ev'
    (directory / "20261122_063156.jsonl").write_text(line)
    return base


def _wrong(tally: Tally, call: str) -> dict[str, Any]:
    """Return what an error must not do. One of a sync has lines written again to a new file."""
    allowed = ("duplicated", "out_of_order") if call in SYNCS else ()
    return {name: value for name, value in tally.faults.items() if name not in allowed}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("durability", ["process", "disk"])
@pytest.mark.parametrize("thread", ["main", "listener"])
def test_an_error_at_every_system_call(
    tmp_path: Path, strace: Tracer, thread: str, durability: str
) -> None:
    """An error at any call, once: no logging call raises, no line is torn, no event is missing."""
    spec = {"options": {"durability": durability}}
    calls = strace.run(tmp_path / "count", thread, None, **spec).calls()
    total: collections.Counter[str] = collections.Counter()
    faults: list[Any] = []
    for error, call in FAULTS:
        for nth in range(1, calls.get(call, 0) + 1):
            base = tmp_path / f"{error}-{call}-{nth}"
            run = strace.run(base, thread, f"{call}:error={error}:when={nth}", **spec)
            if list(base.glob(".eventlog/*.ring")):
                strace.run(base, "listener", None, who="next", count=0)
            tally = Tally(base)
            tally.expect("run", 0, run.acknowledged())
            told, wrong = run.told(), _wrong(tally, call)
            wrong |= {key: told[key] for key in ("raised", "dropped") if told.get(key)}
            if not told:
                wrong["outcome"] = "the application died"
            total.update({"errors": 1, **tally.figures})
            total["in memory"] += told.get("durability") == "memory"
            if wrong:
                faults.append((error, call, nth, wrong, told.get("errors")))
    figures = {key.replace(" ", "_"): value for key, value in total.items()}
    tell(f"an error at every system call, {thread}, {durability}", **figures)
    assert not faults, "\n".join(map(str, faults))
    assert total["errors"] > 10


@pytest.mark.timeout(300)
def test_short_writes(tmp_path: Path) -> None:
    """A write that the kernel cuts short, after any number of bytes, tears and loses nothing."""
    base, notes = tmp_path / "base", tmp_path / "notes"
    with Child(cut_writes_short, base=base, notes=notes, bytes=200, step=8) as child:
        told = child.answer(200.0)
        child.end()
    tally = Tally(base)
    tally.expect_notes("short", notes, 1)
    tell("short writes", cut=told["local_errors"], **tally.figures, dropped=told["dropped"])
    assert (tally.faults, told["dropped"]) == ({}, {})
