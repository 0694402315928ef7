"""Fields in, an encoded event out: its session, its processors, its id. On the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import structlog

from eventlog_handler._config import Settings
from eventlog_handler._context import bound_session, captures, current
from eventlog_handler._encode import as_text, encode, encode_and_load
from eventlog_handler._report import Report
from eventlog_handler._snapshot import event_fields
from eventlog_handler._stamp import NUMBERS, event_id, known_time
from eventlog_handler.exceptions import SerializationError
from eventlog_handler.redact import drop_system_prompt
from eventlog_handler.typing import EncodedEvent, EventFields, EventHead


class Intake:
    """Snapshots events.

    Args:
        settings: The gateway's options.
        report: Hears of every failure.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._report = report
        self.use_settings(settings)

    def use_settings(self, settings: Settings) -> None:
        """Go by other options from now on."""
        self.session_field = settings.session_id_field
        prompt = () if settings.include_system_prompt else (drop_system_prompt,)
        self.processors = (*prompt, *settings.processors)

    def take(self, event: Any) -> EncodedEvent | None:
        """Encode anything that is awaited; None where it is dropped on purpose."""
        fields = self.read(event)
        found = self.snapshot(fields, self.session_of(fields), time.time())
        if found is None:
            return None
        (session_id, kind, number, seconds), snapped = found
        # A copy: orjson's own bytes are larger than what is in them.
        body = b"%b" % encode(snapped)
        return EncodedEvent(session_id, kind, event_id(number), seconds, body)

    def read(self, event: Any) -> EventFields:
        """Return the fields of anything, as a dict of their own."""
        try:
            return event_fields(event)
        except Exception as error:
            # A model that fails to dump itself, a property that raises: keep what text it has.
            self._report.local(SerializationError(f"event cannot be read: {error}"), "reading")
            return {"type": type(event).__name__, "message": as_text(event)}

    def session_of(self, fields: Mapping[str, Any], found: Any = None) -> str | None:
        """Return the session of an event: its own, else the bound one, else None.

        Args:
            fields: The event's.
            found: Where it is known apart from them.
        """
        name = self.session_field
        if found is None:
            found = fields.get(name)
        if found is None:
            return bound_session(name)
        return found if type(found) is str else as_text(found)

    def snapshot(
        self, fields: EventFields, session_id: str | None, seconds: float, complete: bool = True
    ) -> tuple[EventHead, Mapping[str, Any]] | None:
        """Return an event's head and what is to be encoded; None where it is dropped on purpose.

        Args:
            fields: Its own dict; it is changed.
            session_id: Which session, None where it is unknown.
            seconds: Unix time of the call.
            complete: Whether a missing `session_id` is added, or a formatter has decided.
        """
        _, bound, _ = current.get()
        if bound:
            for name, value in bound.items():
                fields.setdefault(name, value)
        if complete and session_id is not None and fields.get("session_id") is None:
            fields["session_id"] = session_id
        processed = self._process(fields) if self.processors else fields
        if processed is None:
            self._report.drop("filtered")
            return None
        kind = processed.get("type", "event")
        if type(kind) is not str:
            kind = as_text(kind)
        if captures:
            body = encode(processed)
            for capture in captures:
                capture(body)
        return (session_id, kind, next(NUMBERS), known_time(seconds)), processed

    def _process(self, fields: EventFields) -> Mapping[str, Any] | None:
        """Run the processors on a copy that shares nothing with the application's objects."""
        data: Any = encode_and_load(fields)
        for processor in self.processors:
            try:
                data = processor(data)
                if not isinstance(data, Mapping):
                    raise TypeError(f"it returned a {type(data).__name__}, not the event's fields")
            except structlog.DropEvent:
                return None
            except Exception as error:
                # What it was to hide must not be written; that there was an event, must.
                name = getattr(processor, "__qualname__", type(processor).__name__)
                wrapped = SerializationError(f"processor {name}: {type(error).__name__}: {error}")
                wrapped.__cause__ = error
                self._report.local(wrapped, "processor")
                kept = {k: fields.get(k) for k in ("type", "session_id")}
                return {**kept, "message": f"<withheld: processor {name} failed>"}
        found: Mapping[str, Any] = data
        return found
