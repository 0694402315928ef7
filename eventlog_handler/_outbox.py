"""How far each transport is in each file: in SQLite, for the next process.

`.eventlog/delivery.sqlite3` has a row for each transport and file that holds, or may still get,
what the transport has not acknowledged. A row is committed before its file's first line, so whoever
comes after a kill has to look at rows only. A row belongs to who writes or sends its file, see
`_owner.py`; rows of the dead are adopted in a transaction, and so by one process only.

Nothing in here raises: without its database a transport still gets what this process writes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from eventlog_handler import _lifecycle
from eventlog_handler._database import (
    COMPLETE,
    DATABASE,
    SCAN_IS_DUE,
    blob,
    keep_aside,
    open_database,
    text,
)
from eventlog_handler._journal import OWN_DIRECTORY, journal_directory
from eventlog_handler._owner import come_alive, exclusive, lives, owners, remove
from eventlog_handler._report import Report, warn
from eventlog_handler._stamp import process_id

MADE = "delivery.made"
"""Says that there was a database once: if it is not there then, it was lost."""
NOBODY = ""
"""The owner of rows that wait for adoption."""
CHUNK_ROWS = 256
"""Files adopted at once, about: whole sessions."""
BUSY_SECONDS = 0.5
"""The longest wait for another process's transaction; each takes well under a millisecond."""
RETRY_SECONDS = 1.0
"""Until a database that has failed is tried again."""
FORK_SECONDS = 1.0
CHECKPOINT_TRANSACTIONS = 1000
_INSERT = "INSERT INTO acked (transport, path, session, owner, position) VALUES (?, ?, ?, ?, ?)"
_SAVE = f"""{_INSERT} ON CONFLICT (transport, path)
DO UPDATE SET position = excluded.position, owner = excluded.owner"""
# Whole sessions: of a part of one, later files could be sent before earlier ones. And all of
# those that go on here, whose newer files would be sent first otherwise.
_ADOPTABLE = """
SELECT number, path, session, position FROM acked WHERE owner = '' AND transport = :transport
AND (
    session IN (
        SELECT session FROM acked WHERE owner = '' AND transport = :transport
        ORDER BY number LIMIT :sessions
    )
    OR session IN (SELECT session FROM acked WHERE owner = :me AND transport = :transport)
)
ORDER BY number
"""
_DELETE = "DELETE FROM acked WHERE transport = ? AND path = ? AND owner = ?"
_numbers = itertools.count(1)
_left_to_their_parents: list[sqlite3.Connection | None] = []
_untouchable: set[Path] = set()
"""Databases that this process, or one that it was forked from, cannot use."""
T = TypeVar("T")


class Owed(NamedTuple):
    """A file of which a transport has not acknowledged all, perhaps."""

    path: str
    """Below the base."""
    session: str
    position: int
    """The byte up to which it has."""


