"""The database's file: what is in it, how it is opened, and what becomes of a damaged one."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

DATABASE = "delivery.sqlite3"
SCAN_IS_DUE, COMPLETE = 1, 2
"""Values of `user_version`: where files have to be looked for, and where all are known. A database
that was not made to its end has none."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS acked (
    number INTEGER PRIMARY KEY,
    transport TEXT NOT NULL,
    path TEXT NOT NULL,
    session BLOB NOT NULL,
    owner TEXT NOT NULL,
    position INTEGER NOT NULL,
    UNIQUE (transport, path)
);
CREATE INDEX IF NOT EXISTS acked_session ON acked (transport, session);
CREATE INDEX IF NOT EXISTS acked_owner ON acked (owner, transport);
"""


def open_database(path: Path, busy_seconds: float, again: bool) -> sqlite3.Connection:
    """Return a connection, in which each statement commits by itself unless it is told otherwise.

    Args:
        path: The file; exists, perhaps empty.
        busy_seconds: The longest wait for another process's transaction.
        again: Whether there was one before: a new one stands in the place of one that had rows.

    Raises:
        sqlite3.Error: It is damaged, or the file system cannot lock or map.
    """
    database = sqlite3.connect(
        path, timeout=busy_seconds, isolation_level=None, check_same_thread=False
    )
    try:
        # Nobody who writes waits for the disk here: that is left to checkpoints. What a power cut
        # takes of the log is sent again, or of new files not sent.
        for pragma in ("journal_mode=WAL", "synchronous=OFF", "wal_autocheckpoint=0"):
            database.execute(f"PRAGMA {pragma}")
        database.executescript(_SCHEMA)
        if database.execute("PRAGMA user_version").fetchone()[0] == 0:
            database.execute(f"PRAGMA user_version={SCAN_IS_DUE if again else COMPLETE}")
    except BaseException:
        database.close()
        raise
    return database


def keep_aside(own: Path) -> None:
    """Make room for a new database in the place of a damaged one.

    Args:
        own: Our own directory.
    """
    directory = own / "damaged"
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, exist_ok=True)
        stamp = f"{time.time_ns():x}"
        for suffix in ("-wal", "-shm", ""):
            path = own / f"{DATABASE}{suffix}"
            if path.exists():
                path.rename(directory / f"{path.name}-{stamp}")


def blob(session: str) -> bytes:
    """Return a session's id as it is saved: it may hold what UTF-8 has no bytes for."""
    return session.encode("utf-8", "surrogatepass")


def text(session: bytes) -> str:
    """Return a session's id that was saved."""
    return session.decode("utf-8", "surrogatepass")
