"""Session files read back: bytes to lines, lines to events for the transports."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from eventlog_handler._encode import as_text
from eventlog_handler._files import DIRECTORY
from eventlog_handler._journal import OWN_DIRECTORY
from eventlog_handler._paths import SessionPaths
from eventlog_handler._rejected import unwrap
from eventlog_handler.typing import OutgoingEvent

CHUNK_BYTES = 256 * 1024
"""Read at once; a longer line is read whole."""


class Extent(NamedTuple):
    """What of a file is to be sent."""

    end: int
    """Behind the last whole line."""
    events: int
    oldest: str
    """The first event's timestamp."""


def read_lines(base: Path, path: str, begin: int, end: int, size: int | None = None) -> list[bytes]:
    """Return whole lines, without their line feeds: at least one.

    Args:
        base: The base directory.
        path: Below it.
        begin: The byte at which the first begins.
        end: The byte behind the last that may be read.
        size: Bytes to read, 256 KiB unless given; a longer line is read whole.

    Raises:
        OSError: The file cannot be read.
        EOFError: It is shorter than it was.
    """
    fd = _open_below(base, path)
    try:
        size = CHUNK_BYTES if size is None else size
        while True:
            data = os.pread(fd, min(size, end - begin), begin)
            whole = data.rfind(b"\n")
            if whole >= 0:
                return data[:whole].split(b"\n")
            if len(data) < size:
                raise EOFError(f"{path} ends before byte {end}")
            size *= 2
    finally:
        os.close(fd)


def parse_line(text: bytes, session: str) -> OutgoingEvent:
    """Return a line's event; one without an id where the line cannot be read.

    Args:
        text: A session file's line, or a parked one.
        session: Whose file it is.
    """
    line, said = unwrap(text)
    session = session if said is None else said
    try:
        found: Any = orjson.loads(line)
        number, stamp = found["id"], found["timestamp"]
        if isinstance(number, str) and isinstance(stamp, str):
            kind = as_text(found["event"].get("type", "event"))
            return OutgoingEvent(line, number, session, kind, stamp)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return OutgoingEvent(line, "", session, "unreadable", "")


def measure(base: Path, path: str, begin: int) -> Extent:
    """Return what is to be sent of a file that nobody writes any more.

    Args:
        base: The base directory.
        path: Below it.
        begin: The byte up to which it is sent.

    Raises:
        OSError: The file cannot be read.
        EOFError: It is shorter than it was.
    """
    fd = _open_below(base, path)
    try:
        size = os.fstat(fd).st_size
        if size < begin:
            raise EOFError(f"{path} ends before byte {begin}")
        end = _last_line_feed(fd, begin, size) + 1
        if end <= begin:
            return Extent(begin, 0, "")
        first = parse_line(_line_at(fd, begin, end), "")
        return Extent(end, _count(fd, begin, end), first.timestamp)
    finally:
        os.close(fd)


def find_files(base: Path, paths: SessionPaths) -> Iterator[tuple[str, str, str]]:
    """Return all session files: path, session, what the id of the first event begins with.

    Args:
        base: The base directory.
        paths: How directories are named.
    """
    for folder, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if name != OWN_DIRECTORY)
        levels = Path(folder).relative_to(base).parts
        for name in sorted(name for name in names if name.endswith(".jsonl") and levels):
            path = "/".join((*levels, name))
            if not path.isascii():
                # None of ours has such a name.
                continue
            first, said = OutgoingEvent(b"", "", "", "", ""), None
            with contextlib.suppress(OSError, EOFError):
                size = os.stat(base / path).st_size
                first = parse_line(read_lines(base, path, 0, size)[0], "")
            if first.id:
                said = orjson.loads(first.line)["event"].get("session_id")
            session = paths.session(levels, said if isinstance(said, str) else None)
            yield path, session, first.id.partition("-")[0]


def _last_line_feed(fd: int, begin: int, end: int) -> int:
    """Return where the last line feed is in a stretch of a file; the byte before it if nowhere."""
    while end > begin:
        start = max(begin, end - CHUNK_BYTES)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found
        end = start
    return begin - 1


def _line_at(fd: int, begin: int, end: int) -> bytes:
    size = 4096
    while True:
        line, feed, _ = os.pread(fd, min(size, end - begin), begin).partition(b"\n")
        if feed or size >= end - begin:
            return line
        size *= 2


def _count(fd: int, begin: int, end: int) -> int:
    """Return how many lines are in a stretch of a file: by their numbers, else by counting."""
    last = _line_at(fd, _last_line_feed(fd, begin, end - 1) + 1, end)
    try:
        numbers = [orjson.loads(line)["seq"] for line in (_line_at(fd, begin, end), last)]
        if all(type(number) is int for number in numbers) and numbers[0] <= numbers[1]:
            return int(numbers[1] - numbers[0]) + 1
    except (ValueError, KeyError, TypeError):
        pass
    count = 0
    for start in range(begin, end, CHUNK_BYTES):
        count += os.pread(fd, min(CHUNK_BYTES, end - start), start).count(b"\n")
    return count


def _open_below(base: Path, path: str) -> int:
    """Open a file for reading, level by level as it is written, and return its descriptor.

    Args:
        base: The base directory.
        path: Below it.

    Raises:
        OSError: It is not there, or a link or something else stands in its way.
    """
    *levels, name = path.split("/")
    fd = os.open(base, DIRECTORY)
    try:
        for level in levels:
            inner = os.open(level, DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(name, flags, dir_fd=fd)
    finally:
        os.close(fd)
