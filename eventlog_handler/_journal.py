"""The hand-off that survives a killed process: rings in mapped files, one owner each.

A store into a shared mapping is in the page cache at once: it is there after `kill -9`, and cost no
system call, which beside a computing thread is a wait for the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from eventlog_handler._files import sync_directory
from eventlog_handler._handoff import MemoryHandoff
from eventlog_handler._payload import event_of
from eventlog_handler._ring import ALIGN, HEADER_BYTES, Ring, space
from eventlog_handler._stamp import process_id
from eventlog_handler.typing import EncodedEvent, EventHead, Marker

OWN_DIRECTORY = ".eventlog"
"""Below the base, ours alone: no session's name begins with a dot."""
SUFFIX = ".ring"
NESTED_BYTES = 256 * 1024
"""The ring for calls that interrupt another call in its critical section: signal handlers."""
WARM_BYTES = 64 * 1024
"""A ring that is empty beyond this place goes on at its beginning."""
LARGEST_SHARE = 4
"""An event may take a fourth of the ring; a larger one gets a file of its own, and so does one from
a signal handler that interrupted a signal handler in here."""
YIELDS = 20
"""Turns that another thread gets to leave its critical section before its lock is waited for."""
_numbers = itertools.count(1)


def _allocate(fd: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOTSUP, "no preallocation on this system")
    os.posix_fallocate(fd, 0, size)


