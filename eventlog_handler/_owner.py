"""Who is alive: each gateway that sends holds a lock as long as its process lives.

`flock` and not a process id: it tells the truth in another container too, and needs no clean-up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".owner"


def come_alive(directory: Path, owner: str) -> int:
    """Return the descriptor that keeps an owner alive while it is open.

    Args:
        directory: Our own, below the base; exists.
        owner: A new name.

    Raises:
        OSError: No file can be made or locked there.
    """
    making = directory / f"{owner}.making"
    fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # Locked before it has its name, so that nobody takes it for a dead one's.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        making.rename(directory / f"{owner}{_SUFFIX}")
    except BaseException:
        os.close(fd)
        making.unlink(missing_ok=True)
        raise
    return fd


def lives(directory: Path, owner: str) -> bool:
    """Return whether an owner is alive."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(directory / f"{owner}{_SUFFIX}", flags)
    except OSError as error:
        # What cannot be asked counts as alive: it is nobody's to take.
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    try:
        # Shared: others may be asking the same.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def owners(directory: Path) -> list[str]:
    """Return all owners, dead or alive, that have a file."""
    return [path.stem for path in directory.glob(f"*{_SUFFIX}")]


def remove(directory: Path, owner: str) -> None:
    """Remove the file of a dead owner, or one's own; if it stays, it is a dead one's later."""
    with contextlib.suppress(OSError):
        os.unlink(directory / f"{owner}{_SUFFIX}")


@contextlib.contextmanager
def exclusive(path: Path, longest_seconds: float) -> Iterator[int]:
    """Open a file, made where it is missing, and hold its lock; yields the descriptor.

    Args:
        path: The file.
        longest_seconds: How long to wait for another process to let go of it.

    Raises:
        OSError: It cannot be opened, or locked in time.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + longest_seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.002)
        yield fd
    finally:
        # In so many words: a child that was forked meanwhile has a copy of the descriptor.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
