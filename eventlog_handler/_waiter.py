"""How a caller on any event loop waits for what happens on the delivery thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import anyio


class Waiter:
    """Lets a call wait, on its own loop, for what happens on the delivery thread.

    Args:
        transports: How many have to decide; 0 is no waiting at all.
    """

    def __init__(self, transports: int) -> None:
        self._left = transports
        self._decided = anyio.Event()
        self._schedule = _scheduler() if transports else None

    def released(self) -> None:
        """Note that one transport has decided; called on the delivery thread."""
        self._left -= 1
        if self._left == 0 and self._schedule is not None:
            # The caller's loop may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                self._schedule(self._decided.set)

    async def wait(self, longest_seconds: float) -> None:
        """Wait until all have decided, but not for long."""
        if self._schedule is not None:
            with anyio.move_on_after(longest_seconds):
                await self._decided.wait()


def _scheduler() -> Callable[[Callable[[], object]], object]:
    """Return what runs a function soon on this event loop, from any thread."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon
