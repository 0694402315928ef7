"""One batch to one transport, together or one by one: what became of each event."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from eventlog_handler._downstream import Downstream
from eventlog_handler.exceptions import TransportError, TransportRejectedError
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import OutgoingEvent

SAVE_SECONDS = 0.1
"""The longest that events are sent one by one before it is saved how far that came."""
Outcomes = list["Exception | None"]


async def offer(
    downstream: Downstream, transport: TransportInterface, events: Sequence[OutgoingEvent]
) -> tuple[Outcomes, Exception | None]:
    """Send events; return what became of them.

    Args:
        downstream: Limits the time.
        transport: Gets them, by `send_batch` where it has that.
        events: In order. One without an id is a line that could not be read, and is not sent.

    Returns:
        How each went, of as many as were tried, None where it was acknowledged; and how all failed
        together, where it is not known which of them it was.
    """
    readable = [event for event in events if event.id]
    error = None
    if getattr(transport, "send_batch", None) is None:
        tried = await _singly(downstream, transport, readable)
    elif readable:
        tried, error = await _together(downstream, transport, readable)
    else:
        tried = []
    answers = iter(tried)
    outcomes: Outcomes = []
    for event in events:
        if not event.id:
            outcomes.append(TransportRejectedError("this line of the file cannot be read"))
            continue
        try:
            outcomes.append(next(answers))
        except StopIteration:
            break
    return outcomes, error


async def _singly(
    downstream: Downstream, transport: TransportInterface, events: Sequence[OutgoingEvent]
) -> Outcomes:
    outcomes: Outcomes = []
    started = time.monotonic()
    for event in events:
        line, metadata = event.line, event.metadata
        answer, error = await downstream.attempt(transport.send, line, metadata)
        if error is None and answer is not True:
            error = TransportError(f"send returned {answer!r}; True is the only acknowledgement")
        outcomes.append(error)
        stuck = error is not None and not isinstance(error, TransportRejectedError)
        if stuck or time.monotonic() - started > SAVE_SECONDS:
            break
    return outcomes


async def _together(
    downstream: Downstream, transport: Any, events: Sequence[OutgoingEvent]
) -> tuple[Outcomes, Exception | None]:
    answer, error = await downstream.attempt(transport.send_batch, list(events))
    if error is None:
        outcomes = _outcomes_of(answer, len(events))
        if outcomes is not None:
            return outcomes, None
        error = TransportError(
            f"send_batch returned {answer!r}; return True, or a list with None or an exception for "
            "each event"
        )
    return ([error], None) if len(events) == 1 else ([], error)


def _outcomes_of(answer: Any, count: int) -> Outcomes | None:
    """Return what a `send_batch` says of each event, or None where it says nothing."""
    if answer is True:
        return [None] * count
    if not isinstance(answer, (list, tuple)) or len(answer) != count:
        return None
    return [_outcome_of(each) for each in answer]


def _outcome_of(answer: Any) -> Exception | None:
    if answer is None or isinstance(answer, Exception):
        return answer
    return TransportError(f"send_batch returned {answer!r} for an event; only None acknowledges it")
