"""The delivery thread: one asyncio loop on which all of a gateway's transports live.

A thread of its own, because most drivers know asyncio only while the application may run trio, or
no loop at all; and because a driver that blocks must block nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import anyio
from anyio.abc import TaskGroup

from eventlog_handler._config import Settings
from eventlog_handler._context import delivering
from eventlog_handler._lanes import (
    CLOSE_SECONDS,
    Callback,
    CallbackLane,
    Lane,
    Released,
    TransportLane,
)
from eventlog_handler._report import Report
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import OutgoingEvent, TransportStats

START_SECONDS = 5.0
"""The longest that a start waits for the loop to be there; it takes a few milliseconds."""


class Delivery:
    """Hands events to the lanes, and owns the thread that they run on.

    Args:
        settings: The gateway's options.
        report: Hears of every failure.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings = settings
        self._report = report
        self._lock = threading.Lock()
        self._transports: dict[str, TransportLane] = {}
        self._callback: CallbackLane | None = None
        self._running: dict[Lane, anyio.Event] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._group: TaskGroup | None = None
        self._stopping: anyio.Event | None = None
        self._context = contextvars.copy_context()
        self._deadline = 0.0
        self._closed = False

    def use_callback(self, callback: Callback | None) -> None:
        """Call `callback` for what is handed over from now on; the old one gets what is queued."""
        with self._lock:
            old, self._callback = self._callback, None
            if callback is not None:
                self._callback = CallbackLane(callback, self._to_transports, self._settings)
            self._change([old], [self._callback])

    def use_transports(self, transports: Mapping[str, TransportInterface]) -> None:
        """Send to `transports` from now on.

        A transport that stays keeps its lane; one that goes gets what is queued for it, and is
        closed.
        """
        with self._lock:
            old, kept = self._transports, dict[str, TransportLane]()
            for name, transport in transports.items():
                lane = old.get(name)
                if lane is None or lane.transport is not transport:
                    lane = TransportLane(name, transport, self._settings, self._report)
                kept[name] = lane
            self._transports = kept
            gone = [lane for name, lane in old.items() if kept.get(name) is not lane]
            self._change(gone, [lane for name, lane in kept.items() if old.get(name) is not lane])

    def _change(self, gone: Sequence[Lane | None], new: Sequence[Lane | None]) -> None:
        for lane in filter(None, new):
            self._on_loop(self._adopt, lane)
        for lane in filter(None, gone):
            if self._loop is None:
                # It never ran, but it is ours to close.
                self._start()
                self._on_loop(self._adopt, lane)
            self._on_loop(lane.end)

    def _on_loop(self, function: Callable[..., object], *args: object) -> None:
        loop = self._loop
        if loop is not None:
            # The loop may close between the two lines: then its thread is at its end anyway.
            with contextlib.suppress(RuntimeError):
                # In the delivery thread's own context: the caller's knows another loop, or none.
                loop.call_soon_threadsafe(function, *args, context=self._context)

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""
        self._settings = settings
        for lane in self._lanes():
            lane.use_settings(settings)

    @property
    def live_transports(self) -> int:
        """How many transports an event's caller may wait for: all of them, if each is well."""
        lanes = self._transports.values()
        return len(lanes) if all(lane.live for lane in lanes) else 0

    def hand_over(self, events: Sequence[OutgoingEvent]) -> None:
        """Take events that nobody awaits: to the callback, else to the transports."""
        lane = self._callback
        for event in events:
            if lane is None:
                self._to_transports(event)
            else:
                self._put(lane, event, None)

    def send(self, event: OutgoingEvent, released: Released) -> None:
        """Send to the transports; `released` is called by each, once it has decided."""
        self._to_transports(event, released)

    def _to_transports(self, event: OutgoingEvent, released: Released | None = None) -> None:
        for lane in self._transports.values():
            self._put(lane, event, released)

    def _put(self, lane: Lane, event: OutgoingEvent, released: Released | None) -> None:
        if lane.put(event, released):
            self._on_loop(lane.wake)
        if self._thread is None:
            self.start()

    def start(self) -> None:
        """Start the thread, unless it runs or there is nothing to deliver to."""
        with self._lock:
            if self._transports or self._callback is not None:
                self._start()
        if self._closed:
            self._abandon()

    def _start(self) -> None:
        if self._thread is not None or self._closed:
            return
        ready = threading.Event()
        thread = threading.Thread(
            target=self._run, args=(ready,), name="eventlog-delivery", daemon=True
        )
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:
            # From 3.12 on none can be started once the interpreter ends; the files have it all.
            self._thread = None
            return
        ready.wait(START_SECONDS)

    def _run(self, ready: threading.Event) -> None:
        try:
            anyio.run(self._main, ready)
        except Exception as error:
            self._report.tell(error, "delivery thread")
        finally:
            self._loop = self._group = self._thread = None
            ready.set()

    async def _main(self, ready: threading.Event) -> None:
        delivering.set(True)
        self._context = contextvars.copy_context()
        self._stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            self._loop, self._group = asyncio.get_running_loop(), group
            for lane in self._lanes():
                self._adopt(lane)
            ready.set()
            await self._stopping.wait()
            with anyio.move_on_after(self._deadline - time.monotonic()):
                await self._finish()
            for lane in self._running:
                lane.cancelling()
            group.cancel_scope.cancel()

    def _adopt(self, lane: Lane) -> None:
        if self._group is not None and lane not in self._running:
            self._running[lane] = anyio.Event()
            self._group.start_soon(self._run_lane, lane)

    async def _run_lane(self, lane: Lane) -> None:
        try:
            await lane.run()
        finally:
            self._running.pop(lane).set()

    async def _finish(self) -> None:
        """End every lane: callbacks first, as what they do not take goes to the transports."""
        running = list(self._running.items())
        for kind in (CallbackLane, TransportLane):
            for lane, _ in running:
                if isinstance(lane, kind):
                    lane.end()
            for lane, ended in running:
                if isinstance(lane, kind):
                    await ended.wait()

    def _lanes(self) -> list[Lane]:
        callback = [self._callback] if self._callback is not None else []
        return [*callback, *self._transports.values()]

    def close_soon(self) -> None:
        """Begin to end every lane, without waiting; for a garbage collection."""
        self._closed = True
        self._deadline = time.monotonic() + self._settings.shutdown_timeout_seconds
        if self._stopping is not None:
            self._on_loop(self._stopping.set)

    def close(self, deadline: float) -> None:
        """End every lane and the thread, and close the transports. Blocks until `deadline`."""
        with self._lock:
            if self._transports:
                self._start()
            self._closed = True
            self._deadline = deadline
            thread = self._thread
            if self._stopping is not None:
                self._on_loop(self._stopping.set)
        if thread is not None:
            # A transport that blocks its loop is left behind with it: the thread is a daemon.
            thread.join(max(0.0, deadline - time.monotonic()) + CLOSE_SECONDS)
        self._abandon()

    def _abandon(self) -> None:
        if self._thread is None:
            for lane in self._lanes():
                lane.abandon()

    def after_fork_in_child(self) -> None:
        """The parent delivers what was handed over before; the child starts a thread of its own."""
        self._lock = threading.Lock()
        self._loop = self._group = self._thread = self._stopping = None
        self._running = {}
        for lane in self._lanes():
            lane.after_fork_in_child()

    def stats(self) -> dict[str, TransportStats]:
        """Return the figures of each downstream, by name."""
        return {lane.name: lane.stats() for lane in self._lanes()}
