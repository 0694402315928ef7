"""How a caller on any event loop waits: for the delivery threads, or for its turn."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable

import anyio

TURN_SECONDS = 0.001
"""The longest that a task which only logs keeps others from running; a turn costs half an event."""


class Waiter:
    """Lets a call wait, on its own loop, until each transport has decided."""

    def __init__(self) -> None:
        self._left = 0
        self._lock = threading.Lock()
        self._decided = anyio.Event()
        self._schedule = _scheduler()

    def released(self) -> None:
        """Note that one transport has decided; called on any thread."""
        self.expect(-1)

    def expect(self, transports: int) -> None:
        """Note how many have to decide, some of which may have done so already."""
        with self._lock:
            self._left += transports
            decided = self._left == 0
        if decided:
            # The caller's loop may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                self._schedule(self._decided.set)

    async def wait(self, longest_seconds: float) -> None:
        """Wait until all have decided, but not for long."""
        with anyio.move_on_after(longest_seconds):
            await self._decided.wait()


def _scheduler() -> Callable[[Callable[[], object]], object]:
    """Return what runs a function soon on this event loop, from any thread."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon


_taken: contextvars.ContextVar[frozenset[str | None]] = contextvars.ContextVar(
    "eventlog_handler.turns", default=frozenset()
)


class Turns:
    """Lets the tasks of an event loop pass one by one for a session, in order of their lines."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str | None], tuple[anyio.Lock, list[None]]] = {}

    @contextlib.asynccontextmanager
    async def take(self, session_id: str | None) -> AsyncIterator[None]:
        """Wait for a session's turn, and hold it.

        A callback that logs to its own session has it already: waiting would be for ever.
        """
        if session_id in _taken.get():
            yield
            return
        key = threading.get_ident(), session_id
        lock, users = self._waiting.setdefault(key, (anyio.Lock(), []))
        users.append(None)
        token = None
        try:
            async with lock:
                token = _taken.set(_taken.get() | {session_id})
                yield
        finally:
            if token is not None:
                _taken.reset(token)
            users.pop()
            if not users:
                self._waiting.pop(key, None)

    def clear(self) -> None:
        """Forget everybody who waits: in a forked child they are the parent's."""
        self._waiting.clear()
