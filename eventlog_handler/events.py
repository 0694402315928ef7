"""The two event classes of agent code: plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SessionEvent:
    """Something that happened in one session.

    Args:
        type: What happened, for example `"user_message"` or `"tool_call"`.
        session_id: The session whose file gets the event.
        role: Who caused it, for example `"user"` or `"assistant"`.
        parent_session_id: The session that started this one, for sub-agents.
        user_session_id: The user's own session, where one spans several agent sessions.
        data: Anything else, by name.
    """

    type: str
    session_id: str
    role: str | None = None
    parent_session_id: str | None = None
    user_session_id: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class SemiSessionEvent:
    """Something that happened beside a session, or before its id was known.

    The fields are those of `SessionEvent`, but `session_id` may be missing: then
    `session_context()` decides, and if there is none, the directory of unknown sessions.
    """

    type: str
    session_id: str | None = None
    role: str | None = None
    parent_session_id: str | None = None
    user_session_id: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
