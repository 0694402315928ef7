"""The journal: a hand-off in mapped files, and what is on the disk when a call returns."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import mmap
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eventlog_handler import EventLogHandler, EventSessionLogger, _journal, _stamp
from eventlog_handler._encode import encode
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._handoff import MemoryHandoff
from eventlog_handler._journal import WARM_BYTES, JournalHandoff, MappedRing, journal_directory
from eventlog_handler._paths import SessionPaths
from eventlog_handler._payload import head_of, pack_body, unpack
from eventlog_handler._ring import read_ring
from eventlog_handler.typing import EncodedEvent
from tests.conftest import events_of, lines_of

Make = Callable[..., EventLogHandler]
MakeHandoff = Callable[..., JournalHandoff]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Our own directory below a base."""
    return journal_directory(tmp_path, 0o700)


@pytest.fixture
def make_handoff(own: Path) -> Iterator[MakeHandoff]:
    """Make hand-offs that are closed when the test ends."""
    made: list[JournalHandoff] = []

    def make(
        capacity: int = 100, ring_bytes: int = 65536, sync: bool = False, **options: Any
    ) -> JournalHandoff:
        made.append(JournalHandoff(own, capacity, ring_bytes, sync, **options))
        return made[-1]

    yield make
    for handoff in made:
        handoff.close()


def event(body: bytes = b"{}", session_id: str = "s1") -> EncodedEvent:
    """Return an event of this process."""
    return EncodedEvent(session_id, "log", _stamp.new_id(), 1.5, body)


def packed(event: EncodedEvent) -> bytes:
    """Return an event as a ring's payload."""
    return pack_body(head_of(event), event.body)


def hand_off(handoff: MemoryHandoff, event: EncodedEvent, sync: bool = False) -> bool:
    """Hand an event off."""
    return handoff.put(head_of(event), packed(event), sync)


def record(message: object, **extra: Any) -> logging.LogRecord:
    """Return a record of a session."""
    return logging.makeLogRecord({"msg": message, "session_id": "s1", **extra})


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for another thread; fails after 30 seconds."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "waited for 30 seconds"
        time.sleep(0.001)


def on_disk(own: Path) -> list[EncodedEvent]:
    """Return the events that stand in ring files, and fail where one is damaged."""
    found: list[EncodedEvent] = []
    for path in sorted(own.glob("*.ring")):
        payloads, damage = read_ring(path.read_bytes())
        assert damage == []
        found += [unpack(payload, path.name.partition("-")[0]) for payload in payloads]
    return found


def test_our_directory_is_private(tmp_path: Path) -> None:
    """The rings lie in a directory of mode 0700 below the base, which is made where missing."""
    directory = journal_directory(tmp_path / "base", 0o750)
    assert directory == tmp_path / "base" / ".eventlog"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert journal_directory(tmp_path / "base", 0o750) == directory