class Outbox:
    """One gateway's share in the database of its base directory; for any thread.

    Args:
        base: The base directory.
        directory_mode: Permission bits, where it has to be made.
        report: Hears of every failure.
        scan: Returns all session files below the base: path, session, and what the id of the first
            event begins with. Asked where the database was lost.
    """

    def __init__(
        self,
        base: Path,
        directory_mode: int,
        report: Report,
        scan: Callable[[], Iterable[tuple[str, str, str]]],
    ) -> None:
        self.base = base
        self._own = base / OWN_DIRECTORY
        self._path = self._own / DATABASE
        self._directory_mode = directory_mode
        self._report = report
        self._scan = scan
        self._reset()
        _lifecycle.part_before_forks(self)

    def _reset(self) -> None:
        self._process = os.getpid()
        self._owner = f"{process_id()}-{next(_numbers)}"
        self.losses = 0
        """How often what was saved had to be taken for lost; ours has to be saved again then."""
        self.failing = self._path in _untouchable
        self._retry_at = math.inf if self.failing else 0.0
        self._database: sqlite3.Connection | None = None
        self._inode = 0
        self._fd = -1
        self._transactions = 0
        # Re-entrant: a finalizer may end another gateway while its thread is in here.
        self._lock = threading.RLock()
        self._checkpointing = threading.Lock()
        self._forking: int | None = None

    def register(
        self, path: str, session: str, positions: Mapping[str, int]
    ) -> dict[str, list[Owed]] | None:
        """Make a file known that is about to be written.

        Args:
            path: Below the base.
            session: Whose.
            positions: By transport, up to where it needs nothing of the file.

        Returns:
            By transport, what is left of the session's other files, of processes that are dead:
            theirs come first. None where nothing could be saved.
        """

        def action(database: sqlite3.Connection) -> dict[str, list[Owed]]:
            found = {}
            for transport, position in positions.items():
                earlier = database.execute(
                    "SELECT number, owner, path, position FROM acked"
                    " WHERE transport = ? AND session = ? AND path <> ? ORDER BY number",
                    (transport, blob(session), path),
                ).fetchall()
                theirs = [row for row in earlier if not self._lives(row[1])]
                self._take_over(database, [row[0] for row in theirs])
                row = (transport, path, blob(session), self._owner, position)
                database.execute(_SAVE, row)
                found[transport] = [Owed(row[2], session, row[3]) for row in theirs]
            return found

        return self._try(action, None)

    def _take_over(self, database: sqlite3.Connection, numbers: Iterable[int]) -> None:
        rows = [(self._owner, number) for number in numbers]
        database.executemany("UPDATE acked SET owner = ? WHERE number = ?", rows)

    def save(self, transport: str, positions: Iterable[Owed], finished: Iterable[str] = ()) -> bool:
        """Save how far a transport is; return whether that could be done.

        Args:
            transport: Its name.
            positions: In files of which there is or may come more.
            finished: The paths of those that are sent and that nobody writes any more.
        """
        rows = [(transport, p, blob(s), self._owner, position) for p, s, position in positions]

        def action(database: sqlite3.Connection) -> bool:
            database.executemany(_SAVE, rows)
            database.executemany(_DELETE, [(transport, path, self._owner) for path in finished])
            return True

        saved = self._try(action, False)
        if self._transactions >= CHECKPOINT_TRANSACTIONS:
            self._checkpoint()
        return saved

    def adopt(self, transport: str, names: Iterable[str]) -> list[Owed]:
        """Return files of dead processes, which are ours to send from now on.

        Args:
            transport: For which.
            names: Of all transports; for a database that was lost.

        Returns:
            The oldest ones; if there are `CHUNK_ROWS` or more, ask again.
        """
        if self._unused or self._owner == NOBODY:
            return []
        self._rebuild(list(names))
        self._checkpoint()
        return self._try(lambda database: self._adopt(database, transport), [])

    def _adopt(self, database: sqlite3.Connection, transport: str) -> list[Owed]:
        self._stay_alive()
        found = database.execute(
            "SELECT DISTINCT owner FROM acked WHERE transport = ? AND owner <> ?",
            (transport, self._owner),
        ).fetchall()
        dead = [(owner,) for (owner,) in found if not self._lives(owner)]
        database.executemany("UPDATE acked SET owner = '' WHERE owner = ?", dead)
        values = {"me": self._owner, "transport": transport, "sessions": CHUNK_ROWS}
        rows = database.execute(_ADOPTABLE, values).fetchall()
        self._take_over(database, [row[0] for row in rows])
        self._bury(database)
        return [Owed(row[1], text(row[2]), row[3]) for row in rows]

    def _bury(self, database: sqlite3.Connection) -> None:
        """Remove the locks of dead processes that own nothing any more."""
        for owner in owners(self._own):
            query = "SELECT 1 FROM acked WHERE owner = ? LIMIT 1"
            if not self._lives(owner) and not database.execute(query, (owner,)).fetchone():
                remove(self._own, owner)

    def _lives(self, owner: str) -> bool:
        return owner != NOBODY and (owner == self._owner or lives(self._own, owner))

    def release(self, transport: str, unfinished: Iterable[str], keep: bool) -> None:
        """Let go of a transport's files: it ends.

        Args:
            transport: Its name.
            unfinished: The paths of those of which something is left to send.
            keep: Whether these stay ours, for a transport of that name that may come back.
        """
        left = set(unfinished)
        heir = self._owner if keep else NOBODY

        def action(database: sqlite3.Connection) -> None:
            rows = database.execute(
                "SELECT path FROM acked WHERE owner = ? AND transport = ?",
                (self._owner, transport),
            ).fetchall()
            gone = [(transport, path, self._owner) for (path,) in rows if path not in left]
            database.executemany(_DELETE, gone)
            database.execute(
                "UPDATE acked SET owner = ? WHERE owner = ? AND transport = ?",
                (heir, self._owner, transport),
            )

        if not self._unused and self._owner != NOBODY:
            self._try(action, None)

    @property
    def _unused(self) -> bool:
        """Whether nobody has ever saved anything here, so that there is nothing to ask for."""
        return self._database is None and not os.path.lexists(self._own / MADE)

    def close(self) -> None:
        """End. What is registered later belongs to nobody, for the next process to adopt."""
        with self._lock:
            if self._database is not None:
                with contextlib.suppress(sqlite3.Error):
                    # Closing writes the log back.
                    self._database.execute("PRAGMA synchronous=NORMAL")
            self._disconnect()
            self._let_go()
            remove(self._own, self._owner)
            self._owner = NOBODY

    def __del__(self) -> None:
        """Leave nothing open where its gateway was never closed; its rows are adopted then."""
        with contextlib.suppress(AttributeError):
            self._disconnect()
            self._let_go()

    def _stay_alive(self) -> None:
        """Hold our lock: it is new, or somebody has tidied its file away."""
        if self._owner != NOBODY and self._owner not in owners(self._own):
            self._let_go()
            self._fd = come_alive(self._own, self._owner)

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _try(self, action: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Run a transaction; where that fails, say so and return `otherwise`."""
        with self._lock:
            if time.monotonic() < self._retry_at:
                return otherwise
            try:
                with self._transaction() as database:
                    result = action(database)
            except (sqlite3.Error, OSError, ValueError) as error:
                self._failed(error)
                return otherwise
            self.failing = False
            self._transactions += 1
            if self._owner == NOBODY:
                self._disconnect()
            return result

    def _failed(self, error: Exception) -> None:
        self.losses += 1
        self.failing = True
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._report.tell(error, "delivery database")
        warn("outbox", f"offsets cannot be saved now ({type(error).__name__}); delivery goes on")
        self._disconnect()
        # The class itself is what "malformed" and "not a database" are; its children are not.
        if type(error) is sqlite3.DatabaseError:
            keep_aside(self._own)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._connected()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise

    def _connected(self) -> sqlite3.Connection:
        """Return a connection to the database that is there now."""
        if self._database is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == self._inode:
                    return self._database
            # Deleted or replaced: what is saved there nobody would read.
            self._disconnect()
            self.losses += 1
        journal_directory(self.base, self._directory_mode)
        self._stay_alive()
        with exclusive(self._own / MADE, BUSY_SECONDS) as mark:
            again = os.fstat(mark).st_size > 0
            # SQLite would make it with other permissions.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(self._path, flags, 0o600))
            self._database = open_database(self._path, BUSY_SECONDS, again)
            self._inode = os.stat(self._path).st_ino
            if not again:
                os.write(mark, b"1\n")
        return self._database

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def _rebuild(self, names: list[str]) -> None:
        """Enter all files that there are, where the database was lost.

        A file of a living process is entered as that one's: it will correct the row, and if it
        dies before, the file is sent from its beginning.
        """
        version = self._try(lambda db: db.execute("PRAGMA user_version").fetchone()[0], 0)
        if version != SCAN_IS_DUE:
            return
        warn("scan", "the delivery database was lost: all files are sent again")
        living = [owner for owner in owners(self._own) if self._lives(owner)]
        owner_of = {owner.partition("-")[0]: owner for owner in living}
        # Our own are asked for by those that write them; what ended gateways left is nobody's.
        owner_of.pop(process_id(), None)
        try:
            rows = [
                (name, path, blob(session), owner_of.get(process, NOBODY), 0)
                for path, session, process in self._scan()
                for name in names
            ]
        except OSError as error:
            self._report.tell(error, "looking for session files")
            return

        def action(database: sqlite3.Connection) -> None:
            database.executemany(f"{_INSERT} ON CONFLICT DO NOTHING", rows)
            database.execute(f"PRAGMA user_version={COMPLETE}")

        self._try(action, None)

    def _checkpoint(self) -> None:
        """Write the log of changes back, over a connection of its own: nobody waits for it."""
        if self._transactions < CHECKPOINT_TRANSACTIONS:
            return
        with self._checkpointing, contextlib.suppress(sqlite3.Error):
            self._transactions = 0
            # Where it is gone none is made here.
            where = f"{self._path.as_uri()}?mode=rw"
            database = sqlite3.connect(where, timeout=0, isolation_level=None, uri=True)
            with contextlib.closing(database):
                database.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def before_fork(self) -> None:
        """Let no connection cross a fork, which SQLite forbids.

        https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_across_a_fork_
        """
        if not self._lock.acquire(timeout=FORK_SECONDS):
            return
        if not self._checkpointing.acquire(timeout=FORK_SECONDS):
            self._lock.release()
            return
        self._forking = threading.get_ident()
        self._disconnect()

    def after_fork_in_parent(self) -> None:
        """Go on; the next transaction connects again."""
        if self._forking == threading.get_ident():
            self._forking = None
            self._checkpointing.release()
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Begin with rows of the child's own."""
        if self._process == os.getpid():
            return
        # Where nobody announced the fork, a server written in C for example, it may be clean too.
        clean = self._forking == threading.get_ident() or (
            self._database is None
            and self._lock.acquire(blocking=False)
            and self._checkpointing.acquire(blocking=False)
        )
        if not clean:
            # A thread was inside SQLite when the process was copied: what it used must be neither
            # used nor closed, and a second connection to the same file would share its state.
            _untouchable.add(self._path)
            _left_to_their_parents.append(self._database)
        self._let_go()
        self._reset()
