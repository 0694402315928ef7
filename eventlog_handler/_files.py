"""Session files: one a session and writer, opened lazily and safely, never torn by an error."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import orjson

from eventlog_handler._paths import SessionPaths
from eventlog_handler._snapshot import as_record
from eventlog_handler.typing import Bytes, EncodedEvent, LineFormatter, Registrar, Written

LARGEST_WRITE = 256 * 1024
"""Bytes in one `write`; a process killed in mid-write tore lines of 8 MB, never of 1 MB."""
LARGE_PIECE = 4096
"""Bytes in each piece, on average, from which the pieces of a write are not joined before it."""
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK a planted FIFO would hold the open for ever; regular files do not mind it.
_FILE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""Errors that say: what is under this name now is no file, or nothing is."""


class Layout:
    """How lines make a file: `opening`, then lines joined by `separator`, then `closing`.

    Args:
        log_format: `jsonl`, `json` or `custom`.
        formatter: For `custom`: a callable, or a `logging.Formatter`.
        failed: Called with what a formatter raised; the JSON line is written instead.
    """

    def __init__(
        self,
        log_format: str,
        formatter: LineFormatter | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        array = log_format == "json"
        self.opening, self.separator, self.closing = (
            (b"[\n", b",\n", b"\n]\n") if array else (b"",) * 3
        )
        self._ending = b"" if array else b"\n"
        self._end = b"}" + self._ending
        # An array is closed again by each write, which therefore begins before the old end.
        self.flags = 0 if array else os.O_APPEND
        render = getattr(formatter, "format", None)
        self._format = (lambda line: render(as_record(line))) if render is not None else formatter
        self._failed = failed

    def pieces(self, event: EncodedEvent, seq: int) -> tuple[bytes, Bytes, bytes]:
        """Return what stands in the file for an event, the `seq`-th of it; in pieces, unjoined."""
        if self._format is None:
            return event.head(seq), event.body, self._end
        line = event.line(seq)
        try:
            made = self._format(orjson.loads(line))
            text = made if isinstance(made, bytes) else made.encode("utf-8", "backslashreplace")
        except Exception as error:
            if self._failed is not None:
                self._failed(error)
            text = line
        return text, b"", b"" if text.endswith(self._ending) else self._ending


class _File:
    """What is remembered of a session's file; its descriptor may be closed and opened again."""

    __slots__ = ("fd", "generation", "inode", "named", "path", "seq", "size")

    def __init__(self, levels: Sequence[str], name: str) -> None:
        self.path = "/".join((*levels, name))
        """Where it is, below the base."""
        self.fd = -1
        self.inode = 0
        """And its device: what is found under the name later may be another file."""
        self.named = False
        """Whether its directory entry is on the disk."""
        self.seq = 0
        self.size = 0
        self.generation = -1
        """In which the registrar knows of it."""

    @property
    def levels(self) -> list[str]:
        """Of its directory, below the base."""
        return self.path.split("/")[:-1]

    @property
    def name(self) -> str:
        """Its own."""
        return self.path.rpartition("/")[2]

    def rename(self, name: str) -> None:
        """Take another name, before there is such a file."""
        self.path = "/".join((*self.levels, name))


class SessionFiles:
    """All the files that one gateway writes. Every method may be called from any thread.

    Args:
        paths: Where sessions live.
        layout: How lines make a file.
        max_open_files: Descriptors held at once; the least recently used is closed.
        file_mode: Permission bits of new files.
        directory_mode: Permission bits of new directories.
        max_file_bytes: A file that is as large is not written any more; None is no limit.
        registrar: Hears of each file before its first line; None where nobody reads it back.
    """

    def __init__(
        self,
        paths: SessionPaths,
        layout: Layout,
        *,
        max_open_files: int,
        file_mode: int,
        directory_mode: int,
        max_file_bytes: int | None = None,
        registrar: Registrar | None = None,
    ) -> None:
        self._paths = paths
        self._base = os.fspath(paths.base)
        self._layout = layout
        self._max_open = max_open_files
        self._file_mode = file_mode
        self._directory_mode = directory_mode
        self._max_bytes = max_file_bytes
        self._registrar = registrar
        self._known: dict[str | None, _File] = {}
        self._open: OrderedDict[str | None, _File] = OrderedDict()
        self._lock = threading.Lock()
        self.written = 0
        self.bytes = 0

    def directory(self, session_id: str | None) -> Path:
        """Return a session's directory, whether or not it exists yet."""
        return self._paths.base.joinpath(*self._paths.directory(session_id))

    def path(self, session_id: str | None) -> Path:
        """Return a session's file: the one that is written, or that will be with the next event."""
        with self._lock:
            directory, file = self.directory(session_id), self._file(session_id)
            taken = 0
            while file.fd < 0 and not file.size and os.path.lexists(directory / file.name):
                # Another writer's, or the one that this session's first event will meet.
                taken += 1
                file.rename(self._paths.file_name(datetime.now(timezone.utc), taken))
            return directory / file.name

    def append(
        self,
        session_id: str | None,
        events: Sequence[EncodedEvent],
        then: Callable[[Written], object],
    ) -> int:
        """Write the first of `events`, as many as go into one write; call again for the rest.

        Args:
            session_id: Whose file; None is the unknown session's.
            events: At least one.
            then: Called with what was written, before anybody else can write: what it hands on
                keeps the order of the files, whichever threads write.

        Returns:
            How many were written, at least one.

        Raises:
            OSError: Nothing was written; the file ends with the last whole line.
        """
        with self._lock:
            was_open = session_id in self._open
            file, written, size = self._append(session_id, events)
            if was_open and os.fstat(file.fd).st_nlink == 0:
                # Somebody deleted the file under our feet. Asking after the write instead of
                # before leaves no gap between the two.
                self._forget(session_id)
                file, written, size = self._append(session_id, events)
            count = len(written.events)
            file.seq += count
            self.written += count
            self.bytes += size
            then(written)
            return count

    def _append(
        self, session_id: str | None, events: Sequence[EncodedEvent]
    ) -> tuple[_File, Written, int]:
        file = self._opened(session_id)
        if self._max_bytes is not None and file.size >= self._max_bytes:
            self._forget(session_id)
            file = self._opened(session_id)
        name = self._paths.unknown_name if session_id is None else session_id
        path, outbox, registrar = file.path, None, self._registrar
        if registrar is not None:
            outbox = registrar.outbox
            if file.generation != registrar.generation:
                file.generation = registrar.register(path, name, file.size)
        pieces, size, ends = self._chunk(file, events)
        chunk = events[: len(ends)]
        # Without the call in Python that the constructor of a named tuple is.
        place = outbox, path, name, file.size, file.seq + 1, chunk, ends
        written = tuple.__new__(Written, place)
        self._write(session_id, file, pieces, size)
        return file, written, size

    def _chunk(
        self, file: _File, events: Sequence[EncodedEvent]
    ) -> tuple[list[Bytes], int, list[int]]:
        """Return what is written at once, its size, and where in the file each event will end."""
        layout = self._layout
        pieces: list[Bytes] = []
        ends: list[int] = []
        size, before = 0, layout.separator if file.size else layout.opening
        for seq, event in enumerate(events, file.seq + 1):
            head, body, end = layout.pieces(event, seq)
            larger = size + len(before) + len(head) + len(body) + len(end)
            if larger > LARGEST_WRITE and ends:
                break
            size = larger
            pieces += (before, head, body, end)
            ends.append(file.size + size)
            before = layout.separator
        pieces.append(layout.closing)
        return pieces, size + len(layout.closing), ends

    def committed(self, session: str, path: str) -> int | None:
        """Return how much of a file is written for good, or None where we do not write it.

        Args:
            session: As in `Written`.
            path: Below the base.
        """
        for session_id in (session, None):
            file = self._known.get(session_id)
            # One that is not open and has no bytes is no more than a name, perhaps another's.
            if file is not None and (file.fd >= 0 or file.size) and path == file.path:
                return file.size
        return None

    def _write(self, session_id: str | None, file: _File, pieces: list[Bytes], size: int) -> None:
        start = file.size - len(self._layout.closing)
        if start < 0:
            start = 0
        try:
            if not self._layout.flags & os.O_APPEND:
                os.lseek(file.fd, start, os.SEEK_SET)
            # A full disk shows as a short write first, and as ENOSPC after. What is large is not
            # joined: the page faults of a copy cost more than the write (100 kB: 60 µs of 210).
            large = size > LARGE_PIECE * len(pieces)
            done = os.writev(file.fd, pieces) if large else 0
            if done < size:
                joined = b"".join(pieces)
                while done < size:
                    done += os.write(file.fd, joined[done:] if done else joined)
        except BaseException:
            self._undo(session_id, file, start)
            raise
        file.size = start + size

    def _undo(self, session_id: str | None, file: _File, start: int) -> None:
        """Take back what a failed write left; if even that fails, leave the file for a new one."""
        try:
            os.ftruncate(file.fd, start)
            if file.size > start:
                os.pwrite(file.fd, self._layout.closing, start)
        except OSError:
            self._forget(session_id)

    def _file(self, session_id: str | None) -> _File:
        """Return what is known of a session's file; its name is chosen at the first question."""
        file = self._known.get(session_id)
        if file is None:
            levels = self._paths.directory(session_id)
            name = self._paths.file_name(datetime.now(timezone.utc))
            file = self._known[session_id] = _File(levels, name)
        return file

    def _opened(self, session_id: str | None) -> _File:
        file = self._file(session_id)
        if file.fd >= 0:
            self._open.move_to_end(session_id)
            return file
        try:
            self._attach(file)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                raise
            # The process is short of descriptors: ours are the ones that we can give back.
            self._close_oldest(len(self._open) // 2)
            self._attach(file)
        self._close_oldest(self._max_open - 1)
        self._open[session_id] = file
        return file

    def _attach(self, file: _File) -> None:
        """Open a session's file: the one that it has, as long as that is there, or a new one."""
        if file.size:
            try:
                # In one step, though a link may stand in the middle: the inode tells.
                path = f"{self._base}/{file.path}"
                file.fd, found = _open(path, _FILE | self._layout.flags)
                file.size = found.st_size
                if stat.S_ISREG(found.st_mode) and file.inode == _inode(found):
                    return
                _close(file)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
            # Deleted, or something else has taken its place while it was closed.
            file.seq = file.size = 0
        flags = _FILE | self._layout.flags | os.O_CREAT | os.O_EXCL
        with self._directory(file) as directory:
            now, taken = datetime.now(timezone.utc), 0
            while file.fd < 0:
                try:
                    file.fd, found = _open(file.name, flags, self._file_mode, directory)
                    file.inode = _inode(found)
                except FileExistsError:
                    file.rename(self._paths.file_name(now, taken))
                    taken += 1

    @contextlib.contextmanager
    def _directory(self, file: _File) -> Iterator[int]:
        """Open a file's directory, made where it is missing.

        Level by level: `O_NOFOLLOW` on a whole path would still follow a link planted in its
        middle. The base itself may be a link, it is the operator's own.
        """
        base, mode = self._paths.base, self._directory_mode
        try:
            fd = os.open(base, DIRECTORY)
        except FileNotFoundError:
            os.makedirs(base, mode, exist_ok=True)
            fd = os.open(base, DIRECTORY)
        try:
            for level in file.levels:
                try:
                    inner = os.open(level, DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                except FileNotFoundError:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(level, mode, dir_fd=fd)
                    inner = os.open(level, DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def _forget(self, session_id: str | None) -> None:
        """Give a file up: the session's next event begins a new one."""
        file = self._known.pop(session_id)
        self._open.pop(session_id, None)
        _close(file)

    def _close_oldest(self, keep: int) -> None:
        while len(self._open) > keep:
            _close(self._open.popitem(last=False)[1])

    def sync(self, session_id: str | None) -> OSError | None:
        """Have a session's file on the disk, and its name.

        Returns:
            None once they are; else an error after which it is to be tried again.

        Raises:
            OSError: The kernel may have dropped what it could not write. The file is given up: its
                last lines have to go to a new one.
        """
        with self._lock:
            try:
                file = self._opened(session_id)
            except OSError as error:
                return error
            try:
                os.fdatasync(file.fd)
            except OSError:
                self._forget(session_id)
                raise
            try:
                if not file.named:
                    self._sync_names(file)
                    file.named = True
            except OSError as error:
                return error
            return None

    def _sync_names(self, file: _File) -> None:
        with self._directory(file) as directory:
            os.fsync(directory)
        # The levels above it, up to the one that has the base's own name.
        above = self._paths.base.parent
        for level in (self._paths.base.name, *file.levels):
            sync_directory(above)
            above /= level

    def close(self) -> None:
        """Close every descriptor. A later `append` opens its file again."""
        with self._lock:
            self._close_oldest(0)

    def forked(self) -> None:
        """In a child: the parent's files are the parent's; begin new ones, write none of them."""
        self._lock = threading.Lock()
        self._close_oldest(0)
        self._known.clear()


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk; raises OSError."""
    fd = os.open(path, DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _inode(found: os.stat_result) -> int:
    return found.st_dev << 64 | found.st_ino


def _open(
    path: str, flags: int, mode: int = 0o600, directory: int | None = None
) -> tuple[int, os.stat_result]:
    """Open a file and ask what it is; where that fails, no descriptor is left."""
    fd = os.open(path, flags, mode, dir_fd=directory)
    try:
        return fd, os.fstat(fd)
    except BaseException:
        os.close(fd)
        raise


def _close(file: _File) -> None:
    # A failed close says that the disk lost what an earlier write took; Linux frees the descriptor
    # all the same, and closing twice could hit another's.
    fd, file.fd = file.fd, -1
    try:  # noqa: SIM105 - a third of what `suppress` costs, for each event where sessions are many
        os.close(fd)
    except OSError:
        pass
