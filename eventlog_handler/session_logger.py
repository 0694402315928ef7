"""The gateway: one event in, one line in its session's file, and on downstream."""

from __future__ import annotations

import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from anyio import lowlevel, to_thread

from eventlog_handler import _lifecycle
from eventlog_handler._config import InForce, Settings, check_one_of, remember_given, resolve
from eventlog_handler._context import captures
from eventlog_handler._delivery import Delivery, FileRegister
from eventlog_handler._downstream import Callback
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._intake import Intake
from eventlog_handler._report import Report
from eventlog_handler._waiter import TURN_SECONDS, Turns, Waiter
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
    FlushReceipt,
    Stats,
    Written,
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
    "max_file_bytes",
    "max_open_files",
)


class EventSessionLogger(InForce):
    """Bridges agent events to session files and to what lies downstream.

    `await gateway(event)` works on asyncio and trio. The file is always first; then the callback
    gets the live event, and where there is none or it fails, the transports get the line. A failure
    downstream never reaches the caller.

    An option that is not given comes from its environment variable, else from its default. Each can
    be read as an attribute.

    Args:
        log_base_dir: Base directory (`AGENT_LOG_DIR`, else `logs/sessions`).
        downstream_callback: Awaited with each event as it was given, in the caller's event loop.
        downstream_transport: A transport, its URL, a class of one, or a list; each on a thread of
            its own (`AGENT_LOG_TRANSPORT`: URLs, separated by spaces).
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
        **kwargs: `batch_bytes`, `batch_events`, `batch_seconds`: when a batch is full, and how long
            it may wait for that. `breaker_failures`: failed attempts in a row that open the
            breaker. `breaker_reset_seconds`: until the probe. `directory_mode`, `file_mode`:
            permission bits. `downstream_wait_seconds`: the longest that a call waits for a
            transport that is well. `formatter`: for `custom`, a callable that gets a line's object,
            or a `logging.Formatter`. `max_file_bytes`: when a session's next file begins.
            `max_open_files`: descriptors. `max_pending_events`: kept in memory for the callback,
            and for transports where no file is read back. `processors`: callables that get an
            event's own copy of its fields as JSON-like data and return what is stored.
            `retry_max_delay_seconds`: where doubling ends. `send_timeout_seconds`: for one attempt.
            `session_id_field`: the name of the session's field. `shutdown_timeout_seconds`: the
            budget of closing.

    Raises:
        ImportError: A URL's driver is not installed; names the command that does that.
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
        this = weakref.ref(self)

        def committed(session: str, path: str) -> int | None:
            # Weakly: the delivery's threads must not keep a forgotten gateway alive.
            gateway = this()
            return None if gateway is None else gateway._files.committed(session, path)

        self._delivery = Delivery(settings, self._report, committed)
        self._files = self._new_files(settings)
        self._callback: Callback | None = None
        self._turns = Turns()
        self._listener: DrainedBeforeClose | None = None
        self._closed = False
        self._passed = self._calls = self._received = 0
        self._overhead = self._overhead_max = self._direct = self._turn_at = 0.0
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
            called = None if function is None else Callback(function, settings, self._report)
            self._callback = called
            self._delivery.use_callback(self._callback)
        elif self._callback is not None:
            self._callback.settings = settings

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
            max_file_bytes=settings.max_file_bytes,
            registrar=FileRegister(self._delivery),
        )
        weakref.finalize(self, files.close).atexit = False
        return files

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
        begun = time.perf_counter()
        encoded = self._intake.take(event)
        if captures:
            return encoded is not None
        snapped = time.perf_counter()
        written = None if encoded is None else self._write_one(encoded)
        now = time.perf_counter()
        self._calls, self._overhead = self._calls + 1, self._overhead + now - begun
        if now - begun > self._overhead_max:
            self._overhead_max = now - begun
        self._direct += now - snapped
        callback = self._callback
        taken = callback is not None and await self._call_back(callback, event, written)
        if not taken and (self._delivery.live or now > self._turn_at):
            await self._wait(written)
        return written is not None and self._settings.enable_local_logging

    def _write_one(self, event: EncodedEvent) -> Written:
        """Write an event; transports have it, or wait for the callback's word."""
        found: list[Written] = []

        def forward(written: Written) -> None:
            found.append(self._delivery.send(written, undecided=self._callback is not None))

        try:
            self._write(event.session_id, [event], forward)
        except Exception as error:
            self._report.local(error, "local logging")
            raise LocalLoggingError(f"local logging failed: {error}") from error
        return found[0]

    def _write(
        self,
        session_id: str | None,
        events: Sequence[EncodedEvent],
        then: Callable[[Written], object],
    ) -> int:
        """Write the first of `events` and pass them to `then`; return how many; raises OSError."""
        if self._settings.enable_local_logging:
            return self._files.append(session_id, events, then)
        name = self.get_session_directory(session_id).name if session_id is None else session_id
        then(Written(None, "", name, 0, None, events, []))
        self._passed += len(events)
        return len(events)

    def _write_and_hand_over(self, session_id: str | None, events: Sequence[EncodedEvent]) -> int:
        """Do the same for events that nobody awaits: the listener's way in."""
        return self._write(session_id, events, self._delivery.hand_over)

    async def _wait(self, written: Written | None) -> None:
        """Wait until the transports have an event, if they are well, and not for long."""
        seconds = self._settings.downstream_wait_seconds
        if written is not None and seconds and self._delivery.live:
            waiter = Waiter()
            waiter.expect(self._delivery.when(written, waiter.released))
            await waiter.wait(seconds)
        elif time.perf_counter() > self._turn_at:
            # Other tasks have their turn, and a cancellation comes through, all the same.
            await lowlevel.checkpoint()
            self._turn_at = time.perf_counter() + TURN_SECONDS

    async def _call_back(self, callback: Callback, event: Any, written: Written | None) -> bool:
        """Give the live event to the callback; what it does not take goes to the transports."""
        taken = False
        try:
            async with self._turns.take(None if written is None else written.session):
                taken = await callback.deliver(event)
        finally:
            # Where the caller is cancelled, whether the callback has taken the event is not known.
            if written is not None:
                self._delivery.decide(written, 0, taken)
        return taken

    def configure_from_env(self) -> None:
        """Read the environment again; what the constructor was given stays. Raises as that does."""
        self._update()

    def update_downstream_callback(self, callback: DownstreamCallback | None) -> None:
        """Call `callback` from the next event on; None calls none.

        Raises:
            TypeError: It cannot be called.
        """
        self._update(downstream_callback=callback)

    def update_downstream_transport(self, transport: Any) -> None:
        """Send to `transport` (or a URL, or a list) from the next event on; None sends nowhere.

        The old one gets what was written for it while it is well, and is closed; one of the same
        name goes on where it stopped.

        Raises:
            ImportError, TypeError, ValueError: As the constructor; nothing is changed.
        """
        self._update(downstream_transport=transport)

    def _update(self, **options: Any) -> None:
        given = {**self._given, **options}
        settings = resolve(given)
        option = settings.downstream_transport
        new = "downstream_transport" in options or option != self.downstream_transport
        transports = named_transports(option) if new else {}
        self._apply(settings, self._settings)
        self._given = given
        if new:
            self._delivery.use_transports(transports)

    async def flush(
        self, session_id: str | None = None, until: str = "file", timeout: float | None = None
    ) -> FlushReceipt:
        """Wait until what was logged so far is where it has to be.

        Args:
            session_id: Only this session's events, so that no other one is waited for; None is all.
            until: `file`: in the session files. `transport`: acknowledged by all transports too.
            timeout: At most this many seconds; `shutdown_timeout_seconds` unless given.

        Returns:
            What was reached; true if all was.

        Raises:
            ValueError: `until` is something else.
        """
        return await to_thread.run_sync(
            self._flush, session_id, until, timeout, abandon_on_cancel=True
        )

    def _flush(self, session_id: str | None, until: str, timeout: float | None) -> FlushReceipt:
        check_one_of("file", "transport")("until", until)
        seconds = self._settings.shutdown_timeout_seconds if timeout is None else timeout
        deadline = time.monotonic() + seconds
        waiting = 0 if self._listener is None else self._listener.drain(deadline, session_id)
        behind: tuple[str, ...] = ()
        if until == "transport":
            behind = self._delivery.flush(session_id, deadline)
        return FlushReceipt(not waiting and not behind, until, session_id, waiting, behind)

    def resend_rejected(self, transport: str | None = None) -> int:
        """Send again what transports have refused for good, out of `.eventlog/rejected/`.

        What is refused again is parked again.

        Args:
            transport: The name of one, as in `stats()`; None is all.

        Returns:
            How many events are sent again, as soon as their transport takes them.

        Raises:
            ValueError: There is no transport of that name, or no session files in `jsonl`.
        """
        return self._delivery.resend_rejected(transport)

    def get_log_file_path(self, session_id: str | None) -> Path:
        """Return the file that a session's events go to, or will; None is the unknown session."""
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
        handled = files.written + self._passed + sum(dropped.values()) + depth - report.notices
        # What is being written counts twice for a moment; nothing is ever taken back.
        self._received = max(self._received, handled)
        return Stats(
            received=self._received,
            written=files.written,
            bytes=files.bytes,
            local_errors=report.local_errors,
            dropped=dropped,
            handoff_depth=depth,
            durability=durability,
            overhead_mean_seconds=self._overhead / max(1, self._calls),
            overhead_max_seconds=self._overhead_max,
            direct_mean_seconds=self._direct / max(1, self._calls),
            delivery=self._delivery.kind,
            transports=self._delivery.stats(),
        )

    async def close(self) -> None:
        """Write what is handed off, let transports finish, close everything.

        All of it takes no longer than `shutdown_timeout_seconds` and half a second. What the
        transports have not taken by then stays in the files. The second call does nothing.
        """
        if not self._closed:
            deadline = time.monotonic() + self._settings.shutdown_timeout_seconds
            await to_thread.run_sync(self._close, deadline, abandon_on_cancel=True)

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
