"""A model of journal and files: hypothesis writes, kills, cuts the power, and recovers.

Single-threaded and on real files. What a kill leaves is what stands in the files; what a power cut
leaves is, page by page, what was last synced or what stood there at the end, and either size.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from eventlog_handler import _journal, _recovery, _ring, _stamp
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._journal import JournalHandoff, journal_directory
from eventlog_handler._paths import SessionPaths
from eventlog_handler._payload import head_of, pack_body
from eventlog_handler._report import Report
from eventlog_handler.typing import EncodedEvent

EXAMPLES = 100_000 if os.environ.get("RELIABILITY") == "long" else 1000
PAGE = 4096
NOW = 1763793116.123456
CALLS = ("open", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "sync")
told: Counter[str] = Counter()


class Killed(BaseException):
    """Stands for a SIGKILL at a system call."""


class Disk:
    """Knows what is synced, and kills at the n-th system call when it is told to."""

    def __init__(self, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.fuse = 0
        self.dead = False
        self._synced: dict[int, bytes] = {}
        self._real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            patch.setattr(os, name, self._call(name))
        unlink = Path.unlink

        def forget(path: Path, missing_ok: bool = False) -> None:
            self._count()
            with contextlib.suppress(FileNotFoundError):
                self._synced.pop(path.stat().st_ino, None)
            unlink(path, missing_ok=missing_ok)

        patch.setattr(Path, "unlink", forget)
        disk = self

        class Watched(mmap.mmap):
            number: int

            def __new__(cls, fd: int, size: int) -> Watched:
                made = super().__new__(cls, fd, size)
                made.number = os.fstat(fd).st_ino
                return made

            def flush(self, *args: Any) -> None:
                disk._count()
                disk._synced[self.number] = self[:]

        patch.setattr(_journal.mmap, "mmap", Watched)

    def _count(self) -> None:
        if self.fuse:
            self.fuse -= 1
            self.dead = self.dead or self.fuse == 0
        if self.dead:
            raise Killed

    def _call(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*args: Any, **options: Any) -> Any:
            if name == "write" and self.fuse == 1:
                # Killed in the middle: a part of it is in the file.
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            self._count()
            if name == "sync":
                for path in self.files():
                    self._synced[path.stat().st_ino] = path.read_bytes()
                return None
            if name in ("fsync", "fdatasync"):
                path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                if path.is_file():
                    self._synced[path.stat().st_ino] = path.read_bytes()
                return None
            return real(*args, **options)

        return call

    def files(self) -> list[Path]:
        """Return all files below the base."""
        return sorted(path for path in self.base.rglob("*") if path.is_file())

    def close_all(self) -> None:
        """Close what is open below the base, as the end of a process does."""
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(f"{self.base}/"):
                    os.close(int(name))

    def lose(self, chance: random.Random) -> None:
        """Cut the power."""
        for path in self.files():
            number, now = path.stat().st_ino, path.read_bytes()
            old = self._synced.get(number, b"")
            size = chance.choice((len(old), len(now)))
            left = bytearray(size)
            for begin in range(0, size, PAGE):
                source = chance.choice((old, now))
                page = source[begin : min(begin + PAGE, size)]
                left[begin : begin + len(page)] = page
            path.write_bytes(left)
            self._synced[number] = bytes(left)


class Machine(RuleBasedStateMachine):
    """One process after the other on one base directory."""

    suffix: ClassVar[str] = ".jsonl"

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="model"))
        self.patch = pytest.MonkeyPatch()
        # The same ids in every run of an example: hypothesis repeats what failed.
        self.patch.setattr(_stamp, "_prefix", f"{0:020x}")
        self.patch.setattr(_stamp, "NUMBERS", itertools.count(1))
        self.patch.setattr(_journal, "NESTED_BYTES", PAGE)
        self.disk = Disk(self.base, self.patch)
        self.known: dict[str, EncodedEvent] = {}
        self.acknowledged: set[str] = set()
        self.synced: set[str] = set()
        self.maybe_twice: set[str] = set()
        self.owners: dict[Path, str] = {}
        self.orphans: set[Path] = set()
        self.processes = 0
        self.begin()

    def begin(self) -> None:
        """Start a process."""
        self.disk.fuse, self.disk.dead = 0, False
        self.processes += 1
        unknown = f"u{self.processes}"
        paths = SessionPaths(
            self.base, "{session_id}", "unknown_{uuid}", "log", self.suffix, unknown
        )
        self.files = SessionFiles(
            paths,
            Layout(self.suffix[1:]),
            max_open_files=2,
            file_mode=0o600,
            directory_mode=0o700,
        )
        own = journal_directory(self.base, 0o700)
        self.handoff = JournalHandoff(own, 50, PAGE, False, f"unknown_{unknown}")

    def die(self) -> None:
        """Kill the process; the next one begins."""
        told["kills"] += 1
        self.disk.fuse, self.disk.dead = 0, False
        self.handoff.abandon()
        self.files.close()
        self.disk.close_all()
        for path in self.session_files():
            self.owners.setdefault(path, _stamp.process_id())
        self.patch.setattr(_stamp, "_prefix", f"{self.processes:020x}")

    @rule(
        session=st.sampled_from([None, "a", "b"]),
        size=st.sampled_from([0, 10, 200, 1500, 5000]),
        sync=st.booleans(),
    )
    def put(self, session: str | None, size: int, sync: bool) -> None:
        """Hand an event off."""
        each = EncodedEvent(session, "log", _stamp.new_id(), NOW, b'{"x":"%b"}' % (b"x" * size))
        self.known[each.id] = each
        if self.handoff.put(head_of(each), pack_body(head_of(each), each.body), sync):
            told["acknowledged"] += 1
            self.acknowledged.add(each.id)
            if sync:
                self.synced.add(each.id)

    def write(self, session: str | None, events: list[EncodedEvent]) -> None:
        """Write events as the listener does."""
        while events:
            count = self.files.append(session, events, lambda _: None)
            if self.handoff.must_sync(events[:count]):
                self.files.sync(session)
            self.handoff.written(events[:count])
            del events[:count]

    @rule(limit=st.integers(1, 10))
    def flush(self, limit: int) -> None:
        """Write a batch."""
        found: dict[str | None, list[EncodedEvent]] = {}
        for each in self.handoff.take(limit, 0.0)[0]:
            found.setdefault(each.session_id, []).append(each)
        for session, events in found.items():
            self.write(session, events)

    def recover_all(self) -> None:
        """Recover as the listener does."""
        _recovery.recover(self.base, self.files.directory, self.write, Report(None))

    @rule()
    def crash(self) -> None:
        """Kill between two steps."""
        self.die()
        self.begin()

    @rule(calls=st.integers(1, 25), limit=st.integers(1, 10))
    def crash_in_flush(self, calls: int, limit: int) -> None:
        """Kill at a system call of a batch."""
        self.disk.fuse = calls
        with contextlib.suppress(Killed):
            self.flush(limit)
        self.die()
        self.begin()

    @rule(calls=st.integers(1, 60))
    def crash_in_recovery(self, calls: int) -> None:
        """Kill at a system call of a recovery."""
        self.disk.fuse = calls
        with contextlib.suppress(Killed):
            self.recover_all()
        self.die()
        self.begin()

    @rule(calls=st.integers(0, 60), seed=st.integers(0, 2**32))
    def power_cut(self, calls: int, seed: int) -> None:
        """Cut the power, perhaps in the middle of a recovery."""
        self.disk.fuse = calls
        if calls:
            with contextlib.suppress(Killed):
                self.recover_all()
        self.die()
        self.disk.lose(random.Random(seed))
        told["power cuts"] += 1
        # Of a process that has ended or was recovered no ring tells that its files, which were not
        # synced since, are to be looked at: their unsynced ends stay as the disk left them.
        own = {path.name.partition("-")[0] for path in self.base.glob(".eventlog/*.ring")}
        self.orphans |= {path for path, owner in self.owners.items() if owner not in own}
        # Nor does any tell of a page that was lost in the middle of what was not synced.
        self.orphans |= {path for path in self.session_files() if has_hole(path)}
        # Nor, where a file's lines are all ones that its process had recovered, whose it is, unless
        # the ring has kept what was to follow.
        self.orphans |= {path for path, owner in self.owners.items() if only_others(path, owner)}
        self.acknowledged = set(self.synced)
        self.maybe_twice |= set(self.known)
        self.begin()

    @rule()
    def recover(self) -> None:
        """Recover, write what waits, and look at everything."""
        self.recover_all()
        while self.handoff.depth:
            self.flush(50)
        told["checks"] += 1
        counts = Counter(self.lines())
        assert self.acknowledged <= counts.keys(), "an acknowledged event is lost"
        twice = {found for found, count in counts.items() if count > 1}
        assert twice <= self.maybe_twice, "an event is there twice"
        rings = list((self.base / ".eventlog").glob("*.ring"))
        assert len(rings) == 2, "a dead process's ring is left"
        # What was left by a power cut may be lost by the next; what is checked here was there.
        self.acknowledged |= set(counts)

    def session_files(self) -> list[Path]:
        """Return the files of all sessions."""
        files = self.disk.files()
        return [p for p in files if p.suffix == self.suffix and ".eventlog" not in p.parts]

    def lines(self) -> Iterator[str]:
        """Return the ids of all lines; fails where one is false or no JSON."""
        for path in self.session_files():
            for line in self.parsed(path):
                expected = self.known.get(line["id"])
                assert expected is not None, "a false event"
                assert line["event"] == orjson.loads(expected.body), "a changed event"
                yield line["id"]

    def parsed(self, path: Path) -> list[dict[str, Any]]:
        """Return the lines of a file."""
        content = path.read_bytes()
        if path in self.orphans:
            return [found for line in content.split(b"\n") for found in readable(line)]
        assert content.endswith(b"\n") or not content, "a torn tail is left"
        try:
            if self.suffix == ".json" and content:
                found: list[dict[str, Any]] = orjson.loads(content)
                return found
            return [orjson.loads(line) for line in content.splitlines()]
        except ValueError:
            raise AssertionError(f"a line is no JSON: {content[:200]!r}") from None

    def teardown(self) -> None:
        """Recover for the last time."""
        try:
            self.die()
            self.begin()
            self.recover()
        finally:
            with contextlib.suppress(Exception):
                self.handoff.abandon()
            self.files.close()
            self.patch.undo()
            shutil.rmtree(self.base, ignore_errors=True)


def has_hole(path: Path) -> bool:
    """Return whether something stands behind a page that was lost."""
    return b"\0" in path.read_bytes().rstrip(b"\0")


def only_others(path: Path, owner: str) -> bool:
    """Return whether a file has ids, and none of its owner's."""
    content = path.read_bytes() if path.exists() else b""
    return b'"id":"' in content and b'"id":"%b-' % owner.encode() not in content