class MappedRing:
    """A ring in a file, locked as long as its owner lives.

    Args:
        directory: Exists.
        ring_bytes: Rounded up to pages.
        note: For who recovers it.

    Raises:
        OSError: There is no room, or no mapping or lock on this file system.
    """

    def __init__(self, directory: Path, ring_bytes: int, note: bytes = b"") -> None:
        size = HEADER_BYTES + -(-ring_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # The time lets a recovery leave files alone that are older than this process's first line.
        name = f"{process_id()}-{next(_numbers)}-{int(time.time()):x}"
        self.path = directory / f"{name}{SUFFIX}"
        making = self.path.with_suffix(".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(making, flags, 0o600)
        try:
            # Locked before it has its name, so that nobody takes it for a dead process's.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Never sparse: on a full disk the first touch of a hole is a SIGBUS.
            _allocate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
            self.ring = Ring(memoryview(self._map), secrets.randbits(64), note)
            os.rename(making, self.path)
        except BaseException:
            os.close(self._fd)
            making.unlink(missing_ok=True)
            raise
        self._synced = 0
        self._closed = False
        self._syncing = threading.RLock()

    def sync(self, position: int) -> None:
        """Have everything up to `position` on the disk.

        Those who come while one waits for the disk share the next wait (group commit).
        """
        with self._syncing:
            # Closed meanwhile: the listener has written it, and synced its file.
            if self._synced < position and not self._closed:
                reached = self.ring.head
                self._map.flush()
                if not self._synced:
                    # A file on the disk is of no use without its name there.
                    own = self.path.parent
                    for directory in (own, own.parent, own.parent.parent):
                        sync_directory(directory)
                self._synced = reached

    def close(self, keep: bool) -> None:
        """Let go of file and lock.

        Args:
            keep: Whether the file stays, for the next process to recover what is in it.
        """
        with self._syncing:
            self._closed = True
            self.ring.release()
            self._map.close()
        if not keep:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


class JournalHandoff(MemoryHandoff):
    """The `durability="process"` and `"disk"` hand-off: the plain queue, and a ring beside it.

    The listener is served from the queue; the ring is read by who comes after a crash.

    Args:
        directory: Where the rings lie; exists.
        capacity: Events that may wait.
        ring_bytes: Size of the ring.
        always_sync: Whether every call returns after its event is on the disk.
        unknown_directory: Below the base, where events without a session go.
        failed: Hears why an accepted event may be lost with this process, or with the power.

    Raises:
        OSError: The file system has no room, or can not map, lock or preallocate.
    """

    def __init__(
        self,
        directory: Path,
        capacity: int,
        ring_bytes: int,
        always_sync: bool,
        unknown_directory: str = "",
        failed: Callable[[OSError], object] = lambda error: None,
    ) -> None:
        note = unknown_directory.encode()
        super().__init__(capacity)
        self.durability = "disk" if always_sync else "process"
        self._always_sync = always_sync
        self._failed = failed
        self._note = note
        self._directory = directory
        self._largest = ring_bytes // LARGEST_SHARE
        self._rings = [MappedRing(directory, ring_bytes, note)]
        try:
            self._rings.append(MappedRing(directory, NESTED_BYTES, note))
        except BaseException:
            self._rings[0].close(keep=False)
            raise
        # Re-entrant: a signal handler may log while its thread is in here.
        self._lock = threading.RLock()
        self._depth = 0
        self._closed = False
        self._large: set[MappedRing] = set()
        self._entries: dict[str, tuple[MappedRing, tuple[int, int]]] = {}
        self._must_sync: set[str] = set()

    def put(self, head: EventHead, payload: bytes, sync: bool = False) -> bool:
        """Accept an event, or return False when full. It is safe from a kill when this returns.

        Args:
            head: That of the event.
            payload: As `pack` makes it of the event.
            sync: Whether to return only after it is on the disk.
        """
        sync = sync or self._always_sync
        if self._depth:
            self._yield()
        depth = -1
        try:
            try:
                # Not by `with`, which costs twice as much; and in the `try`, as an exception that
                # a signal raises may come right behind it.
                self._lock.acquire()
                # At each depth a ring of its own: what was interrupted finds its own as it left it.
                depth = self._depth
                self._depth = depth + 1
                if self._closed or self._queue.qsize() >= self._capacity:
                    return False
                ring = self._rings[0]
                if depth or len(payload) > self._largest:
                    try:
                        ring = self._other_ring(payload, depth)
                    except OSError:
                        # Lost with its process then, as with `memory`; not before.
                        self._queue.put((head, None, 0, 0, b"%b" % payload, 0, sync))
                        raise
                place = ring.ring.append(payload)
                if place is None:
                    return False
                begin, end, kept, skip = place
                # Flat, as each tuple inside would be one more for the garbage collector.
                self._queue.put((head, ring, begin, end, kept, skip, sync))
            finally:
                if depth >= 0:
                    self._depth = depth
                try:  # noqa: SIM105 - as above
                    self._lock.release()
                except RuntimeError:
                    # An exception came while it was waited for.
                    pass
            if sync:
                ring.sync(end)
        except OSError as error:
            # It is handed off, and not on the disk: its file will be synced, or tried until it is.
            self._failed(error)
        return True

    def _yield(self) -> None:
        """Let a thread go on that lost the interpreter's lock while it was in its critical section.

        Who waits for our lock instead gets it together with a wait for the interpreter's: the next
        one then waits too, and from there on each call is two switches of threads (a lock convoy,
        measured: 44 µs a call instead of 12). Where the interrupted one is below us on our own
        stack (a signal handler), that is known after these tries.
        """
        for _ in range(YIELDS):
            if not self._depth:
                return
            time.sleep(0)

    def _other_ring(self, payload: bytes, depth: int) -> MappedRing:
        if len(payload) <= self._largest and depth < len(self._rings):
            return self._rings[depth]
        ring = MappedRing(self._directory, space(payload) + ALIGN, self._note)
        self._large.add(ring)
        return ring

    def take(self, limit: int, timeout_seconds: float) -> tuple[list[EncodedEvent], Marker | None]:
        """Wait for events; return up to `limit` of them, and the marker that ended the batch."""
        entries, marker = self._take_entries(limit, timeout_seconds)
        events = []
        for head, ring, begin, end, kept, skip, sync in entries:
            event = event_of(head, kept, skip)
            events.append(event)
            if ring is not None:
                self._entries[event.id] = ring, (begin, end)
            if sync:
                self._must_sync.add(event.id)
        return events, marker

    def must_sync(self, events: Iterable[EncodedEvent]) -> bool:
        """Return whether any of these has to be on the disk before its ring lets go of it."""
        return bool(self._must_sync) and any(event.id in self._must_sync for event in events)

    def written(self, events: Iterable[EncodedEvent]) -> None:
        """Let go of events that are in their files."""
        regions: dict[MappedRing, list[tuple[int, int]]] = {}
        for event in events:
            entry = self._entries.pop(event.id, None)
            if entry is not None:
                regions.setdefault(entry[0], []).append(entry[1])
            self._must_sync.discard(event.id)
        for ring, theirs in regions.items():
            ring.ring.all_done(theirs)
            if ring in self._large:
                self._large.discard(ring)
                ring.close(keep=False)
        if not self._entries and not self.depth:
            self._reclaim()

    def _reclaim(self) -> None:
        """Free what a call left that was interrupted (Ctrl-C) between its ring and its queue."""
        self._yield()
        with self._lock:
            if self._depth or self.depth or self._closed:
                return
            try:
                # A call that interrupts this gets none of these rings.
                self._depth = len(self._rings)
                for ring in self._rings:
                    used = ring.ring.head % ring.ring.capacity
                    if ring.ring.tail != ring.ring.head or used >= WARM_BYTES:
                        ring.ring.clear()
            finally:
                self._depth = 0

    def holds(self, event: EncodedEvent) -> bool:
        """Return whether an event that was taken, and not let go of, survives this process."""
        return event.id in self._entries

    def close(self) -> None:
        """End; what is left stays in its file for the next process."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for ring in (*self._rings, *self._large):
                    ring.close(keep=ring.ring.tail != ring.ring.head)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's files without touching what is in them."""
        self._lock = threading.RLock()
        self._closed = True
        for ring in (*self._rings, *self._large):
            with contextlib.suppress(OSError, BufferError):
                ring.close(keep=True)


def journal_directory(base: Path, directory_mode: int) -> Path:
    """Return our own directory below a base, made where it is missing."""
    directory = base / OWN_DIRECTORY
    os.makedirs(base, directory_mode, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    return directory
