"""Session ids and patterns to names of directories and files: pure, and never outside the base."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

_SAFE = frozenset((string.ascii_letters + string.digits + "_.-").encode())
_LONGEST = 128
"""Characters of a directory's name; file systems allow 255 bytes."""
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_EMPTY = "%"
"""The empty id: a lone percent sign is the start of no encoding, so it can be nothing else."""
Parsed = list[tuple[str, bool]]
"""A pattern as pairs of literal text and whether its field follows it."""


def session_to_name(session_id: str) -> str:
    """Return the directory name of a session: injective, and safe on every file system.

    `[A-Za-z0-9_.-]` stay, all else is percent-encoded UTF-8 (RFC 3986, lone surrogates passed as
    their three bytes). A leading dot or dash, a trailing dot, a Windows device name and the empty
    id are encoded too. A name past 128 characters becomes its first 63, `~`, and the SHA-256 of the
    id in hex; `~` is in no other name.
    """
    raw = session_id.encode("utf-8", "surrogatepass")
    name = "".join(chr(b) if b in _SAFE else f"%{b:02X}" for b in raw)
    if name[:1] in (".", "-") or _DEVICE.fullmatch(name):
        name = f"%{raw[0]:02X}{name[1:]}"
    if name.endswith("."):
        name = f"{name[:-1]}%2E"
    if len(name) > _LONGEST:
        return f"{name[:63]}~{hashlib.sha256(raw).hexdigest()}"
    return name or _EMPTY


def name_to_session(name: str) -> str | None:
    """Return the session id of a directory name, or None where the name is a hash or not ours."""
    if name == _EMPTY:
        return ""
    if not re.fullmatch(r"([A-Za-z0-9_.-]|%[0-9A-F]{2})+", name):
        return None
    raw = re.sub(rb"%([0-9A-F]{2})", lambda m: bytes([int(m[1], 16)]), name.encode())
    try:
        session_id = raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return session_id if session_to_name(session_id) == name else None


def _refuse(option: str, pattern: str, problem: str) -> ValueError:
    return ValueError(f"{option}={pattern!r} {problem}")


def _text(option: str, pattern: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"{option} must be a str, not {type(pattern).__name__}")
    return pattern


def _parse(option: str, pattern: str, field: str, part: str) -> Parsed:
    """Parse the part of a pattern that may hold `{field}` and nothing else.

    Never `str.format`: `{session_id.__class__}` leaks, `{session_id:>999999999}` is a bomb.
    """
    try:
        parsed = list(string.Formatter().parse(part))
    except ValueError as error:
        raise _refuse(option, pattern, f"cannot be read: {error}") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (name != field or spec or conversion):
            raise _refuse(
                option, pattern, f"has the field {name!r}; write {{{field}}}, which is the only one"
            )
    return [(literal, name is not None) for literal, name, _, _ in parsed]


def _fill(parts: Parsed, value: str) -> str:
    return "".join(literal + (value if with_field else "") for literal, with_field in parts)


class SessionPaths:
    """Where a gateway's sessions live, decided once from its options.

    Args:
        base: The base directory.
        directory_pattern: Below it; `/` makes levels, `{session_id}` must be in the last one.
        unknown_pattern: The last level's name for events without a session; `{uuid}` may be in it.
        file_pattern: For `strftime`, in UTC; the suffix is added.
        suffix: Such as `".jsonl"`.
        unknown_uuid: What `{uuid}` stands for.

    Raises:
        ValueError: A pattern has another field, or would leave the base; the message names it.
        TypeError: A pattern is not a str.
    """

    def __init__(
        self,
        base: Path,
        directory_pattern: str,
        unknown_pattern: str,
        file_pattern: str,
        suffix: str,
        unknown_uuid: str,
    ) -> None:
        self.base = base
        self._suffix = suffix
        self._file_pattern = check_file_pattern("file_naming_pattern", file_pattern)
        self._parents, self._last = parse_directory_pattern(
            "session_directory_pattern", directory_pattern
        )
        unknown = parse_unknown_pattern("unknown_session_pattern", unknown_pattern)
        self.unknown = _fill(unknown, unknown_uuid)
        """The id that events without a session go under."""
        self.unknown_name = session_to_name(self.unknown)
        """The name of their directory."""

    def directory(self, session_id: str | None) -> tuple[str, ...]:
        """Return the levels below the base of a session's directory; None is the unknown one."""
        if session_id is None:
            return (*self._parents, self.unknown_name)
        return (*self._parents, session_to_name(_fill(self._last, session_id)))

    def session(self, levels: Sequence[str], said: str | None) -> str:
        """Return which session a directory is of.

        Args:
            levels: As `directory` returns them.
            said: What an event in it says; it decides where a name does not tell (a hash).
        """
        if said is not None and self.directory(said) == tuple(levels):
            return said
        if self._last == [("", True)]:
            return name_to_session(levels[-1]) or levels[-1]
        return levels[-1]

    def file_name(self, now: datetime, taken: int = 0) -> str:
        """Return a file's name.

        Args:
            now: When it is created, in UTC.
            taken: How many names of that time are taken already: `-1`, `-2` … is added.
        """
        stem = session_to_name(now.strftime(self._file_pattern))
        return f"{stem}-{taken}{self._suffix}" if taken else f"{stem}{self._suffix}"


def parse_directory_pattern(option: str, pattern: str) -> tuple[tuple[str, ...], Parsed]:
    """Return the levels above a session's directory, and the parsed pattern of its own name."""
    *parents, last = _text(option, pattern).split("/")
    parsed = _parse(option, pattern, "session_id", last)
    if not any(with_field for _, with_field in parsed):
        problem = "lacks {session_id} in its last level: sessions would share a directory"
        raise _refuse(option, pattern, problem)
    for level in parents:
        if session_to_name(level) != level or level == _EMPTY:
            problem = f"has the level {level!r}: use letters, digits, '_', '-', '.'; no leading dot"
            raise _refuse(option, pattern, problem)
    return tuple(parents), parsed


def parse_unknown_pattern(option: str, pattern: str) -> Parsed:
    """Return the parsed pattern of the directory of events that have no session."""
    parsed = _parse(option, pattern, "uuid", _text(option, pattern))
    if not _fill(parsed, "-"):
        raise _refuse(option, pattern, "is empty; write 'unknown_{uuid}'")
    return parsed


def check_file_pattern(option: str, pattern: str) -> str:
    """Return the pattern, which `strftime` takes and which names a file."""
    if not _text(option, pattern) or "/" in pattern or "\0" in pattern:
        raise _refuse(option, pattern, "must be a file's name: not empty, no '/', no NUL")
    try:
        datetime(2026, 12, 31, 23, 59, 59, 999999).strftime(pattern).encode()
    except ValueError as error:
        raise _refuse(option, pattern, f"is refused by strftime: {error}") from None
    return pattern