def readable(line: bytes) -> list[dict[str, Any]]:
    """Return what a line holds, nothing where it is damaged."""
    try:
        found = orjson.loads(line.removesuffix(b","))
    except ValueError:
        return []
    return [found] if isinstance(found, dict) else []


class ArrayMachine(Machine):
    """The same with files that are JSON arrays."""

    suffix = ".json"


def run(machine: type[Machine], examples: int, shrink: bool = True) -> None:
    """Run a state machine."""
    phases = tuple(Phase) if shrink else (Phase.generate,)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in phases if phase is not Phase.explain],
        ),
    )


@pytest.mark.timeout(120 if EXAMPLES == 1000 else 0)
@pytest.mark.parametrize("machine", [Machine, ArrayMachine])
def test_nothing_acknowledged_is_lost_and_nothing_is_false(machine: type[Machine]) -> None:
    """Through kills and power cuts the promise of each level is kept, and every file is whole."""
    told.clear()
    run(machine, EXAMPLES // 2)
    print(f"model of {machine.suffix} files, {EXAMPLES // 2} examples: {dict(told)}")
    assert told["checks"] >= EXAMPLES // 2


def _no_ids(directory: Path, process: str, tail_bytes: int) -> set[str]:
    return set()


def _no_repair(base: Path, process: str, since: float, lines: object) -> None:
    pass


class _HeaderFirst(_ring.Ring):
    """Commits a record before its payload is there, and dies between the two."""

    def append(self, payload: bytes) -> tuple[int, int] | None:
        """Write a record, its payload not yet."""
        return super().append(payload[:-2] + b"\0\0")


@pytest.mark.parametrize(
    ("target", "broken", "expected"),
    [
        ("eventlog_handler._recovery.written_ids", _no_ids, "twice"),
        ("eventlog_handler._recovery.repair_tails", _no_repair, "torn tail|no JSON"),
        ("eventlog_handler._journal.Ring", _HeaderFirst, "lost|no JSON|false|changed"),
    ],
)
def test_a_missing_safeguard_is_noticed(
    monkeypatch: pytest.MonkeyPatch, target: str, broken: object, expected: str
) -> None:
    """Without the search for duplicates, the repair, or the order of commits the model fails."""
    monkeypatch.setattr(target, broken)
    with pytest.raises(AssertionError, match=expected):
        # It takes some 170 on average: one run of 500 in twenty misses it.
        run(Machine, 3000, shrink=False)
