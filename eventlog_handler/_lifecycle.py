"""What has to end before the interpreter does, and what a forked child must not inherit."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import time
import weakref
from typing import Protocol

from eventlog_handler._stamp import renew_process_id


class Owner(Protocol):
    """Something that owns threads, descriptors or locks."""

    @property
    def shutdown_timeout_seconds(self) -> float:
        """What it may take to end."""

    def at_exit(self, deadline: float) -> None:
        """Finish what is waiting, until `deadline` on the monotonic clock."""

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, locks and descriptors."""


class Connected(Protocol):
    """Something that must not cross a fork as it is."""

    def before_fork(self) -> None:
        """Let go of it."""

    def after_fork_in_parent(self) -> None:
        """Take it up again."""

    def after_fork_in_child(self) -> None:
        """Forget what is the parent's."""


_connected: dict[int, weakref.ref[Connected]] = {}
_owners: dict[int, tuple[int, weakref.ref[Owner]]] = {}
_keys = itertools.count()
_hooked = False


def register(owner: Owner, rank: int) -> None:
    """Have `owner` ended at exit and reset after a fork; it is not kept alive.

    Args:
        owner: Called on the exiting, or forking, thread.
        rank: Higher ones first: those above hand over to those below.
    """
    key = next(_keys)
    _owners[key] = (rank, weakref.ref(owner, lambda _: _owners.pop(key, None)))


def _living() -> list[Owner]:
    # A copy first, in one step under the interpreter's lock: the dict may change meanwhile.
    # The sort keeps the order of registration within a rank.
    entries = list(_owners.values())
    entries.sort(key=lambda entry: -entry[0])
    return [owner for _, ref in entries if (owner := ref()) is not None]


def end_all() -> None:
    """End every owner within one budget: the largest that any of them has."""
    owners = _living()
    longest = max((owner.shutdown_timeout_seconds for owner in owners), default=0.0)
    deadline = time.monotonic() + longest
    for owner in owners:
        owner.at_exit(deadline)


def reset_all() -> None:
    """Reset every owner in a forked child."""
    # First, as owners name files by it.
    renew_process_id()
    for connected in _linked():
        connected.after_fork_in_child()
    for owner in _living():
        owner.after_fork_in_child()
    _hook_multiprocessing()


def part_before_forks(connected: Connected) -> None:
    """Have `connected` called around every fork; it is not kept alive."""
    key = next(_keys)
    _connected[key] = weakref.ref(connected, lambda _: _connected.pop(key, None))


def _linked() -> list[Connected]:
    # A copy in one step, as in `_living`.
    return [found for ref in list(_connected.values()) if (found := ref()) is not None]


def prepare_all() -> None:
    """Let go of what must not cross a fork."""
    for connected in _linked():
        connected.before_fork()


def resume_all() -> None:
    """Go on in the parent after a fork."""
    for connected in _linked():
        connected.after_fork_in_parent()


def _hook_multiprocessing() -> None:
    """Have `end_all` called in children of `multiprocessing`, which skip the exit hooks.

    Such a child first forgets the finalizers of its parent, then runs its after-fork hooks, so the
    one has to be registered by the other.
    """
    global _hooked
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _hooked:
        _hooked = True
        util.register_after_fork(end_all, _end_with_multiprocessing)


def _end_with_multiprocessing(_: object) -> None:
    # A low priority: behind what the application itself finalizes, which may log.
    sys.modules["multiprocessing.util"].Finalize(None, end_all, exitpriority=-100)


# Registered after logging's own hook, as that module was imported first: so it runs before
# `logging.shutdown` closes our handlers.
atexit.register(end_all)
os.register_at_fork(before=prepare_all, after_in_parent=resume_all, after_in_child=reset_all)
_hook_multiprocessing()