def test_a_ring_is_locked_preallocated_and_private(own: Path) -> None:
    """Its file has mode 0600, no holes, whole pages, and a lock that nobody else gets."""
    ring = MappedRing(own, 5000)
    found = ring.path.stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_size == 4096 + 2 * mmap.PAGESIZE
    assert found.st_blocks * 512 >= found.st_size
    with open(ring.path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [path.name for path in own.iterdir()] == [ring.path.name]
    ring.close(keep=False)
    assert list(own.iterdir()) == []


def test_an_accepted_event_is_in_the_file(make_handoff: MakeHandoff, own: Path) -> None:
    """When `put` returns, another reader of the file finds the event."""
    handoff, given = make_handoff(), event()
    assert hand_off(handoff, given)
    assert on_disk(own) == [given]


def test_what_is_put_is_taken_in_order(make_handoff: MakeHandoff) -> None:
    """`take` returns the events of `put`, up to its limit."""
    handoff = make_handoff()
    events = [event() for _ in range(3)]
    for each in events:
        hand_off(handoff, each)
    assert handoff.take(2, 0.0) == (events[:2], None)
    assert handoff.take(2, 0.0) == (events[2:], None)


def test_what_is_taken_stays_until_it_is_written(make_handoff: MakeHandoff, own: Path) -> None:
    """Events leave the ring with `written`, not with `take`."""
    handoff = make_handoff()
    events = [event(), event()]
    for each in events:
        hand_off(handoff, each)
    handoff.take(10, 0.0)
    assert on_disk(own) == events
    handoff.written(events[:1])
    assert on_disk(own) == events[1:]


def test_an_event_of_no_ring_is_written_without_harm(make_handoff: MakeHandoff, own: Path) -> None:
    """The listener's own lines, which were never put, are passed over."""
    handoff, given = make_handoff(), event()
    hand_off(handoff, given)
    handoff.written([event()])
    assert not handoff.must_sync([event()])
    assert on_disk(own) == [given]


def test_close_removes_what_is_empty(make_handoff: MakeHandoff, own: Path) -> None:
    """With everything written no file stays."""
    handoff, given = make_handoff(), event()
    hand_off(handoff, given)
    handoff.written(handoff.take(10, 0.0)[0])
    handoff.close()
    assert list(own.iterdir()) == []


def test_close_keeps_what_is_not_written(make_handoff: MakeHandoff, own: Path) -> None:
    """What is left stays in its file, which nobody owns any more; closing twice is no error."""
    handoff, given = make_handoff(), event()
    hand_off(handoff, given)
    handoff.close()
    handoff.close()
    assert on_disk(own) == [given]
    with open(next(own.iterdir())) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_closed_journal_takes_nothing(make_handoff: MakeHandoff) -> None:
    """After close `put` says no."""
    handoff = make_handoff()
    handoff.close()
    assert not hand_off(handoff, event())


def test_abandon_leaves_the_files_to_their_owner(make_handoff: MakeHandoff, own: Path) -> None:
    """A child lets go of its parent's rings without writing to them."""
    handoff = make_handoff()
    events = [event(), event(b"x" * 40000)]
    for each in events:
        hand_off(handoff, each)
    before = {path: path.read_bytes() for path in own.iterdir()}
    handoff.abandon()
    assert {path: path.read_bytes() for path in own.iterdir()} == before
    assert not hand_off(handoff, event())


def test_the_queue_is_bounded(make_handoff: MakeHandoff) -> None:
    """Beyond `capacity` events `put` says no."""
    handoff = make_handoff(capacity=2)
    assert [hand_off(handoff, event()) for _ in range(3)] == [True, True, False]


def test_a_full_ring_takes_more_once_it_is_written(make_handoff: MakeHandoff, own: Path) -> None:
    """With no room `put` says no; after `written` it says yes."""
    handoff = make_handoff(ring_bytes=4096)
    count = 0
    while hand_off(handoff, event(b"x" * 500)):
        count += 1
    assert count == 4096 // 576
    events, _ = handoff.take(100, 0.0)
    handoff.written(events[:1])
    assert hand_off(handoff, event(b"x" * 500))
    assert len(on_disk(own)) == count


def test_a_large_event_has_a_ring_of_its_own(make_handoff: MakeHandoff, own: Path) -> None:
    """What takes more than a fourth of the ring is as safe; its file goes when it is written."""
    handoff = make_handoff(ring_bytes=4096)
    before = set(own.iterdir())
    given = event(b"x" * 100_000)
    assert hand_off(handoff, given)
    assert on_disk(own) == [given]
    handoff.written(handoff.take(1, 0.0)[0])
    assert set(own.iterdir()) == before


def test_a_large_event_is_kept_by_close(make_handoff: MakeHandoff, own: Path) -> None:
    """The ring of a large event that is not written stays too."""
    handoff, given = make_handoff(), event(b"x" * 40000)
    hand_off(handoff, given)
    handoff.close()
    assert on_disk(own) == [given]


def test_without_room_for_a_large_event_none_of_its_file_stays(
    make_handoff: MakeHandoff, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed allocation is told and leaves no file."""
    told: list[OSError] = []
    handoff = make_handoff(failed=told.append)
    before = set(own.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert hand_off(handoff, event(b"x" * 40000))
    assert [error.strerror for error in told] == ["No space left on device"]
    assert set(own.iterdir()) == before


def test_a_failure_is_told_while_others_may_hand_off(
    make_handoff: MakeHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who hears of it may wait for a thread that logs: no lock is held meanwhile."""
    ended: list[bool] = []

    def wait_for_another(_: OSError) -> None:
        other = threading.Thread(target=hand_off, args=(handoff, event()), daemon=True)
        other.start()
        other.join(10)
        ended.append(not other.is_alive())

    handoff = make_handoff(failed=wait_for_another)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert hand_off(handoff, event(b"x" * 40000))
    assert ended == [True]


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_without_room_for_a_large_event_it_is_written_all_the_same(
    make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    """What no ring can be made for is told, waits in memory, and reaches its file."""
    heard: list[str] = []
    handler = make_handler(
        ring_bytes=4096,
        durability=durability,
        error_handler=lambda error, context: heard.append(context),
    )
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    handler.handle(record("x" * 40000))
    assert handler.flush()
    assert heard == ["journal"]
    assert [each["message"] for each in events_of(base)] == ["x" * 40000]
    assert handler.stats().dropped == {}


def test_a_large_event_without_a_ring_that_cannot_be_written_is_counted(
    make_handler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a process whose disk is full it is lost, unlike what a ring holds."""
    handler = make_handler(ring_bytes=4096, shutdown_timeout_seconds=0.2)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "open", refuse)
    handler.handle(record("x" * 40000))
    handler.handle(record("small"))
    handler.close()
    assert handler.stats().dropped == {"unwritable": 1}


def test_without_room_for_the_second_ring_the_first_goes_too(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that cannot be made keeps no file and no descriptor of what it began with."""
    allocate, calls = os.posix_fallocate, []

    def refuse_second(fd: int, begin: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(fd, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", refuse_second)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        JournalHandoff(own, 10, 4096, False)
    assert list(own.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


# Interrupted calls


STORES = ["buffer", "_head"]
"""Where a ring stores: a record, then its head."""


class Interrupting:
    """A buffer that calls something before its first store."""

    def __init__(self, buffer: memoryview, call: Callable[[], object]) -> None:
        self._buffer, self._calls = buffer, [call]

    def __setitem__(self, at: Any, data: Any) -> None:
        """Store, after the call when it is the first."""
        if self._calls:
            self._calls.pop()()
        self._buffer[at] = data

    def release(self) -> None:
        """Let go of the mapping."""
        self._buffer.release()


@pytest.mark.parametrize("store", STORES)
def test_a_call_inside_another_is_safe(make_handoff: MakeHandoff, own: Path, store: str) -> None:
    """A signal handler that logs in the middle of any store finds a ring, and both events count."""
    handoff, outer, inner = make_handoff(), event(b"outer"), event(b"inner")
    seen: list[tuple[bool, list[EncodedEvent]]] = []

    def interrupt(number: int, frame: object) -> None:
        seen.append((hand_off(handoff, inner), on_disk(own)))

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        ring = handoff._rings[0].ring
        call = functools.partial(signal.raise_signal, signal.SIGUSR1)
        setattr(ring, store, Interrupting(getattr(ring, store), call))
        assert hand_off(handoff, outer)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen[0][0]
    assert inner in seen[0][1]
    assert sorted(on_disk(own)) == sorted([outer, inner])
    events, _ = handoff.take(10, 0.0)
    assert sorted(events) == sorted([outer, inner])
    handoff.written(events)
    assert on_disk(own) == []


def test_a_third_call_inside_the_second_has_a_file(make_handoff: MakeHandoff, own: Path) -> None:
    """A call that interrupts an interrupting call waits for neither: it makes a ring of its own."""
    handoff, answers = make_handoff(), []

    def innermost() -> None:
        answers.append(hand_off(handoff, event()))

    def inner() -> None:
        answers.append(hand_off(handoff, event()))

    for mapped, call in zip(handoff._rings, (inner, innermost), strict=True):
        mapped.ring.buffer = Interrupting(mapped.ring.buffer, call)  # type: ignore[assignment]
    assert hand_off(handoff, event())
    assert answers == [True, True]
    assert len(on_disk(own)) == 3


@pytest.mark.parametrize("store", STORES)
def test_a_call_that_is_broken_off_leaves_room(
    make_handoff: MakeHandoff, own: Path, store: str
) -> None:
    """After Ctrl-C in the middle of a store the ring takes and gives events as before."""
    handoff = make_handoff()

    def interrupt() -> None:
        raise KeyboardInterrupt

    ring = handoff._rings[0].ring
    buffer = getattr(ring, store)
    setattr(ring, store, Interrupting(buffer, interrupt))
    with pytest.raises(KeyboardInterrupt):
        hand_off(handoff, event())
    setattr(ring, store, buffer)
    after = event()
    assert hand_off(handoff, after)
    assert on_disk(own) == [after]
    assert handoff.take(10, 0.0)[0] == [after]


class BrokenOff:
    """A lock at which Ctrl-C comes: while it is waited for, or right behind it."""

    def __init__(self, lock: Any, behind: bool) -> None:
        self._lock = lock
        self._behind = behind

    def acquire(self) -> None:
        if self._behind:
            self._lock.acquire()
        raise KeyboardInterrupt

    def release(self) -> None:
        self._lock.release()


@pytest.mark.parametrize("behind", [False, True])
def test_a_call_that_is_broken_off_at_the_lock_leaves_it_free(
    make_handoff: MakeHandoff, own: Path, behind: bool
) -> None:
    """After Ctrl-C at the lock another thread logs as before, and only Ctrl-C is raised."""
    handoff = make_handoff()
    lock = handoff._lock
    handoff._lock = BrokenOff(lock, behind)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        hand_off(handoff, event())
    handoff._lock = lock
    after = event()
    thread = threading.Thread(target=hand_off, args=(handoff, after), daemon=True)
    thread.start()
    thread.join(10)
    assert on_disk(own) == [after]


def test_what_was_broken_off_before_its_queue_is_reclaimed(
    make_handoff: MakeHandoff, own: Path
) -> None:
    """An event that is in the ring and not in the queue is let go of when nothing else waits."""
    handoff = make_handoff()
    handoff._rings[0].ring.append(packed(event()))
    after = event()
    hand_off(handoff, after)
    assert len(on_disk(own)) == 2
    handoff.written(handoff.take(10, 0.0)[0])
    assert on_disk(own) == []
    handoff.close()
    assert list(own.iterdir()) == []


def test_an_empty_ring_goes_on_where_it_is_warm(make_handoff: MakeHandoff, own: Path) -> None:
    """Once a ring is empty beyond its first stretch, the next event lies at its beginning again."""
    handoff = make_handoff(ring_bytes=1024 * 1024)
    ring, places = handoff._rings[0].ring, []
    for _ in range(200):
        waiting = event(b"x" * 1000)
        places.append(ring.head % ring.capacity)
        assert hand_off(handoff, waiting)
        assert on_disk(own) == [waiting]
        handoff.written(handoff.take(10, 0.0)[0])
        assert on_disk(own) == []
    assert places.count(0) > 2
    assert max(places) < 2 * WARM_BYTES


def test_nothing_is_reclaimed_while_something_waits(make_handoff: MakeHandoff, own: Path) -> None:
    """Events that were put meanwhile are not taken for what a broken call left."""
    handoff = make_handoff()
    hand_off(handoff, event())
    events, _ = handoff.take(10, 0.0)
    waiting = event()
    hand_off(handoff, waiting)
    handoff._reclaim()
    handoff.written(events)
    handoff._reclaim()
    assert on_disk(own) == [waiting]


def test_a_call_that_interrupts_the_reclaiming_has_a_file(
    make_handoff: MakeHandoff, own: Path
) -> None:
    """What is put while the rings are being cleared is in none of them, and stays."""
    handoff, inner = make_handoff(), event()
    ring = handoff._rings[0].ring
    ring.append(packed(event()))
    ring.buffer = Interrupting(ring.buffer, lambda: hand_off(handoff, inner))  # type: ignore[assignment]
    handoff._reclaim()
    assert on_disk(own) == [inner]


def test_a_call_lets_another_thread_out_before_it_waits_for_the_lock(
    make_handoff: MakeHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a thread is in its critical section the others give it turns, and do not queue up."""
    handoff, turns = make_handoff(), []

    def turn(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 3:
            handoff._depth = 0

    handoff._depth = 1
    monkeypatch.setattr(_journal.time, "sleep", turn)
    assert hand_off(handoff, event())
    assert turns == [0, 0, 0]


# On the disk


def test_concurrent_calls_share_a_wait(own: Path) -> None:
    """Threads that ask while one waits for the disk share one further wait."""
    ring = MappedRing(own, 65536)
    entered, gate, flushes = threading.Event(), threading.Event(), []

    class Slow:
        closed = False

        def flush(self) -> None:
            flushes.append(ring.ring.head)
            entered.set()
            assert gate.wait(30)

    mapped, ring._map = ring._map, Slow()  # type: ignore[assignment]
    ends = []
    for _ in range(9):
        place = ring.ring.append(packed(event()))
        assert place is not None
        ends.append(place[1])
    head = ring.ring.head
    first = threading.Thread(target=ring.sync, args=(ends[0],))
    first.start()
    assert entered.wait(30)
    late = ring.ring.append(packed(event()))
    assert late is not None
    others = [threading.Thread(target=ring.sync, args=(end,)) for end in (*ends[1:], late[1])]
    for thread in others:
        thread.start()
    gate.set()
    for thread in (first, *others):
        thread.join(30)
    assert flushes == [head, late[1]]
    ring._map = mapped
    ring.close(keep=False)


def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of each mapping that is flushed."""
    found: list[int] = []

    class Watched(mmap.mmap):
        def flush(self, *args: Any) -> None:
            super().flush(*args)
            found.append(len(self))

    monkeypatch.setattr(_journal.mmap, "mmap", Watched)
    return found


def test_only_synced_calls_wait_for_the_disk(
    make_handoff: MakeHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `sync` the mapping is flushed before `put` returns, without it is not."""
    found = flushed(monkeypatch)
    handoff = make_handoff()
    hand_off(handoff, event())
    assert found == []
    hand_off(handoff, event(), sync=True)
    assert len(found) == 1


def test_on_the_disk_level_every_call_waits(
    make_handoff: MakeHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`durability="disk"` flushes for every event, and tells its level."""
    found = flushed(monkeypatch)
    handoff = make_handoff(sync=True)
    for _ in range(3):
        hand_off(handoff, event())
    assert len(found) == 3
    assert (handoff.durability, make_handoff().durability) == ("disk", "process")


def test_a_synced_event_asks_for_a_synced_file(make_handoff: MakeHandoff) -> None:
    """`must_sync` is true for events that were put with `sync`, and only for those."""
    handoff = make_handoff()
    hand_off(handoff, event())
    hand_off(handoff, event(), sync=True)
    events, _ = handoff.take(10, 0.0)
    assert not handoff.must_sync(events[:1])
    assert handoff.must_sync(events)


def test_a_large_synced_event_may_be_written_while_its_caller_waits(own: Path) -> None:
    """The listener may have closed a large event's ring before its caller gets to sync it."""
    ring = MappedRing(own, 65536)
    place = ring.ring.append(packed(event()))
    assert place is not None
    ring.close(keep=False)
    ring.sync(place[1])


def test_large_synced_events_are_accepted_beside_a_listener(make_handoff: MakeHandoff) -> None:
    """Many large events with `sync` pass while another thread writes them."""
    handoff = make_handoff(ring_bytes=4096)
    ended = threading.Event()

    def listen() -> None:
        while not ended.is_set():
            handoff.written(handoff.take(10, 0.01)[0])

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        for _ in range(300):
            assert hand_off(handoff, event(b"x" * 2000), sync=True)
    finally:
        ended.set()
        thread.join(30)


def test_close_while_a_caller_waits_for_the_disk_does_not_raise(own: Path) -> None:
    """A call that waits for its turn at the disk when the journal is closed returns."""
    handoff = JournalHandoff(own, 100, 65536, True)
    ring = handoff._rings[0]
    raised: list[BaseException] = []

    def put() -> None:
        try:
            hand_off(handoff, event())
        except BaseException as error:
            raised.append(error)

    with ring._syncing:
        thread = threading.Thread(target=put)
        thread.start()
        wait_until(lambda: handoff.depth == 1)
        closer = threading.Thread(target=handoff.close)
        closer.start()
        closer.join(0.2)
    thread.join(30)
    closer.join(30)
    assert raised == []


def synced_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the path of each descriptor that is synced."""
    found: list[str] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def sync(fd: int, real: Callable[[int], None] = real) -> None:
            real(fd)
            found.append(os.readlink(f"/proc/self/fd/{fd}"))

        monkeypatch.setattr(os, name, sync)
    return found


def test_the_name_of_a_synced_ring_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first synced call returns, the new directories above the ring are synced too."""
    found = synced_names(monkeypatch)
    base = tmp_path / "base"
    handoff = JournalHandoff(journal_directory(base, 0o700), 100, 65536, True)
    hand_off(handoff, event())
    assert {str(base / ".eventlog"), str(base), str(tmp_path)} <= set(found)
    handoff.close()


def new_files(base: Path) -> SessionFiles:
    """Return session files with fixed names."""
    paths = SessionPaths(base, "a/{session_id}", "unknown", "log", ".jsonl", "u1")
    return SessionFiles(
        paths, Layout("jsonl"), max_open_files=9, file_mode=0o600, directory_mode=0o700
    )


def test_a_synced_file_has_its_name_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sync of a file takes in all directories up to the base; later ones the file."""
    found = synced_names(monkeypatch)
    base = tmp_path / "base"
    files = new_files(base)
    files.append("s1", [event()], lambda _: None)
    files.sync("s1")
    file = base / "a" / "s1" / "log.jsonl"
    assert found[0] == str(file)
    assert set(found) >= {str(path) for path in (file.parent, base / "a", base)}
    found.clear()
    files.sync("s1")
    assert found == [str(file)]
    files.close()


def test_a_new_base_has_its_name_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that was made for the first event is synced in its own directory too."""
    found = synced_names(monkeypatch)
    files = new_files(tmp_path / "base")
    files.append("s1", [event()], lambda _: None)
    files.sync("s1")
    files.close()
    assert str(tmp_path) in found


def test_after_a_failed_sync_events_go_to_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the kernel could not write is given up."""
    files = new_files(tmp_path)
    files.append("s1", [event()], lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            files.sync("s1")
    files.append("s1", [event()], lambda _: None)
    files.sync("s1")
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    files.close()


@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_name_that_cannot_be_synced_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A directory that cannot be synced, or a file that cannot be opened, costs no line."""
    files = new_files(tmp_path)
    files.append("s1", [event()], lambda _: None)
    files.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        assert isinstance(files.sync("s1"), OSError)
    assert files.sync("s1") is None
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1
    files.close()


def test_a_call_whose_sync_fails_has_its_event_written(
    make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that is handed off, and cannot be synced at once, is no loss; the error is told."""
    handler = make_handler(durability="disk", ring_bytes=65536)
    monkeypatch.setattr(MappedRing, "sync", fail)
    handler.handle(record("one"))
    assert handler.flush(timeout=30)
    assert [line["event"]["message"] for p in base.rglob("*.jsonl") for line in lines_of(p)] == [
        "one"
    ]
    assert (handler.stats().dropped, handler.stats().local_errors) == ({}, 1)


def fail(*args: object, **options: object) -> None:
    """Fail as a broken disk does."""
    raise OSError(errno.EIO, "Input/output error")


def refuse(*args: object, **options: object) -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


# The handler


def test_the_session_file_is_synced_before_the_ring_lets_go(
    make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At `durability="disk"` the file is on the disk while its events are still in the ring."""
    handler = make_handler(durability="disk", ring_bytes=65536)
    seen: list[int] = []
    real = os.fdatasync

    def sync(fd: int) -> None:
        real(fd)
        seen.append(len(on_disk(base / ".eventlog")))

    monkeypatch.setattr(os, "fdatasync", sync)
    handler.handle(record("one"))
    handler.flush()
    assert seen == [1]
    assert on_disk(base / ".eventlog") == []
    assert handler.stats().durability == "disk"


def test_what_could_not_be_synced_is_written_again(
    make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk refuses, the events are written to a new file, and leave the ring then."""
    handler = make_handler(durability="disk", ring_bytes=65536)
    real, calls = os.fdatasync, []

    def fail_once(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            fail()
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    handler.handle(record("one"))
    assert handler.flush(timeout=30)
    paths = sorted(base.rglob("*.jsonl"))
    assert [[line["event"]["message"] for line in lines_of(path)] for path in paths] == [
        ["one"],
        ["one"],
    ]
    assert handler.stats().local_errors == 1


@pytest.mark.parametrize("level", [logging.ERROR, "ERROR"])
def test_records_from_sync_level_on_are_synced(
    make_handler: Make, monkeypatch: pytest.MonkeyPatch, level: object
) -> None:
    """`sync_level` raises single records to the disk; lower ones, or those without, stay."""
    found = flushed(monkeypatch)
    handler = make_handler(sync_level=level)
    for levelno in (logging.INFO, None, logging.WARNING):
        handler.handle(record("low", levelno=levelno))
    assert found == []
    handler.handle(record("high", levelno=logging.ERROR))
    assert len(found) == 1
    assert handler.stats().durability == "process"


def test_an_unknown_sync_level_is_refused(base: Path) -> None:
    """A level that logging does not know is an error that says what to write."""
    with pytest.raises(ValueError, match=r"sync_level='LOUD' is no level; write 'ERROR'"):
        EventLogHandler(log_base_dir=base, sync_level="LOUD")


def test_a_ring_that_is_too_small_is_refused(base: Path) -> None:
    """Fewer bytes than a page are an error that names the least."""
    with pytest.raises(ValueError, match="ring_bytes=4095 is out of range: write 4096 or more"):
        EventLogHandler(log_base_dir=base, ring_bytes=4095)


@pytest.mark.parametrize("target", ["os.posix_fallocate", "mmap.mmap", "fcntl.flock", "os.rename"])
def test_where_no_journal_can_be_made_memory_serves(
    make_handler: Make,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
) -> None:
    """Without room, mapping or lock events are still written; the level and one line tell it."""
    heard: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(target, refuse)
        handlers = [
            make_handler(error_handler=lambda error, context: heard.append(context))
            for _ in range(2)
        ]
    assert [handler.stats().durability for handler in handlers] == ["memory"] * 2
    handlers[0].handle(record("one"))
    handlers[0].flush()
    assert [each["message"] for each in events_of(base)] == ["one"]
    assert list((base / ".eventlog").iterdir()) == []
    assert heard == ["journal"] * 2
    err = capsys.readouterr().err
    assert err.count("durability is 'memory': no journal can be made (No space left") == 1


def test_without_preallocation_memory_serves(
    make_handler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without `posix_fallocate` has no journal: a hole in the file could be a SIGBUS."""
    monkeypatch.delattr(os, "posix_fallocate")
    assert make_handler().stats().durability == "memory"


def test_without_local_files_there_is_no_journal(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With local logging off the level is `memory`, and stderr says so."""
    gateway = EventSessionLogger(base, enable_local_logging=False)
    handler = EventLogHandler(gateway=gateway)
    assert handler.stats().durability == "memory"
    assert "without local files there is no journal" in capsys.readouterr().err
    assert not (base / ".eventlog").exists()
    handler.close()


def test_the_level_memory_makes_no_ring(make_handler: Make, base: Path) -> None:
    """`durability="memory"` is as it was: a queue, and no file."""
    handler = make_handler(durability="memory")
    handler.handle(record("one"))
    handler.flush()
    assert not (base / ".eventlog").exists()


def test_after_a_fork_the_level_in_force_is_told(
    make_handler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that gets no journal of its own says `memory`, whatever its parent has."""
    handler = make_handler()
    listener = handler._feed._listener
    listener.end(time.monotonic() + 30)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    listener.after_fork_in_child()
    assert handler.stats().durability == "memory"


def test_a_failed_recovery_is_told_and_stops_nothing(
    make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When recovery raises, events are still written, and the error handler hears of it."""
    heard: list[str] = []
    monkeypatch.setattr("eventlog_handler._listener.recover", fail)
    handler = make_handler(error_handler=lambda error, context: heard.append(context))
    handler.handle(record("one"))
    handler.flush()
    assert heard == ["recovery"]
    assert [each["message"] for each in events_of(base)] == ["one"]


def test_a_handler_without_its_events_leaves_no_ring(make_handler: Make, base: Path) -> None:
    """After a normal close our directory is empty."""
    handler = make_handler()
    handler.handle(record("one"))
    handler.close()
    assert list((base / ".eventlog").iterdir()) == []


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_an_event_that_waits_takes_little_more_memory_than_it_is_long(
    make_handoff: MakeHandoff, durability: str
) -> None:
    """The buffer in which JSON was made, 4 kB or more, does not stay with it."""
    handoff = MemoryHandoff(2000) if durability == "memory" else make_handoff(2000, 2**20)
    hand_off(handoff, event(encode({"value": 1})))
    tracemalloc.start()
    try:
        for _ in range(1000):
            assert hand_off(handoff, event(encode({"value": 1})))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1000 * 1000
