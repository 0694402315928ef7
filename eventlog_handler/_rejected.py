"""Where events lie that a transport refuses for good, until somebody has them sent again.

`.eventlog/rejected/<transport>.jsonl` has a line for each, `{"rejected":{…},"line":…}`: first
`time`, `transport`, `reason`, `id`, `session_id` and `type`, then the session file's line. A file
that is to be sent again is moved to a name of its own first, and goes once it is sent.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from pathlib import Path

import orjson

from eventlog_handler._encode import encode
from eventlog_handler._journal import OWN_DIRECTORY, journal_directory
from eventlog_handler._paths import session_to_name
from eventlog_handler._stamp import timestamp
from eventlog_handler.typing import OutgoingEvent

REJECTED = "rejected"
_BEGIN = b'{"rejected":'
# In JSON text a quote inside a string has a backslash before it, so this is never part of one.
_BEFORE_LINE = b',"line":'


def park(base: Path, transport: str, event: OutgoingEvent, reason: str) -> None:
    """Keep an event that its transport refuses.

    Args:
        base: The base directory.
        transport: The transport's name.
        event: What it refuses.
        reason: Why.

    Raises:
        OSError: It could not be kept.
    """
    directory = journal_directory(base, 0o700) / REJECTED
    directory.mkdir(mode=0o700, exist_ok=True)
    record = _record(transport, event, reason)
    name = f"{session_to_name(transport)}.jsonl"
    inside = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        kept = False
        while not kept:
            # Where it was set aside in between, whoever sends it may have read it before.
            kept = _append(inside, name, record)
    finally:
        os.close(inside)


def _append(directory: int, name: str, record: bytes) -> bool:
    """Append a line; return whether the file still had its name after that."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{name} is no file")
        if found.st_size and os.pread(fd, 1, found.st_size - 1) != b"\n":
            # Whoever wrote last was cut off: its line must not swallow this one.
            record = b"\n" + record
        written = os.write(fd, record)
        if written != len(record):
            raise OSError(f"only {written} of {len(record)} bytes could be written")
        with contextlib.suppress(FileNotFoundError):
            return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino == found.st_ino
        return False
    finally:
        os.close(fd)


def _record(transport: str, event: OutgoingEvent, reason: str) -> bytes:
    head = {"time": timestamp(time.time()), "transport": transport, "reason": reason}
    about = encode({**head, "id": event.id, "session_id": event.session_id, "type": event.type})
    # What has no id was no JSON: it is kept as text.
    line = event.line if event.id else encode_text(event.line)
    return b"%b%b%b%b}\n" % (_BEGIN, about, _BEFORE_LINE, line)


def encode_text(line: bytes) -> bytes:
    """Return bytes that are no JSON as a JSON string."""
    return orjson.dumps(line.decode("utf-8", "backslashreplace"))


def unwrap(text: bytes) -> tuple[bytes, str | None]:
    """Return the session file's line in a parked one, and its session; any other as it is."""
    if not text.startswith(_BEGIN):
        return text, None
    about, _, rest = text.partition(_BEFORE_LINE)
    try:
        session: str = orjson.loads(about[len(_BEGIN) :])["session_id"]
        line = rest[:-1]
        return orjson.loads(line).encode() if line.startswith(b'"') else line, session
    except (ValueError, KeyError, TypeError):
        return text, None


def set_aside(base: Path, transport: str) -> list[str]:
    """Return the paths, below the base, of what a transport refused so far, for it to be sent.

    Args:
        base: The base directory.
        transport: The transport's name.
    """
    directory = base / OWN_DIRECTORY / REJECTED
    name = session_to_name(transport)
    with contextlib.suppress(FileNotFoundError):
        # Who refuses one of these again begins a new file.
        os.rename(directory / f"{name}.jsonl", directory / f"{name}~{secrets.token_hex(8)}.jsonl")
    # A name has no `~` but before 64 digits of a hash, so 16 digits after the last are ours.
    found = directory.glob("*~????????????????.jsonl")
    ours = [path for path in found if path.name[: -len("~0123456789abcdef.jsonl")] == name]
    return [path.relative_to(base).as_posix() for path in sorted(ours)]
