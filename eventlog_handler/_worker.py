"""A thread with an event loop of its own for each lane.

Of its own, because most drivers know asyncio only while the application may run trio, or no loop at
all; and one for each, because a driver that blocks its loop must block nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import anyio

from eventlog_handler._context import deliver
from eventlog_handler._downstream import as_exception
from eventlog_handler._lanes import Lane
from eventlog_handler._report import Report

CLOSE_SECONDS = 0.25
"""What a transport's `close` gets where the shutdown's budget is used up."""
RESTART_SECONDS = 1.0
"""Until a loop that has broken down is begun anew."""


class _Executor(ThreadPoolExecutor):
    """Runs what drivers do in threads: names that are looked up, certificates that are read.

    Once the interpreter ends it starts no thread and takes no work. Then the work is done at once:
    it holds up the loop, which is the lane's own.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function called; return its result to be."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            future: Future[Any] = Future()
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
            return future


class Worker:
    """Owns the thread of a lane. Its methods are for any thread.

    Args:
        lane: What it runs.
        report: Hears of a loop that breaks down.
    """

    def __init__(self, lane: Lane, report: Report) -> None:
        self.lane = lane
        self._report = report
        self._reset()

    def _reset(self) -> None:
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = anyio.Event()
        self._context = contextvars.copy_context()
        self._deadline = float("inf")
        self._over = threading.Event()
        self._ended = False

    def start(self) -> None:
        """Start the thread, unless it runs or is over."""
        with self._starting:
            if self._thread is not None or self._over.is_set():
                return
            self._thread = threading.Thread(target=self._run, name="eventlog-delivery", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                # From 3.12 on none can be started once the interpreter ends; the files have it all.
                self._thread = None

    def poke(self) -> None:
        """Have the lane look for more."""
        if self.lane.poke():
            self._on_loop(self.lane.wake)
        if self._thread is None:
            self.start()

    def _on_loop(self, function: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            # The loop may close between the two lines: then its thread is at its end anyway.
            with contextlib.suppress(RuntimeError):
                # In the thread's own context: the caller's knows another loop, or none.
                loop.call_soon_threadsafe(function, context=self._context)

    def end(self, deadline: float) -> None:
        """Have the lane end, and what it delivers to closed; nothing here waits.

        Args:
            deadline: When it is cancelled, on the monotonic clock.
        """
        self._deadline = deadline
        self.lane.ending = True
        self._on_loop(self._stop)

    def _stop(self) -> None:
        self.lane.wake()
        self._stopping.set()

    def join(self, deadline: float) -> bool:
        """Wait for the thread's end, a little past `deadline`; return whether it has ended."""
        thread = self._thread
        if thread is not None:
            # A transport that blocks its loop is left behind with it: the thread is a daemon.
            thread.join(max(0.0, deadline - time.monotonic()) + CLOSE_SECONDS)
            return not thread.is_alive()
        return True

    @property
    def over(self) -> bool:
        """Whether the lane has ended."""
        return self._over.is_set()

    def _run(self) -> None:
        # For all that runs on this thread, and on those that it lends to the driver.
        deliver()
        self._context = contextvars.copy_context()
        while True:
            try:
                anyio.run(self._main)
            except BaseException as error:
                # A driver's SystemExit ends a loop; it must not end the delivery. Past our own end
                # it is the loop's: 3.12 can start no thread any more to end the executor's.
                if not self._ended:
                    self._report.tell(as_exception(error), "delivery thread")
            self._loop = None
            if self.lane.ending:
                break
            time.sleep(RESTART_SECONDS)
        self._over.set()
        self._thread = None

    async def _main(self) -> None:
        self._stopping = anyio.Event()
        self._loop = loop = asyncio.get_running_loop()
        loop.set_default_executor(_Executor(initializer=deliver))
        ended = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(self._run_lane, ended)
            if not self.lane.ending:
                await self._stopping.wait()
            with anyio.move_on_after(self._deadline - time.monotonic()):
                await ended.wait()
            self.lane.cancelled = True
            group.cancel_scope.cancel()
        self._ended = True

    async def _run_lane(self, ended: anyio.Event) -> None:
        try:
            await self.lane.run(self._grace_seconds)
        finally:
            ended.set()
            self._stop()

    def _grace_seconds(self) -> float:
        return max(CLOSE_SECONDS, min(self._deadline - time.monotonic(), 3600.0))

    def forked(self) -> None:
        """In a child: the thread did not come along."""
        self._reset()
        self.lane.forked()
