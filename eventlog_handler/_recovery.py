"""What dead processes left: events in their rings, torn tails in their files.

Any step may be interrupted and done again: an event whose id stands in its session's files already
is not written twice, and a ring goes only when all of it is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import orjson

from eventlog_handler._journal import OWN_DIRECTORY, SUFFIX
from eventlog_handler._payload import unpack
from eventlog_handler._report import Report
from eventlog_handler._ring import Damage, read_note, read_ring
from eventlog_handler._stamp import process_id
from eventlog_handler.typing import EncodedEvent

TAIL_RATIO = 4
"""Bytes of a file that are searched for ids, for each byte of its process's rings. A line takes at
most 1.3 of its record; events that had rings of their own, now gone, may stand behind it."""
STALE_SECONDS = 60.0
SETTLED_SECONDS = 0.3
"""More than a write may pause between two pages (200 ms, where too many are dirty)."""
_ID = rb'^\{"timestamp":"[^"]*","id":"(%b-[0-9a-f]+)",'
_ANY_ID = re.compile(rb'"id":"[^"-]+-')
_NAME = re.compile(rf"[0-9a-f]+-[0-9]+-[0-9a-f]+{re.escape(SUFFIX)}")
_ARRAY_END = b"\n]\n"


def recover(
    base: Path,
    directory_of: Callable[[str | None], Path],
    write: Callable[[str | None, list[EncodedEvent]], None],
    report: Report,
) -> int:
    """Write what dead processes handed off and did not write.

    Args:
        base: The base directory.
        directory_of: Where a session's files are.
        write: Writes events of a session; raises OSError, and then this is to be tried again.
        report: Counts what is damaged.

    Returns:
        How many events were written.

    Raises:
        OSError: A file could not be read or written; nothing is lost by it.
    """
    own = base / OWN_DIRECTORY
    with contextlib.suppress(FileNotFoundError):
        _remove_unfinished(own)
    count = 0
    paths = sorted(path for path in own.glob(f"*{SUFFIX}") if _NAME.fullmatch(path.name))
    for process, theirs in itertools.groupby(paths, _process_of):
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(_locked(path)) for path in theirs]
            rings = dict(ring for ring in found if ring is not None)
            if rings:
                # A living process may have left one too: of a handler that it has closed.
                dead = len(rings) == len(found) and process != process_id()
                since = _begun(rings) if dead else None
                count += _recover_process(base, process, rings, since, directory_of, write, report)
    return count


def _begun(rings: Iterable[Path]) -> float:
    return min(int(path.stem.rpartition("-")[2], 16) for path in rings)


def _process_of(path: Path) -> str:
    return path.name.partition("-")[0]


def _remove_unfinished(own: Path) -> None:
    """Remove rings whose process died while it made them, after a time in which none does."""
    for path in own.glob("*.new"):
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[tuple[Path, int] | None]:
    """Open and lock a dead process's ring; None where it lives, or its ring is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield (path, fd) if os.fstat(fd).st_nlink else None
    except BlockingIOError:
        yield None
    finally:
        os.close(fd)


def _recover_process(
    base: Path,
    process: str,
    rings: dict[Path, int],
    since: float | None,
    directory_of: Callable[[str | None], Path],
    write: Callable[[str | None, list[EncodedEvent]], None],
    report: Report,
) -> int:
    events, damage, unknown = _read(base, rings)
    # Numbers go up along each thread's calls, also where a signal handler used another ring.
    events.sort(key=lambda event: int(event.id.rpartition("-")[2]))
    by_session = _by_session(events)
    places = {
        session_id: {directory_of(session_id)} | {p for p in unknown if p.name == session_id}
        for session_id in by_session
    }
    if since is not None:
        unwritten = {place: by_session[s] for s in places for place in places[s]}
        repair_tails(base, process, since, unwritten)
    tail = TAIL_RATIO * sum(os.fstat(fd).st_size for fd in rings.values())
    count = 0
    for session_id, theirs in by_session.items():
        there = set().union(*(written_ids(place, process, tail) for place in places[session_id]))
        missing = [event for event in theirs if event.id not in there]
        if missing:
            count += len(missing)
            write(session_id, missing)
    _keep_aside(base / OWN_DIRECTORY / "damaged", damage, report)
    if events:
        # The ring may have been synced, and so must be what takes its place, old lines and new.
        os.sync()
    for path in rings:
        path.unlink()
    return count


def _read(
    base: Path, rings: dict[Path, int]
) -> tuple[list[EncodedEvent], list[tuple[Path, Damage]], set[Path]]:
    """Return what stands in a process's rings, what is damaged, and its unknown directories."""
    events: list[EncodedEvent] = []
    damage: list[tuple[Path, Damage]] = []
    unknown: set[Path] = set()
    for path, fd in rings.items():
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        payloads, damaged = read_ring(content)
        found = [unpack(payload, _process_of(path)) for payload in payloads]
        damage += [(path, each) for each in damaged]
        below = read_note(content).decode("ascii", "replace")
        if below:
            # Events without a session keep the directory that their process chose: so whoever
            # recovers them, and however often, looks in one place for what is written already.
            unknown.add(base / below)
            found = [_in_directory(event, Path(below).name) for event in found]
        events += found
    return events, damage, unknown


def _in_directory(event: EncodedEvent, name: str) -> EncodedEvent:
    return event if event.session_id is not None else event._replace(session_id=name)


def _by_session(events: Iterable[EncodedEvent]) -> dict[str | None, list[EncodedEvent]]:
    found: dict[str | None, list[EncodedEvent]] = {}
    for event in events:
        found.setdefault(event.session_id, []).append(event)
    return found


def _keep_aside(directory: Path, damage: list[tuple[Path, Damage]], report: Report) -> None:
    for path, each in damage:
        _save(directory, f"{path.stem}-{each.position}", each.content)
        report.drop("damaged")


def _save(directory: Path, name: str, content: bytes) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    # A name of its own each time: after a kill the same bytes may be kept twice.
    path = directory / f"{name[:150]}-{secrets.token_hex(4)}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(content)


def written_ids(directory: Path, process: str, tail_bytes: int) -> set[str]:
    """Return the ids of a process's events that stand in whole lines of a session's files.

    Args:
        directory: The session's.
        process: What the ids begin with.
        tail_bytes: How much of each file is searched, from its end.
    """
    pattern = re.compile(_ID % process.encode(), re.MULTILINE)
    ids: set[str] = set()
    for path in _files(directory):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tail_bytes))
            content = file.read()
        begin = content.find(b"\n") + 1 if size > tail_bytes else 0
        whole = content[begin : content.rfind(b"\n") + 1]
        ids |= {found.decode() for found in pattern.findall(whole)}
    return ids


def _files(directory: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    return [Path(entry) for entry in entries if entry.is_file(follow_symlinks=False)]


def repair_tails(
    base: Path,
    process: str,
    since: float,
    unwritten: Mapping[Path, list[EncodedEvent]] = MappingProxyType({}),
) -> None:
    """Cut what a dead process did not finish writing off its files, and keep it aside.

    Args:
        base: The base directory.
        process: What the process's ids begin with; files of others are left alone.
        since: Unix time of its beginning; older files are not its own.
        unwritten: By directory, events that it may have been writing: a line that is cut off before
            its id tells its writer by nothing else.
    """
    for folder, folders, names in os.walk(base):
        if OWN_DIRECTORY in folders:
            folders.remove(OWN_DIRECTORY)
        for name in names:
            path = Path(folder, name)
            found = path.lstat()
            ours = path.suffix in (".jsonl", ".json") and stat.S_ISREG(found.st_mode)
            if ours and found.st_mtime >= since - 2:
                _repair(base, path, process.encode(), unwritten.get(path.parent, []))


def _repair(base: Path, path: Path, process: bytes, unwritten: list[EncodedEvent]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "r+b") as file:
        found = os.fstat(fd)
        size = file.seek(0, os.SEEK_END)
        end = b"\n" if path.suffix == ".jsonl" else _ARRAY_END
        file.seek(max(0, size - len(end)))
        if not size or file.read() == end:
            return
        file.seek(0)
        content = file.read()
        if not _is_of(process, content, unwritten):
            if _ANY_ID.search(content):
                return
            # A power cut may have taken the ring that would tell whose this first line was to be.
            # Whoever lives has written it, or taken it back, after a moment.
            time.sleep(max(0.0, found.st_mtime + SETTLED_SECONDS - time.time()))
            file.seek(0)
            if file.read() != content:
                return
        keep, closing = _whole(content, path.suffix)
        _save(base / OWN_DIRECTORY / "torn", f"{path.parent.name}-{path.name}", content[keep:])
        file.seek(keep)
        file.write(closing)
        file.truncate()


def _is_of(process: bytes, content: bytes, unwritten: list[EncodedEvent]) -> bool:
    """Return whether a torn file is one of a dead process's."""
    # Its id may stand anywhere: the file may begin with what its process had recovered. And no
    # living process writes a NUL: that is a page which a power cut took away.
    if b'"id":"' + process + b"-" in content or content.endswith(b"\0"):
        return True
    number = content.count(b"\n")
    fragment = content[content.rfind(b"\n") + 1 :]
    if content.startswith(b"["):
        fragment = fragment.removeprefix(b"[")
    else:
        number += 1
    return any(event.line(number).startswith(fragment) for event in unwritten)


def _whole(content: bytes, suffix: str) -> tuple[int, bytes]:
    """Return how many bytes of a torn file are whole lines, and what has to follow them."""
    content = content.partition(b"\0")[0]
    if suffix == ".jsonl":
        return content.rfind(b"\n") + 1, b""
    keep = content.find(b"\n") + 1
    for line in content[keep:].split(b"\n"):
        try:
            orjson.loads(line.removesuffix(b","))
        except ValueError:
            break
        keep += len(line) + 1
    kept = content[: max(1, keep)].rstrip(b",\n")
    return (len(kept), _ARRAY_END) if kept else (0, b"[" + _ARRAY_END)
