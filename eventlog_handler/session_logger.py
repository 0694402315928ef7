"""The gateway: one event in, one line in its session's file, and on downstream."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio
import anyio.to_thread

from eventlog_handler import _lifecycle
from eventlog_handler._config import OPTION_NAMES, Settings, remember_given, resolve
from eventlog_handler._context import captures
from eventlog_handler._delivery import Delivery
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._intake import Intake
from eventlog_handler._lanes import Callback
from eventlog_handler._report import Report
from eventlog_handler._waiter import Waiter
from eventlog_handler.exceptions import (
    EventSessionLoggerError,
    LocalLoggingError,
    SerializationError,
)
from eventlog_handler.transports import named_transports
from eventlog_handler.typing import (
    DownstreamCallback,
    DrainedBeforeClose,
    EncodedEvent,
    ErrorHandler,
    OutgoingEvent,
    Stats,
)

_FILE_OPTIONS = (
    "log_base_dir",
    "log_format",
    "file_naming_pattern",
    "session_directory_pattern",
    "unknown_session_pattern",
    "formatter",
    "file_mode",
    "directory_mode",
    "max_open_files",
)
_in_callback: contextvars.ContextVar[frozenset[str | None]] = contextvars.ContextVar(
    "eventlog_handler.in_callback", default=frozenset()
)


class EventSessionLogger:
    """Bridges agent events to session files and to what lies downstream.

    `await gateway(event)` works on asyncio and trio. The file is always first; then the callback
    gets the live event, and where there is none or it fails, the transports get the line. A failure
    downstream never reaches the caller.

    An option that is not given comes from its environment variable, else from its default. The
    options after `unknown_session_pattern` are keywords. Each can be read as an attribute.

    Args:
        log_base_dir: Base directory (`AGENT_LOG_DIR`, else `logs/sessions`).
        downstream_callback: Awaited with each event as it was given, in the caller's event loop.
        downstream_transport: A transport, a class of one, or a list; on a thread of its own.
        include_system_prompt: False keeps events of type `system_prompt`, and fields of that name,
            out of files and transports (`AGENT_LOG_INCLUDE_PROMPT`).
        log_format: `jsonl`; `json`, a valid array at all times; `custom` (`AGENT_LOG_FORMAT`).
        file_naming_pattern: For strftime, in UTC, at a file's creation; a suffix is added
            (`AGENT_LOG_FILE_PATTERN`).
        error_handler: Called with each contained exception, and with what was being done.
        max_retry_attempts: Retries after a failed first attempt (`AGENT_LOG_MAX_RETRIES`).
        retry_delay_seconds: The longest pause before the first retry; doubles with each, and a
            random share of it is waited (`AGENT_LOG_RETRY_DELAY`).
        enable_local_logging: False writes no files (`AGENT_LOG_ENABLE_LOCAL`).
        session_directory_pattern: Holds `{session_id}`; `/` makes levels
            (`AGENT_LOG_SESSION_PATTERN`).
        unknown_session_pattern: For events without a session; `{uuid}` is chosen once
            (`AGENT_LOG_UNKNOWN_PATTERN`).
        **kwargs: `breaker_failures`: failed attempts in a row that open the breaker.
            `breaker_reset_seconds`: until the probe. `directory_mode`, `file_mode`: permission
            bits. `downstream_wait_seconds`: the longest that a call waits for a transport that is
            well. `formatter`: for `custom`, a callable that gets a line's object, or a
            `logging.Formatter`. `max_open_files`: descriptors. `max_pending_events`: kept in memory
            for each transport during an outage. `processors`: callables that get an event's own
            copy of its fields as JSON-like data and return what is stored.
            `retry_max_delay_seconds`: where doubling ends. `send_timeout_seconds`: for one attempt.
            `session_id_field`: the name of the session's field. `shutdown_timeout_seconds`: the
            budget of closing.

    Raises:
        TypeError: An unknown option, naming the nearest one; or a value of a wrong kind.
        ValueError: A value that cannot be, naming option (or variable) and value.
    """

    _given: dict[str, Any]

    @remember_given
    def __init__(
        self,
        log_base_dir: str | Path | None = None,
        downstream_callback: DownstreamCallback | None = None,
        downstream_transport: Any = None,
        include_system_prompt: bool = True,
        log_format: str = "jsonl",
        file_naming_pattern: str = "%Y%m%d_%H%M%S",
        error_handler: ErrorHandler | None = None,
        max_retry_attempts: int = 3,
        retry_delay_seconds: float = 1.0,
        enable_local_logging: bool = True,
        session_directory_pattern: str = "{session_id}",
        unknown_session_pattern: str = "unknown_{uuid}",
        **kwargs: Any,
    ) -> None:
        settings = resolve(self._given)
        transports = named_transports(settings.downstream_transport)
        self._uuid = str(uuid.uuid4())
        self._report = Report(settings.error_handler)
        self._intake = Intake(settings, self._report)
        self._delivery = Delivery(settings, self._report)
        self._files = self._new_files(settings)
        self._callback: Callback | None = None
        self._turns: dict[tuple[int, str | None], tuple[anyio.Lock, list[None]]] = {}
        self._listener: DrainedBeforeClose | None = None
        self._closed = False
        self._passed = self._calls = 0
        self._overhead = self._overhead_max = 0.0
        self._apply(settings, None)
        self._delivery.use_transports(transports)
        weakref.finalize(self, self._delivery.close_soon).atexit = False
        _lifecycle.register(self, rank=4)

    def _apply(self, settings: Settings, old: Settings | None) -> None:
        """Go by `settings`; files and callback are made anew only where theirs have changed."""

        def changed(*names: str) -> bool:
            return old is None or any(getattr(settings, n) != getattr(old, n) for n in names)

        self._settings = settings
        self._report.error_handler = settings.error_handler
        self._delivery.use_settings(settings)
        self._intake.use_settings(settings)
        if old is not None and changed(*_FILE_OPTIONS):
            self._files.close()
            replaced, self._files = self._files, self._new_files(settings)
            self._files.written, self._files.bytes = replaced.written, replaced.bytes
        if changed("downstream_callback"):
            function = settings.downstream_callback
            self._callback = None
            if function is not None:
                self._callback = Callback(function, settings, self._report)
            self._delivery.use_callback(self._callback)
        elif self._callback is not None:
            self._callback.use_settings(settings)

    def _new_files(self, settings: Settings) -> SessionFiles:
        report = self._report

        def failed(error: Exception) -> None:
            wrapped = SerializationError(f"formatter raised {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            report.local(wrapped, "formatter")

        custom = settings.log_format == "custom"
        files = SessionFiles(
            settings.paths(self._uuid),
            Layout(settings.log_format, settings.formatter if custom else None, failed),
            max_open_files=settings.max_open_files,
            file_mode=settings.file_mode,
            directory_mode=settings.directory_mode,
        )
        weakref.finalize(self, files.close).atexit = False
        return files

    def __getattr__(self, name: str) -> Any:
        """Return the value in force of the option `name`."""
        if name in OPTION_NAMES:
            return getattr(self._settings, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        """Name the base directory and nothing that could be secret."""
        return f"<{type(self).__name__} {str(self._settings.log_base_dir)!r}>"

    async def __call__(self, event: Any) -> bool:
        """Write an event to its session's file, then forward it.

        Args:
            event: A `SessionEvent`, model, dataclass, attrs object, mapping, JSON text, any text,
                any object. What cannot be encoded in it is replaced by something readable.

        Returns:
            True once the line is in the file. False where none was meant to be: local logging is
            off, or a processor dropped the event. What happens downstream does not count.

        Raises:
            LocalLoggingError: The line could not be written.
            EventSessionLoggerError: The gateway is closed.
        """
        if self._closed:
            raise EventSessionLoggerError("the gateway is closed: it takes no more events")
        started = time.perf_counter()
        fields = self._intake.read(event)
        session_id = self._intake.session_of(fields)
        encoded = self._intake.snapshot(fields, session_id, time.time())
        if captures:
            return encoded is not None
        waiter = Waiter(self._delivery.live_transports if encoded is not None else 0)
        outgoing = None if encoded is None else self._write_one(encoded, waiter)
        self._note_overhead(time.perf_counter() - started)
        if self._callback is None or not await self._call_back(
            self._callback, event, outgoing, waiter
        ):
            await waiter.wait(self._settings.downstream_wait_seconds)
        return outgoing is not None and self._settings.enable_local_logging

    def _write_one(self, event: EncodedEvent, waiter: Waiter) -> OutgoingEvent:
        written: list[OutgoingEvent] = []

        def forward(outgoing: Sequence[OutgoingEvent]) -> None:
            written.extend(outgoing)
            if self._callback is None:
                self._delivery.send(outgoing[0], waiter.released)

        try:
            self._write(event.session_id, [event], forward)
        except Exception as error:
            self._report.local(error, "local logging")
            raise LocalLoggingError(f"local logging failed: {error}") from error
        return written[0]

    def _write(
        self,
        session_id: str | None,
        events: Sequence[EncodedEvent],
        then: Callable[[Sequence[OutgoingEvent]], None],
    ) -> int:
        """Write the first of `events` and pass them to `then`; return how many; raises OSError."""
        if self._settings.enable_local_logging:
            return self._files.append(session_id, events, then)
        name = self.get_session_directory(session_id).name if session_id is None else session_id
        then([OutgoingEvent(e.line(None), e.id, name, e.type, e.timestamp) for e in events])
        self._passed += len(events)
        return len(events)

    def _write_and_hand_over(self, session_id: str | None, events: Sequence[EncodedEvent]) -> int:
        """Do the same for events that nobody awaits: the listener's way in."""
        return self._write(session_id, events, self._delivery.hand_over)

    def _note_overhead(self, seconds: float) -> None:
        self._calls += 1
        self._overhead += seconds
        self._overhead_max = max(self._overhead_max, seconds)

    async def _call_back(
        self, callback: Callback, event: Any, outgoing: OutgoingEvent | None, waiter: Waiter
    ) -> bool:
        """Give the live event to the callback; what it does not take goes to the transports."""
        session_id = outgoing.session_id if outgoing is not None else None
        settled = False
        try:
            async with self._turn(session_id):
                taken = await callback.deliver(event)
                if not taken and outgoing is not None:
                    self._delivery.send(outgoing, waiter.released)
                settled = True
        finally:
            # The caller was cancelled: whether the callback has taken the event is not known.
            if not settled and outgoing is not None:
                self._delivery.send(outgoing, waiter.released)
        return taken

    @contextlib.asynccontextmanager
    async def _turn(self, session_id: str | None) -> AsyncIterator[None]:
        """Let the tasks of an event loop pass one by one for a session, in order of their lines."""
        if session_id in _in_callback.get():
            # The callback logs to its own session: waiting for itself would be for ever.
            yield
            return
        key = threading.get_ident(), session_id
        lock, users = self._turns.setdefault(key, (anyio.Lock(), []))
        users.append(None)
        token = None
        try:
            async with lock:
                token = _in_callback.set(_in_callback.get() | {session_id})
                yield
        finally:
            if token is not None:
                _in_callback.reset(token)
            users.pop()
            if not users:
                self._turns.pop(key, None)

    def configure_from_env(self) -> None:
        """Read the environment again; what the constructor was given stays.

        Raises:
            ValueError: A variable has a value that cannot be; nothing is changed.
        """
        self._apply(resolve(self._given), self._settings)

    def update_downstream_callback(self, callback: DownstreamCallback | None) -> None:
        """Call `callback` from the next event on; None calls none.

        Raises:
            TypeError: It cannot be called.
        """
        self._update(downstream_callback=callback)

    def update_downstream_transport(self, transport: Any) -> None:
        """Send to `transport` (or a list) from the next event on; None sends nowhere.

        The old one gets what is queued for it and is closed.

        Raises:
            TypeError: It is no transport; nothing is changed.
        """
        transports = named_transports(transport)
        self._update(downstream_transport=transport)
        self._delivery.use_transports(transports)

    def _update(self, **options: Any) -> None:
        given = {**self._given, **options}
        self._apply(resolve(given), self._settings)
        self._given = given

    def get_log_file_path(self, session_id: str | None) -> Path:
        """Return the file that a session's events go to, or will with its first event.

        Args:
            session_id: The session; None is the one of events without any.
        """
        return self._files.path(session_id)

    def get_session_directory(self, session_id: str | None) -> Path:
        """Return the directory of a session's files, which may not exist yet.

        Args:
            session_id: The session; None is the one of events without any.
        """
        return self._files.directory(session_id)

    def stats(self) -> Stats:
        """Return the figures since the gateway began, not quite of one moment under load."""
        files, report = self._files, self._report
        depth = 0 if self._listener is None else self._listener.depth
        durability = "memory" if self._listener is None else self._listener.durability
        dropped = dict(report.dropped)
        return Stats(
            received=files.written + self._passed + sum(dropped.values()) + depth - report.notices,
            written=files.written,
            bytes=files.bytes,
            local_errors=report.local_errors,
            dropped=dropped,
            handoff_depth=depth,
            durability=durability,
            overhead_mean_seconds=self._overhead / max(1, self._calls),
            overhead_max_seconds=self._overhead_max,
            transports=self._delivery.stats(),
        )

    async def close(self) -> None:
        """Write what is handed off, let transports finish, close everything.

        All of it takes no longer than `shutdown_timeout_seconds` and half a second. What the
        transports have not taken by then stays in the files. The second call does nothing.
        """
        if not self._closed:
            deadline = time.monotonic() + self._settings.shutdown_timeout_seconds
            await anyio.to_thread.run_sync(self._close, deadline, abandon_on_cancel=True)

    def _close(self, deadline: float) -> None:
        self._closed = True
        self.at_exit(deadline)

    def at_exit(self, deadline: float) -> None:
        """Finish until `deadline`; files still take late events, which transports do not."""
        if self._listener is not None:
            self._listener.drain(deadline)
        self._delivery.close(deadline)
        self._files.close()

    def after_fork_in_child(self) -> None:
        """Begin files, queues and a thread of the child's own."""
        self._files.forked()
        self._report.after_fork_in_child()
        self._delivery.after_fork_in_child()
        self._turns.clear()

    async def __aenter__(self) -> EventSessionLogger:
        """Return the gateway."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Close it."""
        await self.close()
