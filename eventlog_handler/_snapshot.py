"""What was logged (a record, a structlog event dict, any object) as the fields of an event."""

from __future__ import annotations

import itertools
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

import orjson

from eventlog_handler._context import current
from eventlog_handler._encode import as_text, object_fields, public_attributes
from eventlog_handler._payload import pack
from eventlog_handler._stamp import LAST_SECOND, NUMBERS
from eventlog_handler.typing import EventFields, EventHead

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]

_NAMES = tuple(logging.makeLogRecord({}).__dict__)
_BEFORE_LAST, _LAST = len(_NAMES) - 1, _NAMES[-1]
_LATER = {
    "message",
    "asctime",
    "taskName",
    "_logger",
    "_name",
    "_record",
    "_from_structlog",
}.difference(_NAMES)
"""Set by formatters, by newer interpreters, and by structlog's `wrap_for_formatter`."""
_STANDARD = _LATER.union(_NAMES)
_TAKEN = _STANDARD | {"event_type", "type", "level", "logger"}
"""Names of extras that decide something, or that an event has already."""


def record_fields(record: logging.LogRecord) -> EventFields:
    """Return a record's event: type, level, logger, message, its extras, its exception.

    A message that is itself a mapping, model, dataclass or attrs object is the event, and gets
    the rest beside its own fields; only `extra["event_type"]` beats its `type`.
    """
    held = record.__dict__
    extras = {name: held[name] for name in list(held) if name not in _STANDARD}
    kind = extras.pop("event_type", None)
    if kind is None:
        kind = extras.pop("type", None)
    content = None if isinstance(record.msg, str) else object_fields(record.msg)
    if content is None:
        fields: EventFields = {
            "type": kind or "log",
            "session_id": None,
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
    elif "_name" in held:
        fields = structlog_fields(content, held["_name"], record.name)
    else:
        fields = dict(content)
        fields["type"] = kind or fields.get("type") or "log"
        fields.setdefault("level", record.levelname)
        fields.setdefault("logger", record.name)
    for name, value in extras.items():
        _add(fields, name, value)
    _add_traces(fields, record)
    return fields


def _add_traces(fields: EventFields, record: logging.LogRecord) -> None:
    if record.exc_info:
        _put_exception(fields, _exception(record.exc_info))
    elif record.exc_text:
        # The record crossed a queue or a socket: only the text is left.
        traced = {"type": None, "message": None, "traceback": record.exc_text}
        _put_exception(fields, traced)
    if record.stack_info:
        _add(fields, "stack_info", record.stack_info)


def usual_event(record: logging.LogRecord, field: str) -> tuple[EventHead, bytes] | None:
    """Return what `record_fields` and the long way behind it lead to, for half of what they cost.

    Args:
        record: What was logged.
        field: The name of the session's field.

    Returns:
        Head and payload; None for a record that only the long way knows how to take.

    Raises:
        Exception: So is this one: arguments do not fit their format string, or a standard
            attribute was taken away.
    """
    bound_id, bound, ours = current.get()
    held = record.__dict__
    text, args, kind, seconds = held["msg"], held["args"], "log", held["created"]
    # The standard ones come first, in the order in which a record is made. Where one does not, the
    # last is not in its place, or the one is found behind it.
    names = itertools.islice(held, _BEFORE_LAST, None)
    if (
        bound
        or ours
        or type(text) is not str
        or type(record) is not logging.LogRecord
        or next(names, None) is not _LAST
        or held["exc_info"]
        or held["exc_text"]
        or held["stack_info"]
    ):
        return None
    session_id = held.get(field, bound_id)
    fields: EventFields = {
        "type": kind,
        "session_id": session_id,
        "level": held["levelname"],
        "logger": held["name"],
        "message": text % args if args else text,
    }
    for name in names:
        if name not in _TAKEN:
            fields[name] = held[name]
        elif name == "event_type" and type(held[name]) is str:
            fields["type"] = kind = held[name] or kind
        elif name not in _LATER:
            return None
    if (
        type(session_id) is not str
        or fields["session_id"] is not session_id
        or type(seconds) is not float
        or not 0 <= seconds < LAST_SECOND
    ):
        return None
    number = next(NUMBERS)
    head = session_id, kind, number, seconds
    try:
        # As `pack` does it, without the call.
        payload = orjson.dumps((number, seconds, fields), None, orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError:
        payload = pack(head, fields)
    return head, payload


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:
        # Arguments that do not fit their format string: logging's own handlers lose the record.
        return f"{as_text(record.msg)} {as_text(record.args)} <{type(error).__name__}: {error}>"


def _add(fields: EventFields, name: str, value: Any) -> None:
    """Add a field that must not hide what is there: a second one of its name gets an underscore."""
    there = fields.get(name)
    if there is None:
        fields[name] = value
    elif str(there).lower() != str(value).lower():
        # structlog's `add_log_level` says in lower case what the record says too.
        fields[f"{name}_"] = value


def _put_exception(fields: EventFields, exception: Mapping[str, Any] | None) -> None:
    own = fields.get("exception")
    fields["exception"] = exception
    if own is not None and own != exception:
        fields["exception_"] = own


def structlog_fields(event_dict: Mapping[str, Any], method: str, logger: str | None) -> EventFields:
    """Return a structlog event dict's event: its `event` key is the message, the rest stays.

    Args:
        event_dict: As a processor gets it; it is not changed.
        method: The name of the method that was called, such as `"info"`.
        logger: The name of the wrapped logger, where it has one.
    """
    fields: EventFields = {"type": "log", "session_id": None}
    fields["level"] = _METHODS.get(method, method)
    if logger is not None:
        fields["logger"] = logger
    fields["message"] = event_dict.get("event")
    if _STRUCTLOG_ONLY.isdisjoint(event_dict):
        fields |= event_dict
        fields.pop("event", None)
        return fields
    fields |= {k: v for k, v in event_dict.items() if k != "event" and k not in _STRUCTLOG_ONLY}
    if "message" in event_dict:
        _add(fields, "message", event_dict["message"])
    fields["type"] = event_dict.get("event_type") or fields["type"]
    raised = _raised(event_dict.get("exc_info"))
    if raised is not None:
        _put_exception(fields, _exception(raised))
    return fields


_METHODS = {"exception": "error", "warn": "warning", "msg": "info"}
"""Those of structlog's loggers that are no level's name."""
_STRUCTLOG_ONLY = {
    "event_type",
    "message",
    "exc_info",
    "_record",
    "_from_structlog",
    "_logger",
    "_name",
}


def _raised(exc_info: Any) -> ExcInfo | None:
    """Return the exception that structlog's `exc_info` key stands for, as structlog reads it."""
    if isinstance(exc_info, BaseException):
        return type(exc_info), exc_info, exc_info.__traceback__
    if isinstance(exc_info, tuple) and len(exc_info) == 3 and exc_info[1] is not None:
        return exc_info
    current = sys.exc_info()
    return current if exc_info and current[1] is not None else None


def _exception(exc_info: Any) -> Mapping[str, Any] | None:
    kind, value, trace = exc_info
    if kind is None:
        # `exc_info=True` where nothing was being handled: there is no exception to tell of.
        return None
    try:
        text = "".join(traceback.format_exception(kind, value, trace)).rstrip("\n")
    except Exception as error:
        text = f"<{type(error).__name__} while the traceback was formatted>"
    return {"type": kind.__qualname__, "message": as_text(value), "traceback": text}


def json_object(text: str | bytes) -> EventFields | None:
    """Return the object that `text` is in JSON, or None where it is something else."""
    if text[:64].lstrip()[:1] not in ("{", b"{"):
        return None
    try:
        loaded: EventFields = orjson.loads(text)
    except ValueError:
        return None
    return loaded


def event_fields(event: Any) -> EventFields:
    """Return the fields of anything that was given to `await gateway(event)`.

    Mappings, pydantic models, dataclasses, attrs objects and JSON objects keep their fields; other
    objects their public attributes, with the class's name as `type` if they have none; all else
    becomes the message of an event of type `message`.
    """
    if type(event) is dict:
        return event.copy()
    found = object_fields(event)
    if found is not None:
        fields = dict(found)
        if not isinstance(event, Mapping):
            fields.setdefault("type", type(event).__name__)
        return fields
    if isinstance(event, (str, bytes)):
        return json_object(event) or {"type": "message", "message": event}
    if isinstance(event, BaseException):
        return {
            "type": "exception",
            "exception": _exception((type(event), event, event.__traceback__)),
        }
    attributes = None if isinstance(event, type) or callable(event) else public_attributes(event)
    if attributes:
        return {"type": type(event).__name__, **attributes}
    return {"type": "message", "message": event}


def as_record(line: EventFields) -> logging.LogRecord:
    """Return a log record that says what a session file's line says, for a `logging.Formatter`."""
    event = dict(line["event"])
    level = str(event.get("level", "INFO")).upper()
    exception = event.get("exception")
    known = {
        "name": event.get("logger") or "root",
        "msg": event.get("message", event),
        "levelname": level,
        "levelno": _LEVELS.get(level, logging.INFO),
        "exc_text": exception.get("traceback") if isinstance(exception, dict) else None,
        "stack_info": event.get("stack_info"),
    }
    record = logging.makeLogRecord({k: v for k, v in event.items() if k not in _STANDARD})
    created = datetime.fromisoformat(line["timestamp"]).timestamp()
    record.__dict__.update(known, created=created, msecs=int(created % 1 * 1000))
    record.__dict__.update(event_id=line["id"], seq=line["seq"])
    return record


_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
