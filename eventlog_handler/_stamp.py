"""What each event is stamped with: an id that no other has, and the text of its time."""

from __future__ import annotations

import itertools
import math
import secrets
import time
from datetime import datetime, timezone
from typing import Any

_prefix = secrets.token_hex(10)
NUMBERS = itertools.count(1)
"""Of this process's events. `next` is one step under the interpreter's lock: it needs none of ours.
"""


def event_id(number: int, process: str = "") -> str:
    """Return an id that no other event ever gets: 80 random bits of its process, and a number.

    Args:
        number: One of `NUMBERS`.
        process: What `process_id` returns there; this process's unless given.
    """
    return f"{process or _prefix}-{number}"


def new_id() -> str:
    """Return the id of an event that has no number yet."""
    return event_id(next(NUMBERS))


def process_id() -> str:
    """Return what the ids of this process's events begin with."""
    return _prefix


def renew_process_id() -> None:
    """In a forked child: give its events ids of their own."""
    global _prefix
    _prefix = secrets.token_hex(10)


LAST_SECOND = 253_402_300_799.0
"""The last second that has a `timestamp`: of the year 9999."""


def known_time(seconds: Any) -> float:
    """Return Unix time `seconds`, or now where it is none: a record may be made by hand."""
    try:
        found = float(seconds)
    except (TypeError, ValueError, OverflowError):
        return time.time()
    return found if 0 <= found < LAST_SECOND else time.time()


_seconds: dict[int, str] = {}
"""What is known of seconds: events that are sorted by session come from many, in turns."""


def timestamp(seconds: float) -> str:
    """Return Unix time `seconds` as ISO 8601 in UTC with microseconds.

    Raises:
        ValueError, OverflowError: It is none that `known_time` returns.
    """
    second = math.floor(seconds)
    rest = round((seconds - second) * 1_000_000)
    if rest == 1_000_000:
        second, rest = second + 1, 0
    text = _seconds.get(second)
    if text is None:
        if len(_seconds) >= 1000:
            _seconds.clear()
        text = f"{datetime.fromtimestamp(second, timezone.utc).isoformat()[:19]}."
        _seconds[second] = text
    # Leading zeros are rare, and asking for six digits costs as much as all the rest.
    return f"{text}{rest}+00:00" if rest > 99_999 else f"{text}{rest:06}+00:00"
